"""The reference of the fused chains against the separate operators, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy_kernels import conv_bordered, conv_pointwise, linear_pair
from tests.kernels.chains.cases import DTYPES, convolutions, output_size, random_tensor

# Half a step of the format, and for float32 the error of the arithmetic: relative to the sum of all terms' absolute values.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_close(y, exact, magnitude):
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= RTOL[y.dtype] * magnitude + 1e-7).all()


def conv(x, weight, layer):
    """Convolve as a sum over taps, each of which reads a shifted, padded image."""
    (top, left), (down, right), (low, long) = layer["padding"], layer["stride"], layer["dilation"]
    padded = F.pad(x, (left, left, top, top))
    height, width = output_size(layer)
    y = torch.zeros(x.shape[0], weight.shape[0], height, width, dtype=x.dtype)
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            part = padded[:, :, row * low :: down, column * long :: right][:, :, :height, :width]
            equation = "bchw,c->bchw" if layer["groups"] > 1 else "bchw,oc->bohw"
            y += torch.einsum(equation, part, weight[:, 0, row, column] if layer["groups"] > 1 else weight[..., row, column])
    return y


def along_channels(bias):
    return bias[:, None, None]


@settings(max_examples=60)
@given(
    layer=convolutions(),
    outputs=st.sampled_from([1, 5]),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_conv_pointwise_is_two_convolutions(layer, outputs, dtype, channels_last, seed):
    torch.manual_seed(seed)
    hidden = layer["weight"][0]
    x, weight, bias = (
        random_tensor(layer["x"], dtype, channels_last),
        random_tensor(layer["weight"], dtype),
        randn(hidden, dtype),
    )
    pointwise, pointwise_bias = random_tensor((outputs, hidden), dtype), randn(outputs, dtype)
    residual = random_tensor((layer["x"][0], outputs, *output_size(layer)), dtype)
    tensors = [tensor.double() for tensor in (x, weight, bias, pointwise, pointwise_bias, residual)]

    def exact(x, weight, bias, pointwise, pointwise_bias, residual):
        between = conv(x, weight, layer) + along_channels(bias)
        return torch.einsum("bchw,oc->bohw", between, pointwise) + along_channels(pointwise_bias) + residual

    convolution = {name: layer[name] for name in ("stride", "padding", "dilation", "groups")}
    y = conv_pointwise(x, weight, bias, pointwise, pointwise_bias, residual=residual, activation="relu", **convolution)
    assert_close(y, exact(*tensors).relu(), exact(*(tensor.abs() for tensor in tensors)))


def randn(size, dtype):
    return random_tensor((size,), dtype)


def test_narrow_image_with_outputs_of_padding_alone():
    x, weight, bias = random_tensor((2, 20, 11, 1), torch.float32, True), torch.zeros(1, 20, 5, 1), torch.ones(1)
    y = conv_pointwise(x, weight, bias, torch.full((3, 1), 2.0), None, stride=(3, 2), padding=(0, 1), dilation=(2, 2))
    assert torch.equal(y, torch.full((2, 3, 1, 2), 2.0))


@settings(max_examples=60)
@given(
    layer=convolutions(),
    hidden=st.sampled_from([1, 4]),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_tap_bias_is_the_bias_before_padding(layer, hidden, dtype, channels_last, seed):
    """Merge a 1 x 1 convolution with a bias into one that pads: the bias acts only inside of the image."""
    torch.manual_seed(seed)
    depthwise, (outputs, _, *kernel) = layer["groups"] > 1, layer["weight"]
    hidden = layer["groups"] if depthwise else hidden
    x = random_tensor(layer["x"], dtype, channels_last).double()
    # 1, 0 and -1, so that the merged weights have no error.
    first = torch.randint(-1, 2, (hidden, 1 if depthwise else x.shape[1])).double()
    second = torch.randint(-1, 2, (outputs, 1 if depthwise else hidden, *kernel)).double()
    first_bias, bias = torch.randint(-2, 3, (hidden,)).double(), randn(outputs, dtype).double()

    def exact(x, first, second, first_bias, bias):
        between = x * first[:, :, None] if depthwise else torch.einsum("bchw,oc->bohw", x, first)
        return conv(between + along_channels(first_bias), second, layer) + along_channels(bias)

    merged = second * first[:, :, None, None] if depthwise else torch.einsum("omhw,mi->oihw", second, first)
    tap_bias = (
        (second * first_bias[:, None, None, None])[:, 0] if depthwise else torch.einsum("omhw,m->ohw", second, first_bias)
    )
    convolution = {name: layer[name] for name in ("stride", "padding", "dilation", "groups")}
    y = conv_bordered(x.to(dtype), merged.to(dtype), bias.to(dtype), tap_bias.to(dtype), **convolution)
    assert_close(y, exact(x, first, second, first_bias, bias), exact(*map(torch.abs, (x, first, second, first_bias, bias))))


@settings(max_examples=30)
@given(
    shape=st.lists(st.sampled_from([1, 2, 5]), max_size=3),
    sizes=st.tuples(*[st.sampled_from([1, 5, 37])] * 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_linear_pair_is_two_products(shape, sizes, dtype, seed):
    torch.manual_seed(seed)
    inputs, hidden, outputs = sizes
    shapes = ((*shape, inputs), (hidden, inputs), (hidden,), (outputs, hidden), (outputs,), (*shape, outputs))
    tensors = [random_tensor(shape, dtype) for shape in shapes]

    def exact(x, weight1, bias1, weight2, bias2, residual):
        return (x @ weight1.T + bias1) @ weight2.T + bias2 + residual

    y = linear_pair(*tensors[:5], residual=tensors[5], activation="relu")
    wide = [tensor.double() for tensor in tensors]
    assert_close(y, exact(*wide).relu(), exact(*(tensor.abs() for tensor in wide)))


@each_dtype
def test_hidden_values_are_rounded_to_float32_alone(dtype):
    # 1 and half a step of the format, then - 1. In 16 bits a rounding in between would take the half step away.
    step = torch.finfo(dtype).eps
    x = torch.tensor([[1.0, step / 2]], dtype=dtype)
    ones, one, minus_one = torch.ones(1, 2, dtype=dtype), torch.ones(1, 1, dtype=dtype), -torch.ones(1, dtype=dtype)
    left = 0 if dtype == torch.float32 else step / 2
    assert linear_pair(x, ones, None, one, minus_one).item() == left
    images = x[..., None, None]
    assert conv_pointwise(images, ones[..., None, None], None, one, minus_one).item() == left


@each_dtype
def test_counts_are_of_rounded_values_and_added(dtype):
    # A quarter of the smallest number, of either sign, is rounded to zero.
    smallest = torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, dtype=dtype)
    x = torch.tensor([0.25, -0.25, 1.0, -1.0, 0.0, torch.nan], dtype=dtype).view(6, 1, 1, 1)
    counts = torch.full((1, 3), 7)
    y = conv_bordered(x, smallest.view(1, 1, 1, 1), None, activation="relu", counts=counts)
    assert counts.tolist() == [[7 + 1, 7 + 3, 7 + 1]]
    assert torch.equal(y[:5].flatten() > 0, torch.tensor([False, False, True, False, False]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype):
    x, weight, factors = random_tensor((2, 3, 5, 5), dtype), random_tensor((4, 3, 3, 3), dtype), random_tensor((5, 4), dtype)
    expected = conv_pointwise(x, weight, None, factors, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv_pointwise(x, weight, None, factors, None), expected)
