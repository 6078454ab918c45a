"""Random tensors, their bits, and their equality."""

import torch

#: The integers that a floating dtype is seen as.
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_values(shape, dtype, seed=0):
    """Every bit pattern is as likely as any other, but for zeros of both signs, which are every eighth value."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(INTEGER[dtype])
    x = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(INTEGER[dtype]).view(dtype)
    zeros = torch.rand(shape, generator=generator)
    return x.masked_fill(zeros < 0.06, 0.0).masked_fill(zeros > 0.94, -0.0)


def bits(x):
    """The bits of a tensor: -0.0 is not 0.0, and one NaN is as good as another (PyTorch changes their payload)."""
    return x.masked_fill(x.isnan(), torch.nan).contiguous().view(INTEGER[x.dtype])


def assert_same(actual, expected):
    """Assert that tensors, or collections of tensors, are equal; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
