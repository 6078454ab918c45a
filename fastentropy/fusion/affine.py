"""The algebra of linearised chains: affine operators that compose, add and merge into one.

An operator is a convolution written as numbers; a linear layer is a convolution without spatial axes, and a batch norm in
eval mode is a depthwise 1×1 convolution. Composition in stride and dilation follows from the input position that
tap t of output position o reads: s·o + d·t − p (Dumoulin and Visin, arXiv 1603.07285).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AffineOperator:
    """A zero-padded convolution over 0 (a linear layer), 1, 2 or 3 spatial axes.

    weight is [out_channels, in_channels / groups, *kernel]; bias is [out_channels], or [out_channels, *output_size] where it
    depends on the position. stride, padding and dilation have one entry for each spatial axis. Channels are axis 1 of the
    input, or its last axis where there is no spatial axis.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError where the parts do not belong to one operator."""
        axes = self.weight.ndim - 2
        if not len(self.stride) == len(self.padding) == len(self.dilation) == axes:
            raise ValueError(f"stride, padding and dilation must have {axes} entries each, one per kernel axis")
        if self.weight.shape[0] % self.groups:
            raise ValueError(f"{self.weight.shape[0]} output channels do not divide into {self.groups} groups")

    @property
    def kernel(self) -> tuple[int, ...]:
        """The number of taps along each spatial axis."""
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        """How many channels the input has."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """How many channels the output has."""
        return self.weight.shape[0]

    @property
    def is_channelwise(self) -> bool:
        """Whether each output channel is one input channel, scaled and shifted."""
        pointwise = all(k == 1 for k in self.kernel) and all(s == 1 for s in self.stride) and not any(self.padding)
        return pointwise and self.groups == self.in_channels == self.out_channels

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator to x: [batch, in_channels, *spatial], or [..., in_channels] without spatial axes."""
        if not self.kernel:
            return F.linear(x, self.dense_weight(), self.bias)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        bias = self.bias if self.bias.ndim > 1 else self.bias.reshape(-1, *(1,) * len(self.kernel))
        return convolution(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups) + bias

    def dense_weight(self) -> Tensor:
        """The weight [out_channels, in_channels, *kernel] of the same operator with one group."""
        return _blocks(self, 1)[0]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output for an input of that shape."""
        if not self.kernel:
            return (*shape[:-1], self.out_channels)
        axes = len(self.kernel)
        taps = zip(shape[-axes:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        size = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in taps)
        return (*shape[: -axes - 1], self.out_channels, *size)


@dataclass(frozen=True, eq=False)
class Sum:
    """Branches that start at the same value and are added; an empty branch is the value itself."""

    branches: tuple["Chain", ...]


Chain = tuple[AffineOperator | Sum, ...]


def identity(channels: int, like: AffineOperator) -> AffineOperator:
    """The operator that returns its input, with as many spatial axes as `like`, in its dtype and on its device."""
    axes = len(like.kernel)
    weight = like.weight.new_ones((channels, 1) + (1,) * axes)
    return AffineOperator(weight, like.bias.new_zeros(channels), (1,) * axes, (0,) * axes, (1,) * axes, channels)


def compose(first: AffineOperator, second: AffineOperator) -> AffineOperator:
    """The operator x -> second(first(x)).

    Equal to the pair wherever no tap of `second` falls into its own padding. Elsewhere it adds the bias of `first` once too
    often for each such tap, and that is all where `borders_agree(first, second)`.
    Groups are kept as far as both have them: the result has gcd(first.groups, second.groups).
    """
    if first.out_channels != second.in_channels or len(first.kernel) != len(second.kernel):
        raise ValueError(f"{_describe(second)} cannot follow {_describe(first)}")
    groups = math.gcd(first.groups, second.groups)
    spacing = [s * d for s, d in zip(first.stride, second.dilation, strict=True)]
    dilation = tuple(_common_step(*taps) for taps in zip(first.kernel, first.dilation, second.kernel, spacing, strict=True))
    extent = [
        ((k1 - 1) * d1 + (k2 - 1) * d2) // step + 1
        for k1, d1, k2, d2, step in zip(first.kernel, first.dilation, second.kernel, spacing, dilation, strict=True)
    ]
    weight = first.weight.new_zeros((second.out_channels, first.in_channels // groups, *extent))
    for tap in itertools.product(*map(range, second.kernel)):
        at_tap: Any = (..., *tap)
        offset = [t * d // step for t, d, step in zip(tap, spacing, dilation, strict=True)]
        weight[_window(first, offset, dilation)] += _multiply(first, second.weight[at_tap], second.groups)
    summed = second.weight.reshape(second.groups, second.out_channels // second.groups, second.weight.shape[1], -1).sum(-1)
    through = torch.einsum("gom,gm->go", summed, first.bias.reshape(second.groups, -1))
    return AffineOperator(
        weight,
        second.bias + through.flatten(),
        tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True)),
        tuple(p1 + p2 * s1 for p1, p2, s1 in zip(first.padding, second.padding, first.stride, strict=True)),
        dilation,
        groups,
    )


def add(left: AffineOperator, right: AffineOperator) -> AffineOperator:
    """The operator x -> left(x) + right(x), exact at every position.

    Raises ValueError where the two do not give outputs of one size for every input size.
    """
    margins = [
        tuple((k - 1) * d - 2 * p for k, d, p in zip(o.kernel, o.dilation, o.padding, strict=True)) for o in (left, right)
    ]
    channels_agree = left.in_channels == right.in_channels and left.out_channels == right.out_channels
    if not channels_agree or left.stride != right.stride or margins[0] != margins[1]:
        raise ValueError(f"{_describe(left)} and {_describe(right)} give outputs of different sizes and cannot be added")
    groups = math.gcd(left.groups, right.groups)
    padding = tuple(map(max, left.padding, right.padding))
    dilation = tuple(
        math.gcd(_common_step(k1, d1, k2, d2, default=0), p1 - p2) or 1
        for k1, d1, k2, d2, p1, p2 in zip(
            left.kernel, left.dilation, right.kernel, right.dilation, left.padding, right.padding, strict=True
        )
    )
    extent = [(margin + 2 * p) // step + 1 for margin, p, step in zip(margins[0], padding, dilation, strict=True)]
    blocks = [_blocks(operator, groups) for operator in (left, right)]
    weight = blocks[0].new_zeros((*blocks[0].shape[:3], *extent))
    for operator, block in zip((left, right), blocks, strict=True):
        offset = [(p - own) // step for p, own, step in zip(padding, operator.padding, dilation, strict=True)]
        weight[_window(operator, offset, dilation)] += block
    return AffineOperator(weight.flatten(0, 1), left.bias + right.bias, left.stride, padding, dilation, groups)


def borders_agree(first: AffineOperator, second: AffineOperator) -> bool:
    """Whether `compose(first, second)` is linear in the input as the pair is, at the borders too.

    The zeros that `second` pads with stand for first(x) outside of the image. Where `first` is pointwise and unpadded, its
    linear part maps the zeros outside of x to just these, and only its bias differs there.
    """
    return all(p2 == 0 or (k1 == 1 and p1 == 0) for k1, p1, p2 in zip(first.kernel, first.padding, second.padding, strict=True))


def run(chain: Chain, x: Tensor) -> Tensor:
    """Apply the elements of a chain one after the other."""
    for element in chain:
        x = sum_branches(element, x) if isinstance(element, Sum) else element(x)
    return x


def sum_branches(element: Sum, x: Tensor) -> Tensor:
    """Apply each branch to x and add the results."""
    first, *others = (run(branch, x) for branch in element.branches)
    for other in others:
        first = first + other
    return first


def output_shape(chain: Chain, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a chain's output for an input of that shape."""
    for element in chain:
        branch = max(element.branches, key=len) if isinstance(element, Sum) else ()
        shape = output_shape(branch, shape) if isinstance(element, Sum) else element.output_shape(shape)
    return tuple(shape)


def multiplications(chain: Chain, shape: Sequence[int]) -> int:
    """How many multiplications a chain costs for an input of that shape."""
    total = 0
    for element in chain:
        if isinstance(element, Sum):
            total += sum(multiplications(branch, shape) for branch in element.branches)
        else:
            total += math.prod(element.output_shape(shape)) * math.prod(element.weight.shape[1:])
        shape = output_shape((element,), shape)
    return total


def operators(chain: Chain) -> list[AffineOperator]:
    """All operators of a chain, those of its branches included."""
    return [
        operator
        for element in chain
        for operator in (
            [o for branch in element.branches for o in operators(branch)] if isinstance(element, Sum) else [element]
        )
    ]


def merge(chain: Chain, spatial_size: Sequence[int]) -> AffineOperator:
    """One operator for the whole chain, equal to it at every position for inputs of that spatial size.

    Its bias is what the chain answers to zeros; near a border that can differ from place to place.
    Raises ValueError, with the reason, where no single operator is exact.
    """
    merged = _compose_all(chain)
    if not merged.kernel:
        return merged
    response = run(chain, merged.bias.new_zeros((1, merged.in_channels, *spatial_size)))[0]
    interior = merged.bias.reshape(-1, *(1,) * len(spatial_size)).expand_as(response)
    return merged if torch.allclose(response, interior, rtol=1e-12, atol=1e-12) else replace(merged, bias=response)


def fold(chain: Chain) -> Chain:
    """Compose every operator that only scales and shifts channels (a batch norm) with its neighbour, where that is exact."""
    folded: list[AffineOperator | Sum] = []
    for element in chain:
        previous = folded[-1] if folded else None
        if isinstance(element, Sum):
            folded.append(Sum(tuple(fold(branch) for branch in element.branches)))
        elif isinstance(previous, AffineOperator) and _folds(previous, element):
            folded[-1] = compose(previous, element)
        else:
            folded.append(element)
    return tuple(folded)


def _folds(first: AffineOperator, second: AffineOperator) -> bool:
    return second.is_channelwise or (first.is_channelwise and not any(second.padding))


def _compose_all(chain: Chain) -> AffineOperator:
    merged, *others = (_add_all(element) if isinstance(element, Sum) else element for element in chain)
    for operator in others:
        if not borders_agree(merged, operator):
            raise ValueError("inner zero padding: one operator would differ in a ring at the border")
        merged = compose(merged, operator)
    return merged


def _add_all(element: Sum) -> AffineOperator:
    branches = [_compose_all(branch) if branch else None for branch in element.branches]
    like = next(operator for operator in branches if operator is not None)
    total, *others = (identity(like.in_channels, like) if operator is None else operator for operator in branches)
    for other in others:
        total = add(total, other)
    return total


def _multiply(first: AffineOperator, matrix: Tensor, matrix_groups: int) -> Tensor:
    """The weight of `first` behind a grouped matrix [out, middle / matrix_groups]: [out, in / gcd of the groups, *kernel].

    What is zero because of the groups is neither stored nor multiplied, so that depthwise convolutions stay small.
    """
    groups = math.gcd(first.groups, matrix_groups)
    if first.groups == groups:
        inner = first.weight.reshape(matrix_groups, -1, *first.weight.shape[1:])
        outer = matrix.reshape(matrix_groups, -1, matrix.shape[1])
        return torch.einsum("gom,gmi...->goi...", outer, inner).flatten(0, 1)
    parts = first.groups // groups
    outer = _blocks(AffineOperator(matrix, matrix[:, 0], groups=matrix_groups), groups)
    outer = outer.reshape(groups, outer.shape[1], parts, -1)
    inner = first.weight.reshape(groups, parts, -1, *first.weight.shape[1:])
    return torch.einsum("gopm,gpmi...->gopi...", outer, inner).flatten(2, 3).flatten(0, 1)


def _blocks(operator: AffineOperator, groups: int) -> Tensor:
    """The weight as [groups, out / groups, in / groups, *kernel], for a number of groups that divides the operator's own."""
    ratio = operator.groups // groups
    out, in_ = operator.out_channels // operator.groups, operator.weight.shape[1]
    own = operator.weight.reshape(groups, ratio, out, in_, *operator.kernel)
    diagonal = torch.eye(ratio, dtype=own.dtype, device=own.device)
    return torch.einsum("gaoi...,ab->gaobi...", own, diagonal).reshape(groups, ratio * out, ratio * in_, *operator.kernel)


def _common_step(k1: int, d1: int, k2: int, d2: int, default: int = 1) -> int:
    """The largest dilation on whose grid lie the taps of both kernels; `default` where both have one tap."""
    return math.gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0) or default


def _window(operator: AffineOperator, offset: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """The index of an operator's taps on the grid of a merged kernel, from an offset on."""
    taps = (
        slice(start, start + (k - 1) * d // step + 1, d // step if k > 1 else 1)
        for start, k, d, step in zip(offset, operator.kernel, operator.dilation, dilation, strict=True)
    )
    return (..., *taps)


def _describe(operator: AffineOperator) -> str:
    kernel = "×".join(map(str, operator.kernel))
    name = f"a {kernel} convolution" if kernel else "a linear layer"
    return f"{name} from {operator.in_channels} to {operator.out_channels} channels (stride {operator.stride})"
