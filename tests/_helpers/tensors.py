"""Random tensors, and comparisons of tensors bit by bit."""

import pytest
import torch

#: The integer dtype of the same size, by floating-point dtype.
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
#: The dtypes of `INTEGER` as parameters of tests. Numba compiles its loops for each dtype, which takes seconds.
FUSED_DTYPES = [torch.float32, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float16))]


def random_values(shape, dtype, seed=0):
    """Return a random tensor in which every bit pattern occurs, including infinities and NaN.

    All patterns are equally likely, except that about every eighth value is 0.0 or -0.0.
    """
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(INTEGER[dtype])
    x = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(INTEGER[dtype]).view(dtype)
    zeros = torch.rand(shape, generator=generator)
    return x.masked_fill(zeros < 0.06, 0.0).masked_fill(zeros > 0.94, -0.0)


def bits(x):
    """Return the bits of a tensor as integers of the same size.

    0.0 and -0.0 differ. All NaN become the same bits, because PyTorch does not preserve the payload of a NaN.
    """
    return x.masked_fill(x.isnan(), torch.nan).contiguous().view(INTEGER[x.dtype])


def assert_same(actual, expected):
    """Assert that two tensors, or two collections of tensors, are equal without a tolerance. NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
