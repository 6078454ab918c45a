"""A chain written into a graph computes what the chain computes."""

import pytest
import torch

from fastentropy.fusion.affine import AffineOperator, Sum, identity, merge, run
from fastentropy.fusion.lowering import compile_chain


def operator(*shape, stride=1, padding=0, groups=1):
    axes = len(shape) - 2
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    return AffineOperator(weight, bias, (stride,) * axes, (padding,) * axes, (1,) * axes, groups)


BLOCK = (operator(6, 4, 1, 1), operator(6, 1, 3, 3, padding=1, groups=6), operator(4, 6, 1, 1))
LAYERS = (operator(6, 4), operator(4, 6))
CHAINS = {
    "convolutions": (BLOCK, (2, 4, 5, 6)),
    "strided 1-d": ((operator(6, 4, 3, stride=2, padding=1), operator(2, 6, 2)), (2, 4, 9)),
    "3-d": ((operator(2, 4, 2, 2, 2),), (2, 4, 3, 3, 3)),
    "bias map": ((merge(BLOCK, (5, 6)),), (2, 4, 5, 6)),
    "batch norm alone": ((operator(4, 1, 1, 1, groups=4),), (2, 4, 5, 6)),
    "batch norm of features": ((operator(4, 1, groups=4),), (2, 4)),
    "layers": (LAYERS, (2, 3, 4)),
    "residual": ((Sum((BLOCK, ())), operator(3, 4, 3, 3)), (2, 4, 5, 6)),
    "nested residuals": ((Sum(((operator(4, 4, 1, 1), Sum((BLOCK, ()))), (), BLOCK)),), (2, 4, 5, 6)),
    "merged nested residuals": ((merge((Sum((BLOCK, (Sum((BLOCK, ())),))),), (1, 3)),), (2, 4, 1, 3)),
    "bias map in a branch": ((Sum(((), (merge(BLOCK, (5, 6)),))),), (2, 4, 5, 6)),
    "grouped layers": ((operator(6, 2, groups=2), operator(3, 2, groups=3)), (5, 4)),
    "merged residual layers": ((merge((Sum((LAYERS, ())),), ()),), (2, 3, 4)),
    "identity of features": ((identity(4, LAYERS[0]),), (2, 4)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_compiled_chain_equals_the_chain(name):
    chain, shape = CHAINS[name]
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(compile_chain(chain, x)(x), run(chain, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_the_dtype_of_the_input(dtype):
    x = torch.randn(2, 4, 5, 6, dtype=dtype)
    assert compile_chain(BLOCK, x)(x).dtype == dtype


def test_the_input_is_not_written_over():
    chain, shape = CHAINS["bias map"]
    x = torch.randn(shape, dtype=torch.float64)
    before = x.clone()
    compile_chain(chain, x)(x)
    assert torch.equal(x, before)
