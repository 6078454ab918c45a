"""Affine operators for tests, fixed and random ones, and what plain PyTorch computes from their numbers."""

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator

SEEDS = st.integers(0, 2**16)

#: PyTorch's functions for 1, 2 and 3 spatial axes.
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

#: Matches the reasons for which two operators have no composition.
NO_CONVOLUTION = "together they are no (transposed )?convolution"

#: Matches all reasons for which a chain is not merged.
REFUSALS = f"inner zero padding|{NO_CONVOLUTION}|different sizes"


def pytorch_output(operator, x):
    """Return the output of an operator as PyTorch's padding and convolutions compute it from its numbers: the oracle."""
    axes = len(operator.stride)
    bias = operator.bias if operator.bias.ndim > 1 else operator.bias.reshape(-1, *[1] * axes)
    if not axes:
        return F.linear(x, torch.block_diag(*operator.weight.chunk(operator.groups)), operator.bias)
    if max(operator.upsampling) > 1:  # a transposed convolution with one tap inserts zeros, and does nothing else
        channels = operator.weight.shape[1] * operator.groups
        x = TRANSPOSED[axes - 1](x, x.new_ones(channels, 1, *[1] * axes), stride=operator.upsampling, groups=channels)
    x = F.pad(x, [max(zeros, 0) for pair in reversed(operator.padding) for zeros in pair])
    for axis, (before, after) in enumerate(operator.padding, x.ndim - axes):  # what is negative is cut off
        x = x.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0))
    return CONVOLUTIONS[axes - 1](x, operator.weight, None, operator.stride, 0, operator.dilation, operator.groups) + bias


def close(actual, expected):
    """Assert that two float64 tensors agree up to rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def normal(*shape, seed):
    """Return normally distributed float64 values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def divisors(*numbers):
    """Return the common divisors of some numbers."""
    return [d for d in range(1, min(numbers) + 1) if not any(n % d for n in numbers)]


@st.composite
def convolutions(draw, axes, in_channels, kind=None, step=3):
    """Draw an operator that takes in_channels channels.

    kind is "pointwise" (one tap, no padding, any stride), "strided", "transposed" (with zeros between the values), or None for
    one of the latter two. step is the largest stride or upsampling.
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
    """Return the spatial size of the output by the formula of PyTorch's documentation, 0 where there is no position."""
    kernel, geometry = operator.weight.shape[2:], (operator.stride, operator.padding, operator.dilation, operator.upsampling)
    numbers = zip(size, kernel, *geometry, strict=True)
    return [max(0, ((n - 1) * u + 1 + sum(p) - d * (k - 1) - 1) // s + 1) for n, k, s, p, d, u in numbers]


@st.composite
def pairs(draw, kind=None):
    """Draw two operators of which the second takes the output of the first, and an input for which the pair has an output."""
    axes = draw(st.integers(0 if kind is None else 1, 3))
    like = draw(st.sampled_from(["strided", "strided", "transposed", None])) if kind is None else kind
    first = draw(convolutions(axes, draw(st.sampled_from([1, 2, 3, 4, 6])), like))
    second = draw(convolutions(axes, first.out_channels, like))
    size = [draw(st.integers(1, 9 if axes < 3 else 5)) for _ in range(axes)]
    middle = size_after(first, size)
    assume(all(middle) and all(size_after(second, middle)))
    return first, second, normal(2, first.in_channels, *size, seed=draw(SEEDS))


def attempt(function, *arguments):
    """Return the result of a function and an empty reason, or None and the message of the ValueError that it raised."""
    try:
        return function(*arguments), ""
    except ValueError as error:
        return None, str(error)


@st.composite
def partners(draw, left):
    """Draw an operator whose outputs have the same sizes as those of `left`."""
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
    """Draw two operators whose outputs have the same size for every input, and an input."""
    axes = draw(st.integers(0, 2))
    left = draw(convolutions(axes, draw(st.sampled_from([2, 4]))))
    right = draw(partners(left))
    size = [draw(st.integers(1, 9)) for _ in range(axes)]
    assume(all(size_after(left, size)))
    x = normal(2, left.in_channels, *size, seed=draw(SEEDS))
    return (left, right, x) if draw(st.booleans()) else (right, left, x)


def convolution(out_channels, in_channels, kernel, padding=0, groups=1, stride=1, upsampling=1, seed=0):
    """Return a 2-d convolution with a square kernel and random numbers."""
    weight = normal(out_channels, in_channels // groups, kernel, kernel, seed=seed)
    bias = normal(out_channels, seed=seed + 1)
    padding = (padding,) * 2 if isinstance(padding, int) else padding
    return AffineOperator(weight, bias, (stride,) * 2, padding, (1, 1), groups, (upsampling,) * 2)


def average(channels, *kernel, stride=None, padding=0):
    """Return average pooling over a kernel; by default its stride is the kernel."""
    axes = len(kernel)
    weight = torch.full((channels, 1, *kernel), 1 / torch.Size(kernel).numel(), dtype=torch.float64)
    return AffineOperator(weight, weight.new_zeros(channels), stride or kernel, (padding,) * axes, (1,) * axes, channels)


def channelwise(channels, seed=0):
    """Return an operator that scales and shifts each channel of an image, as batch norm does."""
    return convolution(channels, channels, 1, groups=channels, seed=seed)


def linear_layer(out_features, in_features):
    """Return a linear layer with random numbers."""
    return AffineOperator(normal(out_features, in_features, seed=0), normal(out_features, seed=1))
