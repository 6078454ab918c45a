"""A chain written into a graph computes what the chain computes."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator, add, compose, identity
from fastentropy.fusion.chains.elements import BorderCorrected, Flatten, Sum, run
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.memory_format import is_channels_last, like_format
from tests._helpers.chains import chains
from tests._helpers.operators import attempt, average, branches, convolutions, normal, pairs, pytorch_output, size_after


def operator(*shape, stride=1, padding=0, groups=1, upsampling=1):
    axes = len(shape) - 2
    weight, bias = normal(*shape, seed=sum(shape)), normal(shape[0], seed=shape[0])
    return AffineOperator(weight, bias, (stride,) * axes, (padding,) * axes, (1,) * axes, groups, (upsampling,) * axes)


BLOCK = (operator(6, 4, 1, 1), operator(6, 1, 3, 3, padding=1, groups=6), operator(4, 6, 1, 1))
BASIC = (Sum(((operator(6, 4, 3, 3, padding=1), operator(4, 6, 3, 3, padding=1)), ())),)
LAYERS = (operator(6, 4), operator(4, 6))
CHAINS = {
    "convolutions": (BLOCK, (2, 4, 5, 6)),
    "strided 1-d": ((operator(6, 4, 3, stride=2, padding=1), operator(2, 6, 2)), (2, 4, 9)),
    "3-d": ((operator(2, 4, 2, 2, 2),), (2, 4, 3, 3, 3)),
    "zeros on one side": ((replace(operator(2, 4, 3, 2), padding=((0, 1), (2, 0))),), (2, 4, 5, 6)),
    "zeros on one side, 3-d": ((replace(operator(2, 4, 2, 2, 2), padding=((0, 1), (1, 1), (2, 0))),), (2, 4, 3, 3, 3)),
    "cropped": ((replace(operator(2, 4, 1, 1), padding=((-1, -1), (-1, 0))),), (2, 4, 5, 6)),
    "cropped and padded": ((replace(operator(2, 4, 3, 3), padding=((-1, 1), (2, -1))),), (2, 4, 5, 6)),
    "transposed": ((operator(6, 4, 2, 2, padding=1, upsampling=2),), (2, 4, 5, 6)),
    "transposed with groups": ((operator(6, 2, 3, padding=1, groups=2, upsampling=2),), (2, 4, 5)),
    "transposed along one axis": ((replace(operator(6, 4, 3, 2), upsampling=(1, 2), padding=(1, 1)),), (2, 4, 5, 6)),
    "transposed with a bias map": (merge((operator(6, 4, 1), operator(2, 6, 3, padding=2, upsampling=2)), (5,)), (2, 4, 5)),
    "bias map": (merge(BLOCK, (5, 6)), (2, 4, 5, 6)),
    "bordered": (merge(BASIC, (5, 6)), (2, 4, 5, 6)),
    "bordered 1-d": (merge((operator(6, 4, 3, padding=1), operator(3, 6, 5, padding=2, stride=2)), (20,)), (2, 4, 20)),
    "average": ((average(4, 2, 3),), (2, 4, 5, 6)),
    "average with wide padding": ((average(4, 2, 2, padding=2),), (2, 4, 5, 6)),
    "average with zeros on one side": ((replace(average(4, 2, 2), padding=((0, 1), (1, 1))),), (2, 4, 5, 6)),
    "average of distant values": ((replace(average(4, 2, 2), dilation=(2, 3)),), (2, 4, 5, 6)),
    "average of upsampled values": ((replace(average(4, 2, 2, stride=(1, 1)), upsampling=(2, 2)),), (2, 4, 5, 6)),
    "average of a map": ((replace(average(4, 2, 2), bias=normal(4, 2, 3, seed=0)),), (2, 4, 5, 6)),
    "average in a strip that is smaller than its kernel": (
        merge(
            (replace(operator(4, 4, 2, 2, 2), padding=((0, 1),) * 3), average(4, 3, 3, 3, stride=(1, 1, 1), padding=1)),
            (5, 5, 5),
        ),
        (1, 4, 5, 5, 5),
    ),
    "padded average": ((average(4, 3, padding=1, stride=(2,)),), (2, 4, 9)),
    "batch norm alone": ((operator(4, 1, 1, 1, groups=4),), (2, 4, 5, 6)),
    "batch norm of features": ((operator(4, 1, groups=4),), (2, 4)),
    "layers": (LAYERS, (2, 3, 4)),
    "a layer that covers": ((operator(6, 4, 5, 6), operator(2, 6, 1, 1)), (2, 4, 5, 6)),
    "a layer that covers, flattened": ((operator(6, 4, 5, 6), Flatten()), (2, 4, 5, 6)),
    "a classifier": ((average(4, 5, 6), operator(6, 4, 1, 1), operator(2, 6, 1, 1), Flatten()), (2, 4, 5, 6)),
    "flattened": ((operator(6, 4, 3, 3), Flatten()), (2, 4, 5, 6)),
    "residual": ((Sum((BLOCK, ())), operator(3, 4, 3, 3)), (2, 4, 5, 6)),
    "the value twice": ((Sum(((), ())), operator(3, 4, 3, 3)), (2, 4, 5, 6)),
    "nested residuals": ((Sum(((operator(4, 4, 1, 1), Sum((BLOCK, ()))), (), BLOCK)),), (2, 4, 5, 6)),
    "merged nested residuals": (merge((Sum((BLOCK, (Sum((BLOCK, ())),))),), (1, 3)), (2, 4, 1, 3)),
    "bias map in a branch": ((Sum(((), merge(BLOCK, (5, 6)))),), (2, 4, 5, 6)),
    "bordered in a branch": ((Sum((merge(BASIC, (5, 6)), ())), *merge(BASIC, (5, 6))), (2, 4, 5, 6)),
    "grouped layers": ((operator(6, 2, groups=2), operator(3, 2, groups=3)), (5, 4)),
    "merged residual layers": (merge((Sum((LAYERS, ())),), ()), (2, 3, 4)),
    "identity of features": ((identity(4, LAYERS[0]),), (2, 4)),
    "no batch": (BLOCK, (4, 5, 6)),
    "bordered without a batch": (merge(BASIC, (5, 6)), (4, 5, 6)),
}


def close(actual, expected):
    """Assert that two float64 tensors agree; closer than after a composition, since only the order of sums may differ."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CHAINS)
def test_a_compiled_chain_equals_the_chain(name):
    chain, shape = CHAINS[name]
    x = normal(*shape, seed=0)
    close(compile_chain(chain, x)(x), run(chain, x))


@pytest.mark.parametrize("name", [name for name, (_, shape) in CHAINS.items() if len(shape) > 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_compiled_chain_runs_in_both_memory_formats(name, channels_last):
    chain, shape = CHAINS[name]
    formats = [torch.contiguous_format, torch.channels_last if len(shape) == 4 else torch.channels_last_3d]
    x = normal(*shape, seed=0)
    compiled = compile_chain(chain, x.contiguous(memory_format=formats[channels_last]))
    for memory_format in formats:
        close(compiled(x.contiguous(memory_format=memory_format)), run(chain, x))


@settings(max_examples=40)
@given(chains(shortest=1, longest=4))
def test_drawn_chains_compile(drawn):
    chain, x, y = drawn
    torch.testing.assert_close(compile_chain(chain, x)(x), y, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(st.data(), st.integers(0, 3))
def test_operators_of_any_geometry_compile(data, axes):
    drawn = data.draw(convolutions(axes, 4))
    size = [data.draw(st.integers(1, 6)) for _ in range(axes)]
    assume(all(size_after(drawn, size)))
    x = normal(2, 4, *size, seed=1)
    close(compile_chain((drawn,), x)(x), pytorch_output(drawn, x))


@pytest.mark.slow
@settings(max_examples=60)
@given(pairs())
def test_every_composition_compiles(pair):
    first, second, x = pair
    composed, _ = attempt(compose, first, second)
    assume(composed is not None)
    torch.testing.assert_close(compile_chain((composed,), x)(x), pytorch_output(composed, x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@settings(max_examples=40)
@given(branches())
def test_every_sum_compiles(drawn):
    left, right, x = drawn
    total, _ = attempt(add, left, right)
    assume(total is not None)
    torch.testing.assert_close(compile_chain((total,), x)(x), pytorch_output(total, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["convolutions", "bordered", "bias map", "a classifier", "layers"])
def test_weights_take_the_dtype_of_the_input(name, dtype):
    chain, shape = CHAINS[name]
    x = normal(*shape, seed=0).to(dtype)
    compiled = compile_chain(chain, x)
    assert compiled(x).dtype == dtype
    assert {buffer.dtype for buffer in compiled.buffers()} == {dtype}


@pytest.mark.parametrize("name", ["convolutions", "bordered", "transposed", "batch norm alone"])
def test_weights_follow_the_memory_format_of_the_value(name):
    chain, shape = CHAINS[name]
    x = normal(*shape, seed=0)
    for value in (x, x.contiguous(memory_format=torch.channels_last)):
        compiled = compile_chain(chain, value)
        kernels = [buffer for buffer in compiled.buffers() if buffer.ndim == 4 and max(buffer.shape[2:]) > 1]
        expected = [like_format(kernel, value).stride() for kernel in kernels]
        assert [kernel.stride() for kernel in kernels] == expected
        assert is_channels_last(compiled(value)) == is_channels_last(value)


@pytest.mark.parametrize("name", CHAINS)
def test_the_input_is_not_overwritten(name):
    chain, shape = CHAINS[name]
    x = normal(*shape, seed=0)
    before = x.clone()
    compiled = compile_chain(chain, x)
    compiled(x)
    assert torch.equal(x, before)
    close(compiled(x), run(chain, before))  # and the weights are not either


def test_a_bias_map_alone_does_not_overwrite_the_input():
    chain = (replace(identity(4, BLOCK[0]), bias=normal(4, 5, 6, seed=0)),)
    x = normal(2, 4, 5, 6, seed=1)
    before = x.clone()
    close(compile_chain(chain, x)(x), before + chain[0].bias)
    assert torch.equal(x, before)


def test_the_weights_of_a_chain_stay_float64():
    chain, shape = CHAINS["bordered"]
    weights = [copy.deepcopy(o.weight) for o in (chain[0].interior, *BASIC[0].branches[0])]
    compile_chain(chain, torch.randn(shape))
    assert isinstance(chain[0], BorderCorrected)
    assert all(map(torch.equal, weights, [o.weight for o in (chain[0].interior, *BASIC[0].branches[0])]))


def count(compiled, *targets):
    return sum(node.target in targets for node in compiled.graph.nodes)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("average", [torch.ops.aten.avg_pool2d.default]),
        ("padded average", [torch.ops.aten.avg_pool1d.default]),
        ("batch norm alone", [torch.ops.aten.addcmul.default]),
        ("transposed", [torch.ops.aten.conv_transpose2d.input]),
        ("a layer that covers, flattened", [torch.ops.aten.flatten.using_ints, torch.ops.aten.linear.default]),
        ("layers", [torch.ops.aten.linear.default] * 2),
        ("convolutions", [torch.ops.aten.conv2d.default] * 3),
        ("bias map", [torch.ops.aten.conv2d.default, torch.ops.aten.add_.Tensor]),
        ("zeros on one side", [torch.ops.aten.constant_pad_nd.default, torch.ops.aten.conv2d.default]),
    ],
)
def test_each_kind_becomes_the_best_operator_of_pytorch(name, targets):
    chain, shape = CHAINS[name]
    nodes = compile_chain(chain, normal(*shape, seed=0)).graph.nodes
    assert [node.target for node in nodes if node.op == "call_function"] == targets


@pytest.mark.parametrize("bias", [torch.zeros(6).double(), normal(6, seed=0)])
def test_a_bias_of_zeros_is_left_out(bias):
    compiled = compile_chain((replace(operator(6, 4, 3, 3), bias=bias),), normal(2, 4, 5, 6, seed=0))
    assert len(list(compiled.buffers())) == 1 + bool(bias.any())
