"""Hypothesis strategies for random chains of affine operators, and their outputs as computed by plain PyTorch.

A chain is a tuple of elements that are applied one after the other: affine operators (convolutions, batch norm, average
pooling, linear layers), sums of branches, and flattening. The argument `axes` is the number of spatial axes of its values.
"""

from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Concatenation, Flatten, Sum, operators
from fastentropy.fusion.chains.selections import (
    Selection,
    pixel_shuffle,
    pixel_unshuffle,
    repeated_positions,
    selected_channels,
)
from tests._helpers.operators import (
    SEEDS,
    average,
    convolutions,
    divisors,
    normal,
    partners,
    pytorch_output,
    size_after,
)


def pytorch_chain(chain, x):
    """Return the output of a chain, computed from its weights by plain PyTorch. It is the expected value of the tests."""
    for element in chain:
        if isinstance(element, Sum):
            x = sum(pytorch_chain(branch, x) for branch in element.branches)
        elif isinstance(element, Concatenation):
            x = torch.cat([pytorch_chain(branch, x) for branch in element.branches], x.ndim - element.axes - 1)
        else:
            x = x.flatten(1) if isinstance(element, Flatten) else pytorch_output(element, x)
    return x


@st.composite
def batch_norms(draw, channels, axes):
    """Draw a batch norm in eval mode, with small and large variances, means far from zero, and weights of both signs."""
    seed = draw(SEEDS)
    mean, weight, bias = (normal(channels, seed=seed + index) * by for index, by in enumerate((3, 1, 1)))
    scale = weight / (normal(channels, seed=seed + 3).exp() + 1e-5).sqrt()
    return AffineOperator(scale.reshape(-1, 1, *[1] * axes), bias - mean * scale, *_unit_geometry(axes), channels)


def _unit_geometry(axes):
    """Return the stride, padding and dilation of an operator without any of them: ones, zeros and ones."""
    return (1,) * axes, (0,) * axes, (1,) * axes


@st.composite
def same_convolutions(draw, in_channels, out_channels, axes):
    """Draw a convolution that keeps the spatial size. Its padding is distributed over the two sides at random."""
    kernel, dilation = (tuple(draw(st.integers(1, most)) for _ in range(axes)) for most in (3, 2))
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    before = [draw(st.one_of(st.just(r // 2), st.integers(0, r))) for r in reach]
    padding = tuple((b, r - b) for b, r in zip(before, reach, strict=True))
    groups = draw(st.sampled_from(divisors(in_channels, out_channels)))
    weight = normal(out_channels, in_channels // groups, *kernel, seed=draw(SEEDS))
    bias = normal(out_channels, seed=draw(SEEDS))
    return AffineOperator(weight / weight[0].numel() ** 0.5, bias, (1,) * axes, padding, dilation, groups)


@st.composite
def residuals(draw, channels, axes, depth=1):
    """Draw a sum of two or three branches, all of which keep the shape of their input. One of them may be the identity.

    Args:
        channels: the number of channels of the input and the output.
        axes: the number of spatial axes.
        depth: how deeply sums may be nested: 1 allows sums inside the branches, 0 allows none.
    """
    paths = []
    for _ in range(draw(st.integers(1, 2))):
        path, width = [], channels
        for _ in range(draw(st.integers(0, 2))):
            kind = draw(st.sampled_from(["convolution", "batch norm", "residual"] if depth else ["convolution"]))
            if kind == "residual":
                path.append(draw(residuals(width, axes, depth - 1)))
            elif kind == "batch norm":
                path.append(draw(batch_norms(width, axes)))
            else:
                path.append(draw(same_convolutions(width, width := draw(st.integers(1, 4)), axes)))
        paths.append((*path, draw(same_convolutions(width, channels, axes))))
    if len(paths) == 1 or draw(st.booleans()):
        paths.insert(draw(st.integers(0, len(paths))), ())
    return Sum(tuple(paths))


@st.composite
def average_pools(draw, channels, axes):
    """Draw average pooling. Its padding is at most half of the kernel, because PyTorch allows no more."""
    kernel, stride = (tuple(draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(2))
    pool = average(channels, *kernel, stride=stride)
    return replace(pool, padding=tuple(draw(st.integers(0, k // 2)) for k in kernel))


@st.composite
def concatenations(draw, channels, axes):
    """Draw a concatenation of two or three branches, all of which keep the spatial size. One may be the identity."""
    count = draw(st.integers(2, 3))
    paths = [(draw(same_convolutions(channels, draw(st.integers(1, 3)), axes)),) for _ in range(count)]
    if draw(st.booleans()):
        paths[draw(st.integers(1, count - 1))] = ()
    if draw(st.booleans()):
        paths[0] = (draw(selections(channels, axes, kinds=("channels",))),)
    return Concatenation(tuple(paths), axes)


@st.composite
def selections(draw, channels, axes, kinds=("channels", "repeat", "unshuffle", "shuffle")):
    """Draw a selection: some of the channels, repeated positions, or pixels that become channels or come from channels.

    Args:
        channels: the number of channels of its input.
        axes: the number of spatial axes.
        kinds: the kinds to draw from. A kind that these channels or axes do not allow becomes "channels".
    """
    kind, cpu = draw(st.sampled_from(kinds)), torch.device("cpu")
    if kind == "repeat" and axes:
        return repeated_positions(channels, [draw(st.integers(1, 3)) for _ in range(axes)], cpu)
    if kind == "unshuffle" and axes == 2:
        return pixel_unshuffle(channels, draw(st.integers(2, 3)), cpu)
    if kind == "shuffle" and axes == 2 and channels % 4 == 0:
        return pixel_shuffle(channels // 4, 2, cpu)
    index = draw(st.lists(st.integers(0, channels - 1), min_size=1, max_size=6))
    return selected_channels(torch.tensor(index), channels, axes)


@st.composite
def elements(draw, channels, axes, kinds):
    """Draw one element of a chain.

    Args:
        channels: the number of channels of its input.
        axes: the number of spatial axes.
        kinds: the kinds to draw from, out of `STRIDED` and `TRANSPOSED`.
    """
    kind = draw(st.sampled_from(kinds))
    if kind in ("strided", "pointwise", "transposed"):
        return draw(convolutions(axes, channels, kind, step=2))
    if kind == "same":
        return draw(same_convolutions(channels, draw(st.integers(1, 4)), axes))
    if kind == "batch norm":
        return draw(batch_norms(channels, axes))
    if kind == "selection":
        return draw(selections(channels, axes))
    if kind == "concatenation":
        return draw(concatenations(channels, axes))
    if kind == "pool":
        return draw(average_pools(channels, axes))
    if kind == "downsample":
        left = draw(convolutions(axes, channels, "strided", step=2))
        return Sum(((left,), (draw(partners(left)),)))
    return draw(residuals(channels, axes))


#: The kinds of elements of three sorts of chains: those with strides, those with transposed convolutions, which insert zeros
#: between the values, and those with selections and concatenations.
STRIDED = ("strided", "same", "pointwise", "batch norm", "residual", "pool", "downsample")
TRANSPOSED = ("transposed", "same", "batch norm", "residual")
SELECTING = ("selection", "selection", "concatenation", "same", "pointwise", "strided", "batch norm", "residual")


@st.composite
def chains(draw, shortest=2, longest=5, kinds=None, largest=(14, 14, 5), flatten=True, batch=2, most_axes=3):
    """Draw a chain, an input, and the output that plain PyTorch computes.

    Args:
        shortest: the least number of elements.
        longest: the largest number of elements, without those that `flatten` adds.
        kinds: the kinds of elements. None draws strided, transposed or mixed kinds.
        largest: the largest spatial size of an input along each axis, for 1, 2 and 3 spatial axes. The smallest is 1.
        flatten: whether the chain may end with a convolution over all positions and a flattening, as in a classifier.
        batch: the batch size of the input.
        most_axes: the largest number of spatial axes.
    """
    axes = draw(st.integers(1, most_axes))
    kinds = kinds or draw(st.sampled_from([STRIDED, STRIDED, STRIDED, TRANSPOSED, STRIDED + TRANSPOSED]))
    size = [draw(st.integers(1, largest[axes - 1])) for _ in range(axes)]
    x = y = normal(batch, draw(st.integers(1, 4)), *size, seed=draw(SEEDS))
    chain = []
    for _ in range(draw(st.integers(shortest, longest))):
        element = draw(elements(y.shape[1], axes, kinds))
        if isinstance(element, AffineOperator) and element.is_average and any(map(int.__lt__, y.shape[2:], element.kernel)):
            element = draw(batch_norms(y.shape[1], axes))  # PyTorch has no pools that are larger than the value
        if isinstance(element, Selection) and not all(size_after(element, y.shape[2:])):
            element = draw(batch_norms(y.shape[1], axes))
        if isinstance(element, AffineOperator) and not all(size_after(element, y.shape[2:])):
            wide = tuple((k - 1) * d for k, d in zip(element.kernel, element.dilation, strict=True))
            element = replace(element, padding=wide)
        if isinstance(element, Sum) and not all(size_after(operators((element,))[0], y.shape[2:])):
            element = draw(residuals(y.shape[1], axes))
        chain.append(element)
        y = pytorch_chain((element,), y)
        assume(y.numel() < 2**15)
    if flatten and y[0].numel() < 512 and draw(st.sampled_from([False, False, True])):
        features = draw(st.integers(1, 3))
        weight = normal(features, *y.shape[1:], seed=draw(SEEDS)) / y[0].numel() ** 0.5
        chain[-1:] += [AffineOperator(weight, normal(features, seed=draw(SEEDS)), *_unit_geometry(axes)), Flatten()]
        y = pytorch_chain(chain[-2:], y)
    return tuple(chain), x, y
