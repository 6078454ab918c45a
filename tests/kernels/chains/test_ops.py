"""The fused chains give the results of eager calls in compiled, exported and fake programs."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from fastentropy_kernels import conv_bordered, conv_pointwise, linear_pair
from tests.kernels.chains.cases import random_tensor

ops = torch.ops.fastentropy_kernels
GEOMETRY = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}


class Chain(nn.Module):
    """A function with its weights: a call with x returns y and, where the name says so, counts states."""

    def __init__(self, name, dtype=torch.float32, residual=False):
        super().__init__()
        self.name, self.residual = name, residual
        for tensor, shape in {
            "weight": (3 if "depthwise" in name else 8, 1 if "depthwise" in name else 3, 3, 2),
            "bias": (3 if "depthwise" in name else 8,),
            "tap_bias": (3 if "depthwise" in name else 8, 3, 2),
            "factors": (5, 3 if "depthwise" in name else 8),
            "factors_bias": (5,),
            "first": (8, 7),
            "second": (5, 8),
        }.items():
            self.register_buffer(tensor, random_tensor(shape, dtype))
        self.register_buffer("counts", torch.full((len(self.bias), 3), 7))

    def forward(self, x):
        if self.name == "linear_pair":
            return linear_pair(x, self.first, None, self.second, self.factors_bias, activation="gelu")
        options = {**GEOMETRY, "groups": 3 if "depthwise" in self.name else 1}
        if "pointwise" in self.name:
            return conv_pointwise(x, self.weight, self.bias, self.factors, self.factors_bias, activation="relu", **options)
        counts = self.counts if "counted" in self.name else None
        return conv_bordered(x, self.weight, self.bias, self.tap_bias, counts=counts, activation="silu", **options)


NAMES = ["conv_pointwise", "depthwise conv_pointwise", "conv_bordered", "depthwise conv_bordered counted", "linear_pair"]
each = pytest.mark.parametrize("name", NAMES)
each_format = pytest.mark.parametrize("channels_last", [False, True])


def example(name, batch=4, channels_last=False):
    return random_tensor(
        (batch, 7) if name == "linear_pair" else (batch, 3, 6, 7), torch.float32, channels_last and "pair" not in name
    )


def assert_runs_as_eager(program, chain, name, channels_last=False, batches=(4,)):
    """Compare a program of `chain` with a copy of `chain` that runs eagerly, the counts included."""
    eager = Chain(name)
    eager.load_state_dict(chain.state_dict())
    for batch in batches:
        x = example(name, batch, channels_last)
        with torch.no_grad():
            y, expected = program(x), eager(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        assert y.stride() == expected.stride()
        if "counted" in name:
            assert torch.equal(program.counts, eager.counts)


@pytest.mark.slow
@each
@each_format
def test_compiled_equals_eager(name, channels_last):
    chain = Chain(name)
    chain.compile(fullgraph=True, backend="aot_eager")
    assert_runs_as_eager(chain, chain, name, channels_last, batches=(4, 4))


@each
@each_format
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_batch(name, channels_last, strict):
    batch = {0: torch.export.Dim("batch", min=2)}
    chain = Chain(name)
    program = torch.export.export(chain, (example(name, 4, channels_last),), strict=strict, dynamic_shapes=(batch,)).module()
    assert_runs_as_eager(program, chain, name, channels_last, batches=(4, 9, 2))
    (operator,) = [node for node in program.graph.nodes if "fastentropy" in str(node.target)]
    assert name.split()[1 if "depthwise" in name else 0] in str(operator.target)


@each
def test_gradients_are_refused_while_tracing(name):
    chain = Chain(name)
    chain.weight, chain.first = nn.Parameter(chain.weight), nn.Parameter(chain.first)
    with pytest.raises(ValueError, match="requires a gradient"):
        torch.export.export(chain, (example(name),), strict=False)
    with torch.no_grad():
        torch.export.export(chain, (example(name),), strict=False)


@each
@each_format
def test_fake_tensors_have_the_real_format(name, channels_last):
    x, chain = example(name, 4, channels_last), Chain(name)
    y = chain(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = chain(mode.from_tensor(x))
    assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_format
def test_opcheck(dtype, channels_last):
    x, rows = random_tensor((2, 3, 5, 4), dtype, channels_last), random_tensor((3, 2, 7), dtype)
    weight, bias, factors = (random_tensor(shape, dtype) for shape in ((4, 3, 2, 2), (4,), (5, 4)))
    geometry = ([1, 2], [1, 0], [1, 1], 1)
    residual = ops.conv_pointwise(x, weight, None, factors, None, None, *geometry, "identity", "auto").mT.contiguous().mT
    opcheck(ops.conv_pointwise, (x, weight, bias, factors, None, residual, *geometry, "gelu", "auto"))
    opcheck(ops.conv_bordered, (x, weight, bias, weight[:, 0], None, *geometry, "relu", True, "auto"))
    opcheck(ops.conv_bordered, (x[:0], weight, None, None, None, *geometry, "relu", False, "reference"))
    opcheck(ops.linear_pair, (rows, random_tensor((4, 7), dtype), bias, factors, None, None, "identity", "auto"))


class Named(torch.Tensor):
    """A tensor subclass."""


@each
def test_subclasses_go_through_the_operator(name):
    chain, x = Chain(name), example(name)
    y = chain(x.as_subclass(Named))
    assert type(y) is Named
    assert torch.equal(y.as_subclass(torch.Tensor), chain(x))
