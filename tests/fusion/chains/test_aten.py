"""The affine operator that is read from an ATen operator computes the same, in float64, as torch.export traces it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests._helpers.networks import Holder, Reads
from tests._helpers.operators import CONVOLUTIONS, SEEDS, TRANSPOSED, close, normal
from tests._helpers.reading import read_node


def traced(model, x):
    return torch.export.export(model, (x,)).module(check_guards=False)


def last_read(model, x):
    """Read the last operator of a model; return the result and its node."""
    module = traced(model, x)
    (output,) = module.graph.find_nodes(op="output")
    (node,) = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    return read_node(node, module), node


def assert_reads(model, x):
    """Assert that the last operator of a model is read, and that the result computes what the model computes."""
    linear, node = last_read(model, x)
    assert linear is not None, node.target
    expected = model(x)
    axes = x.ndim - 2 if linear.axes is None else linear.axes
    operator = linear.build(axes)
    assert operator.weight.dtype == operator.bias.dtype == torch.float64
    assert len(operator.axes) == axes
    close(operator(x).reshape(expected.shape), expected)
    return linear


@st.composite
def geometries(draw):
    """Draw an input, and of a convolution: kernel, bias or None, groups, output channels, and a source of numbers per axis."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    in_channels, out_channels = (groups * draw(st.integers(1, 2)) for _ in range(2))
    kernel = [draw(st.integers(1, 3)) for _ in range(axes)]

    def numbers(low, high):
        one = draw(st.booleans())
        values = [draw(st.integers(low, high)) for _ in range(axes)]
        return values[:1] * axes if one else values

    x = normal(2, in_channels, *(draw(st.integers(1, 6)) for _ in range(axes)), seed=draw(SEEDS))
    bias = normal(out_channels, seed=draw(SEEDS)) if draw(st.booleans()) else None
    return x, kernel, bias, groups, out_channels, numbers


@pytest.mark.slow
@settings(max_examples=25)
@given(geometries())
def test_a_convolution_is_read(drawn):
    x, kernel, bias, groups, out_channels, numbers = drawn
    axes, stride, padding, dilation = len(kernel), numbers(1, 3), numbers(0, 3), numbers(1, 3)
    sizes = zip(x.shape[2:], kernel, padding, dilation, strict=True)
    assume(all(n + 2 * p > (k - 1) * d for n, k, p, d in sizes))
    weight = normal(out_channels, x.shape[1] // groups, *kernel, seed=1)
    function = CONVOLUTIONS[axes - 1]
    model = Holder(lambda m, x: function(x, m.weight, m.bias, stride, padding, dilation, groups), weight=weight, bias=bias)
    assert assert_reads(model, x).name == "weight"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=25)
@given(geometries(), st.sampled_from(["same", "valid"]))
def test_padding_by_name_is_read(drawn, padding):
    x, kernel, bias, groups, out_channels, numbers = drawn
    axes, dilation = len(kernel), numbers(1, 3)
    assume(padding == "same" or all(n > (k - 1) * d for n, k, d in zip(x.shape[2:], kernel, dilation, strict=True)))
    weight = normal(out_channels, x.shape[1] // groups, *kernel, seed=1)
    function = CONVOLUTIONS[axes - 1]
    model = Holder(lambda m, x: function(x, m.weight, m.bias, 1, padding, dilation, groups), weight=weight, bias=bias)
    assert_reads(model, x)


@pytest.mark.slow
@settings(max_examples=25)
@given(geometries(), st.data())
def test_a_transposed_convolution_is_read(drawn, data):
    x, kernel, bias, groups, out_channels, numbers = drawn
    axes, stride, padding, dilation = len(kernel), numbers(1, 3), numbers(0, 2), numbers(1, 3)
    more = [data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    sizes = zip(x.shape[2:], kernel, stride, padding, dilation, more, strict=True)
    assume(all((n - 1) * s - 2 * p + (k - 1) * d + m + 1 > 0 for n, k, s, p, d, m in sizes))
    weight = normal(x.shape[1], out_channels // groups, *kernel, seed=1)
    function = TRANSPOSED[axes - 1]
    model = Holder(
        lambda m, x: function(x, m.weight, m.bias, stride, padding, more, groups, dilation), weight=weight, bias=bias
    )
    assert assert_reads(model, x).name == "weight"


@pytest.mark.slow
@settings(max_examples=20)
@given(geometries(), st.booleans())
def test_average_pooling_is_read(drawn, padded):
    x, kernel, _, _, _, numbers = drawn
    axes, stride = len(kernel), numbers(1, 3)
    padding = [k // 2 * padded for k in kernel]
    assume(all(n >= k for n, k in zip(x.shape[2:], kernel, strict=True)))
    assume(max(*kernel, *stride) > 1 or any(padding))
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    linear = assert_reads(Holder(lambda m, x: function(x, kernel, stride, padding)), x)
    assert (linear.axes, linear.name, linear.flattens) == (axes, "", False)
    assert linear.build(axes).is_average


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x: F.avg_pool2d(x, 2), (2, 3, 4, 5)),
        (lambda m, x: F.avg_pool2d(x, (2, 3), count_include_pad=False), (2, 3, 4, 5)),
        (lambda m, x: F.avg_pool2d(x, 3, 2, 1, False, True), (2, 3, 4, 5)),
        (lambda m, x: F.avg_pool1d(x, 2), (2, 3, 4)),
        (lambda m, x: F.adaptive_avg_pool1d(x, 2), (2, 3, 6)),
        (lambda m, x: F.adaptive_avg_pool2d(x, 1), (2, 3, 4, 5)),
        (lambda m, x: F.adaptive_avg_pool2d(x, (2, None)), (2, 3, 4, 5)),
        (lambda m, x: F.adaptive_avg_pool3d(x, (2, 1, 3)), (2, 3, 4, 5, 3)),
        (lambda m, x: x.mean((2, 3)), (2, 3, 4, 5)),
        (lambda m, x: x.mean((-1, -2), keepdim=True), (2, 3, 4, 5)),
        (lambda m, x: x.mean((3, 2), keepdim=True), (2, 3, 4, 5)),
        (lambda m, x: x.mean(2), (2, 3, 4)),
        (lambda m, x: x.mean((2, 3, 4)), (2, 3, 4, 5, 2)),
    ],
)
def test_pools_and_means_are_read(function, shape):
    x = normal(*shape, seed=0)
    model = Holder(function)
    linear = assert_reads(model, x)
    assert linear.flattens == (model(x).ndim == 2)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x: F.linear(x, m.weight, m.bias), (2, 4)),
        (lambda m, x: F.linear(x, m.weight, m.bias), (2, 3, 5, 4)),
        (lambda m, x: F.linear(x, m.weight), (4,)),
        (lambda m, x: torch.addmm(m.bias, x, m.matrix), (3, 4)),
        (lambda m, x: torch.addmm(m.one, x, m.matrix), (3, 4)),
        (lambda m, x: torch.mm(x, m.matrix), (3, 4)),
        (lambda m, x: x @ m.matrix, (3, 4)),
        (lambda m, x: x @ m.matrix, (2, 3, 4)),
        (lambda m, x: torch.matmul(x, m.matrix), (2, 3, 5, 4)),
    ],
)
def test_a_product_with_a_constant_matrix_is_read(function, shape):
    constants = {"weight": normal(6, 4, seed=1), "matrix": normal(4, 6, seed=1)}
    model = Holder(function, **constants, bias=normal(6, seed=2), one=normal(1, seed=3))
    linear = assert_reads(model, normal(*shape, seed=0))
    assert linear.axes == 0
    assert linear.name in ("weight", "matrix") or linear.name == ""


@pytest.mark.slow
@given(st.integers(0, 3), st.sampled_from(list(itertools.product([False, True], repeat=2))), st.integers(0, 9))
@settings(max_examples=25)
def test_batch_norm_in_eval_mode_is_read(axes, has, seed):
    """Extreme statistics: means far from zero, small and large variances, weights of both signs and zero."""
    mean, variance = normal(4, seed=seed) * 10, torch.tensor([1e-8, 1e-2, 1.0, 1e4]).double()
    weight = torch.tensor([1.0, -2.0, 0.0, 3.0]).double() if has[0] else None
    bias = normal(4, seed=seed + 1) if has[1] else None
    model = Holder(
        lambda m, x: F.batch_norm(x, m.mean, m.variance, m.weight, m.bias, False, 0.1, 1e-3),
        **{"mean": mean, "variance": variance, "weight": weight, "bias": bias},
    )
    linear = assert_reads(model, normal(2, 4, *[3] * axes, seed=seed + 2))
    assert (linear.axes, linear.name) == (axes, "")


SCALES = {
    "x * 2.5": lambda m, x: x * 2.5,
    "2 * x": lambda m, x: 2 * x,
    "x / 4.0": lambda m, x: x / 4.0,
    "x + 1.5": lambda m, x: x + 1.5,
    "3 + x": lambda m, x: 3 + x,
    "x - 2.0": lambda m, x: x - 2.0,
    "x * channels": lambda m, x: x * m.channels,
    "channels * x": lambda m, x: m.channels * x,
    "x / channels": lambda m, x: x / m.channels,
    "x + channels": lambda m, x: x + m.channels,
    "channels + x": lambda m, x: m.channels + x,
    "x - channels": lambda m, x: x - m.channels,
    "x * one": lambda m, x: x * m.one,
    "one + x": lambda m, x: m.one + x,
    "x.mul_": lambda m, x: (x * 2).mul_(m.channels) / 2,
    "x.div_": lambda m, x: (x * 2).div_(m.channels) / 2,
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("axes", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_scales_and_shifts_of_channels_are_read(name, axes):
    model = Holder(SCALES[name], channels=normal(1, 4, *[1] * axes, seed=1), one=normal(1, seed=2))
    if name.endswith("_"):  # the node in the middle of three
        x = normal(2, 4, *[3] * axes, seed=0)
        module = traced(model, x)
        (node,) = (n for n in module.graph.nodes if "_." in f"{n.target}.")
        operator = read_node(node, module).build(axes)
        close(operator(x), x * model.channels if "mul" in name else x / model.channels)
    else:
        assert_reads(model, normal(2, 4, *[3] * axes, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("function", [lambda m, x: x * m.v, lambda m, x: m.v + x, lambda m, x: x - m.v, lambda m, x: x / m.v])
@pytest.mark.parametrize(("constant", "shape"), [((4,), (2, 4)), ((4,), (2, 3, 4)), ((1, 1, 4), (2, 3, 4)), ((4,), (4,))])
def test_scales_and_shifts_of_features_are_read(function, constant, shape):
    model, x = Holder(function, v=normal(*constant, seed=1)), normal(*shape, seed=0)
    linear, _ = last_read(model, x)
    assert linear.axes == 0
    close(linear.build(0)(x), model(x))


def test_a_constant_for_a_single_channel_is_a_number():
    model = Holder(lambda m, x: x * m.v, v=normal(1, 1, 1, seed=1))
    linear, _ = last_read(model, normal(2, 1, 3, 3, seed=0))
    assert linear.axes is None
    close(linear.build(2).weight.flatten(), model.v.flatten())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.clone(),
        lambda m, x: F.dropout(x, 0.5, training=False),
        lambda m, x: F.dropout2d(x, 0.5, training=False),
        lambda m, x: F.avg_pool2d(x, 1),
        lambda m, x: F.adaptive_avg_pool2d(x, (4, 5)),
    ],
)
def test_identities_are_read_as_nothing(function):
    linear, node = last_read(Holder(function), normal(2, 3, 4, 5, seed=0))
    assert linear.build is None
    assert linear.operand is node.args[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    {
        "batch norm that updates": lambda m, x: F.batch_norm(x, m.mean, m.variance, training=True),
        "batch norm of the batch": lambda m, x: F.batch_norm(x, None, None, training=True),
        "instance norm": lambda m, x: F.instance_norm(x),
        "dropout": lambda m, x: F.dropout(x, 0.5, training=True),
        "ceil mode": lambda m, x: F.avg_pool2d(x, 2, 2, ceil_mode=True),
        "ceil mode in one dimension": lambda m, x: F.avg_pool1d(x.flatten(2), 3, 3, ceil_mode=True),
        "padding that does not count": lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        "another divisor": lambda m, x: F.avg_pool2d(x, 2, divisor_override=3),
        "another divisor in three dimensions": lambda m, x: F.avg_pool3d(x[:, :, None], (1, 2, 2), divisor_override=3),
        "cells of different sizes": lambda m, x: F.adaptive_avg_pool2d(x, 3),
        "max pooling": lambda m, x: F.max_pool2d(x, 2),
        "mean over channels": lambda m, x: x.mean(1),
        "mean over one of two axes": lambda m, x: x.mean(3),
        "mean over the batch": lambda m, x: x.mean((0, 2, 3)),
        "mean over everything": lambda m, x: x.mean(),
        "mean in another dtype": lambda m, x: x.mean((2, 3), dtype=torch.float32),
        "weights that are computed": lambda m, x: F.conv2d(x, m.weight * 2),
        "weights from the input": lambda m, x: F.conv2d(x, x[:, :, :2, :2]),
        "a bias that is computed": lambda m, x: F.conv2d(x, m.weight, m.mean * 2),
        "a product with itself": lambda m, x: x @ x.transpose(2, 3),
        "a product from the left": lambda m, x: m.map[0, 0, :4, :4] @ x,
        "a product with a vector": lambda m, x: x @ m.features,
        "a batch of matrices": lambda m, x: x @ m.matrices,
        "a map of the positions": lambda m, x: x + m.map,
        "a constant of each row": lambda m, x: x * m.map[:1, :1, :, :1],
        "a constant for channels and positions": lambda m, x: x * m.channels_map,
        "a constant over the value": lambda m, x: m.channels / x,
        "rounding": lambda m, x: torch.div(x, 2.0, rounding_mode="floor"),
        "the value times itself": lambda m, x: x * x,
        "a constant that widens": lambda m, x: x[:, :1] * m.channels,
        "a constant that adds an axis": lambda m, x: x + m.wide,
        "promotion": lambda m, x: x.float() * m.map[0, 0, 0],
        "integer weights": lambda m, x: x * m.integers,
        "boolean weights": lambda m, x: x * m.booleans,
        "complex weights": lambda m, x: (x * m.complex).real,
        "addmm with beta": lambda m, x: torch.addmm(m.features, x[0, 0], m.matrix, beta=2),
        "addmm with a matrix": lambda m, x: torch.addmm(m.matrix[:4], x[0, 0], m.matrix),
        "a bilinear layer": lambda m, x: F.bilinear(x, x, m.cube),
        "the value minus itself": lambda m, x: x - x,
        "a scaled map of the positions": lambda m, x: torch.add(x, m.map, alpha=2),
        "a sum of channels": lambda m, x: x.sum(1),
        "relu": lambda m, x: x.relu(),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_other_operators_are_not_read(function):
    model = Holder(
        function[1],
        mean=normal(3, seed=1),
        variance=normal(3, seed=2).exp(),
        weight=normal(3, 3, 2, 2, seed=3),
        matrix=normal(5, 5, seed=4),
        features=normal(5, seed=5),
        matrices=normal(2, 1, 5, 5, seed=6),
        map=normal(1, 1, 4, 5, seed=7),
        channels=normal(3, 1, 1, seed=8),
        channels_map=normal(3, 4, 1, seed=8),
        wide=normal(2, 1, 3, 1, 1, seed=9),
        integers=torch.tensor([[[2]], [[3]], [[4]]]),
        booleans=torch.tensor([[[True]], [[False]], [[True]]]),
        complex=torch.randn(3, 1, 1, dtype=torch.complex128),
        cube=normal(2, 5, 5, seed=10),
    )
    linear, node = last_read(model, normal(2, 3, 4, 5, seed=0))
    assert linear is None, node.target


def test_a_scale_in_another_precision_is_not_read():
    """A product in float64 must not be computed with a factor that was rounded to float32."""
    model = Holder(lambda m, x: x * m.v, v=normal(3, 1, 1, seed=1))
    assert last_read(model, torch.randn(2, 3, 4, 4))[0] is None


def test_circular_padding_is_not_zero_padding():
    conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular").double()
    linear, node = last_read(conv, normal(2, 3, 4, 5, seed=0))
    assert linear.operand.target != "placeholder"
    assert linear.build(2).padding == ((0, 0), (0, 0))
    assert read_node(linear.operand, traced(conv, normal(2, 3, 4, 5, seed=0))) is None
    assert linear.operand is node.args[0]


def test_name_is_the_path_of_the_module():
    model = Reads(lambda m, x: m.body[1](m.body[0](x)), body=nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)))
    linear, _ = last_read(model, torch.randn(2, 3, 4, 4))
    assert linear.name == "body.1"


def test_the_operand_of_a_scale_is_not_the_constant():
    """c · x and x · c are read alike: the operand is the factor that is not a constant."""
    for function in (lambda m, x: m.v * x.relu(), lambda m, x: x.relu() * m.v):
        linear, _ = last_read(Holder(function, v=normal(3, 1, 1, seed=1)), normal(2, 3, 4, 4, seed=0))
        assert linear.operand.target is torch.ops.aten.relu.default


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3)),
        lambda x: x * 2.0,
        lambda x: x + 1.0,
    ],
    ids=["pool", "adaptive pool", "mean", "scale", "shift"],
)
def test_operators_without_weights_are_on_the_device_of_the_input(function):
    linear, _ = last_read(Holder(lambda self, x: function(x)), torch.ones(1, 3, 4, 4, device="meta"))
    operator = linear.build(2)
    assert operator.weight.device.type == operator.bias.device.type == "meta"
