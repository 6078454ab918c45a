"""Fixed and random affine operators for tests, and their outputs as computed by plain PyTorch.

An affine operator is a convolution (or a linear layer, with 0 spatial axes). With an upsampling of u, it inserts u - 1 zeros
between the values of its input, as a transposed convolution does.
"""

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator

SEEDS = st.integers(0, 2**16)

#: PyTorch's functions for 1, 2 and 3 spatial axes.
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

#: A pattern that matches the messages of the errors raised for two operators that cannot be composed into one.
NO_CONVOLUTION = "together they are no (transposed )?convolution"

#: A pattern that matches all messages of the errors raised for a chain (a stretch of operators) that cannot be merged.
REFUSALS = f"inner zero padding|{NO_CONVOLUTION}|different sizes"


def pytorch_output(operator, x):
    """Return the output of an operator, computed by PyTorch's padding and convolutions. It is the expected value of the tests.

    Args:
        operator: the affine operator.
        x: the input, `[batch, channels, *spatial]`, or `[..., features]` if the operator has no spatial axes.
    """
    axes = len(operator.stride)
    bias = operator.bias if operator.bias.ndim > 1 else operator.bias.reshape(-1, *[1] * axes)
    if not axes:
        return F.linear(x, torch.block_diag(*operator.weight.chunk(operator.groups)), operator.bias)
    if max(operator.upsampling) > 1:  # a transposed convolution with a single tap of 1 only inserts zeros
        channels = operator.weight.shape[1] * operator.groups
        x = TRANSPOSED[axes - 1](x, x.new_ones(channels, 1, *[1] * axes), stride=operator.upsampling, groups=channels)
    x = F.pad(x, [max(zeros, 0) for pair in reversed(operator.padding) for zeros in pair])
    for axis, (before, after) in enumerate(operator.padding, x.ndim - axes):  # negative padding cuts values off
        x = x.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0))
    y = CONVOLUTIONS[axes - 1](x, operator.weight, None, operator.stride, 0, operator.dilation, operator.groups) + bias
    for axis, (start, stop), values in operator.border_bias:
        index = (..., slice(start, stop), *[slice(None)] * (axes - 1 - axis))
        y[index] = y[index] + values
    return y


def close(actual, expected):
    """Assert that two float64 tensors are equal up to rounding errors."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def normal(*shape, seed):
    """Return a float64 tensor of this shape, with normally distributed random values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divisors(*numbers):
    """Return the common divisors of some numbers."""
    return [d for d in range(1, min(numbers) + 1) if not any(n % d for n in numbers)]


@st.composite
def convolutions(draw, axes, in_channels, kind=None, step=3):
    """Draw a convolution as an affine operator.

    Args:
        axes: the number of spatial axes.
        in_channels: the number of input channels.
        kind: "pointwise" (one tap and no padding, but any stride), "strided", "transposed" (with upsampling), or None for
            "strided" or "transposed".
        step: the largest stride or upsampling.
    """
    kind = kind or draw(st.sampled_from(["strided", "strided", "transposed"]))
    groups = draw(st.sampled_from(divisors(in_channels)))
    out_channels = groups * draw(st.integers(1, 3))
    kernel = [1 if kind == "pointwise" else draw(st.integers(1, 3)) for _ in range(axes)]
    dilation = [1 if kind == "pointwise" else draw(st.integers(1, 3)) for _ in range(axes)]
    steps = tuple(draw(st.integers(1, step)) for _ in range(axes))
    if kind == "transposed":
        margins = [(k - 1) * d - draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)]
        more = [draw(st.integers(0, max(u, d) - 1)) for u, d in zip(steps, dilation, strict=True)]
        padding = [(before, before + output) for before, output in zip(margins, more, strict=True)]
        stride, upsampling = (1,) * axes, steps
    else:
        sides = st.just(0) if kind == "pointwise" else st.integers(-1, 3)
        padding = [draw(st.one_of(st.tuples(sides, sides), sides)) for _ in range(axes)]
        stride, upsampling = steps, ()
    weight = normal(out_channels, in_channels // groups, *kernel, seed=draw(SEEDS))
    bias = normal(out_channels, seed=draw(SEEDS))
    scale = weight[0].numel() ** -0.5
    return AffineOperator(weight * scale, bias, stride, tuple(padding), tuple(dilation), groups, upsampling)


def size_after(operator, size):
    """Return the spatial size of the output of an operator, by the formula in PyTorch's documentation.

    Args:
        operator: the affine operator.
        size: the spatial size of the input. An axis of the output that would have a negative size has size 0.
    """
    kernel, geometry = operator.weight.shape[2:], (operator.stride, operator.padding, operator.dilation, operator.upsampling)
    numbers = zip(size, kernel, *geometry, strict=True)
    return [max(0, ((n - 1) * u + 1 + sum(p) - d * (k - 1) - 1) // s + 1) for n, k, s, p, d, u in numbers]


@st.composite
def pairs(draw, kind=None):
    """Draw two operators and an input. The second operator can be applied to the output of the first.

    Args:
        kind: the kind of both operators, as in `convolutions`. None draws one kind for both, or a kind for each.
    """
    axes = draw(st.integers(0 if kind is None else 1, 3))
    like = draw(st.sampled_from(["strided", "strided", "transposed", None])) if kind is None else kind
    first = draw(convolutions(axes, draw(st.sampled_from([1, 2, 3, 4, 6])), like))
    second = draw(convolutions(axes, first.out_channels, like))
    size = [draw(st.integers(1, 9 if axes < 3 else 5)) for _ in range(axes)]
    middle = size_after(first, size)
    assume(all(middle) and all(size_after(second, middle)))
    return first, second, normal(2, first.in_channels, *size, seed=draw(SEEDS))


def attempt(function, *arguments):
    """Call a function. Return its result and "", or None and the message of the ValueError that it raised."""
    try:
        return function(*arguments), ""
    except ValueError as error:
        return None, str(error)


@st.composite
def partners(draw, left):
    """Draw an operator whose output has the same shape as that of the operator `left`, for every input."""
    parts = []
    for axis in left.axes:
        kernel, dilation, before = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(0, 3))
        reach = (kernel - 1) * dilation
        before = reach - before if axis.upsampling > 1 else before
        after = reach - before - (axis.reach - axis.before - axis.after)
        assume(axis.upsampling == 1 or 0 <= after - before < max(axis.upsampling, dilation))
        parts.append((kernel, dilation, (before, after)))
    kernel, dilation, padding = zip(*parts, strict=True) if parts else ((), (), ())
    groups = draw(st.sampled_from(divisors(left.in_channels, left.out_channels)))
    weight = normal(left.out_channels, left.in_channels // groups, *kernel, seed=draw(SEEDS))
    scale = weight[0].numel() ** -0.5
    bias = normal(left.out_channels, seed=draw(SEEDS))
    return AffineOperator(weight * scale, bias, left.stride, padding, dilation, groups, left.upsampling)


@st.composite
def branches(draw):
    """Draw two operators whose outputs have the same shape for every input, and an input."""
    axes = draw(st.integers(0, 2))
    left = draw(convolutions(axes, draw(st.sampled_from([2, 4]))))
    right = draw(partners(left))
    size = [draw(st.integers(1, 9)) for _ in range(axes)]
    assume(all(size_after(left, size)))
    x = normal(2, left.in_channels, *size, seed=draw(SEEDS))
    return (left, right, x) if draw(st.booleans()) else (right, left, x)


def convolution(out_channels, in_channels, kernel, padding=0, groups=1, stride=1, upsampling=1, seed=0):
    """Return a 2-d convolution with random weights and biases, and a square kernel.

    Args:
        out_channels: the number of output channels.
        in_channels: the number of input channels.
        kernel: the height and width of the kernel.
        padding: the zeros on each side, or one entry per axis: a number, or a pair for before and after.
        groups: the number of groups of channels.
        stride: the stride along both axes.
        upsampling: the upsampling along both axes.
        seed: the seed of the random values.
    """
    weight = normal(out_channels, in_channels // groups, kernel, kernel, seed=seed)
    bias = normal(out_channels, seed=seed + 1)
    padding = (padding,) * 2 if isinstance(padding, int) else padding
    return AffineOperator(weight, bias, (stride,) * 2, padding, (1, 1), groups, (upsampling,) * 2)


def average(channels, *kernel, stride=None, padding=0):
    """Return average pooling as an affine operator. `kernel` is its size along each axis, and the default of `stride`."""
    axes = len(kernel)
    weight = torch.full((channels, 1, *kernel), 1 / torch.Size(kernel).numel(), dtype=torch.float64)
    return AffineOperator(weight, weight.new_zeros(channels), stride or kernel, (padding,) * axes, (1,) * axes, channels)


def channelwise(channels, seed=0):
    """Return an operator that scales and shifts each channel of an image by random numbers, as batch norm does."""
    return convolution(channels, channels, 1, groups=channels, seed=seed)


def linear_layer(out_features, in_features):
    """Return a linear layer with random weights and biases, as an operator without spatial axes."""
    return AffineOperator(normal(out_features, in_features, seed=0), normal(out_features, seed=1))
