"""Define the elements of a chain besides affine operators, and how each runs, its output shape and its cost.

A chain is a stretch of linear operators. It is a tuple of elements that are applied one after the other.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.selections import Selection

#: One step of a chain.
Element: TypeAlias = "AffineOperator | Sum | Concatenation | BorderCorrected | TapBiased | FusedPair | Flatten | Activation"

#: Elements that are applied one after the other; an empty chain returns its input.
Chain: TypeAlias = "tuple[Element, ...]"


@dataclass(frozen=True, eq=False)
class Parallel:
    """Branches that all have the same input. The output of an empty branch is the input itself."""

    branches: tuple[Chain, ...]


class Sum(Parallel):
    """The sum of the outputs of branches."""


@dataclass(frozen=True, eq=False)
class Concatenation(Parallel):
    """The outputs of branches, one behind the other along the channels.

    Attributes:
        axes: number of spatial axes, which follow the channels.
    """

    axes: int


class BorderStrip(NamedTuple):
    """A range of output positions along one spatial axis, recomputed by running a chain on a part of the input.

    All ranges are (start, stop).

    Attributes:
        axis: index of the spatial axis.
        output: the recomputed positions, counted in the whole output.
        input: the part of the input on which the chain runs.
        kept: the recomputed positions, counted in the output for that part of the input.
    """

    axis: int
    output: tuple[int, int]
    input: tuple[int, int]
    kept: tuple[int, int]


@dataclass(frozen=True, eq=False)
class BorderCorrected:
    """A merged operator that is wrong near the border, so its outputs there are recomputed by the chain that it replaces.

    Attributes:
        interior: the merged operator.
        chain: the chain.
        strips: the output positions that are recomputed.
    """

    interior: AffineOperator
    chain: Chain
    strips: tuple[BorderStrip, ...]


@dataclass(frozen=True, eq=False)
class TapBiased:
    """A merged operator with one more bias per tap of its kernel.

    The bias of a tap is added at the output positions at which the tap reads the input, and left out at those at which it
    reads padding. This makes the operator exact for inputs of every size.

    Attributes:
        operator: the merged operator without these biases.
        tap_bias: `[out_channels, *kernel]`: what the bias of the operators before the padding contributes through each tap.
    """

    operator: AffineOperator
    tap_bias: Tensor

    @property
    def mask(self) -> AffineOperator:
        """Return the operator that maps an image of ones with one channel to the sum of the tap biases at each position."""
        weight, bias = self.tap_bias.unsqueeze(1), torch.zeros_like(self.operator.bias)
        return replace(self.operator, weight=weight, bias=bias, groups=1)


@dataclass(frozen=True, eq=False)
class FusedPair:
    """Two operators that run in one kernel, which does not write the values between them to memory.

    Attributes:
        name: name of the kernel in `fastentropy_kernels`.
        first: the operator that is applied first.
        second: the operator that is applied to the output of the first.
        adds_input: whether the kernel adds its input to its output.
    """

    name: str
    first: AffineOperator
    second: AffineOperator
    adds_input: bool = False


@dataclass(frozen=True)
class Flatten:
    """Flattens channels and positions into one axis of features. It is always the last element of its chain."""


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation that may be removed. Only chains found by `find_chains(..., activations=...)` contain such elements.

    Attributes:
        name: path of the activation's module in the model. It is also the name of its site (call of an activation).
        module: the activation itself.
    """

    name: str
    module: nn.Module


class Cost(NamedTuple):
    """The number of multiplications of one call, and the number of bytes that it reads and writes."""

    multiplications: int
    bytes: int


def run(chain: Chain, x: Tensor) -> Tensor:
    """Apply the elements of a chain to x, one after the other.

    x has the shape that the first operator takes (see `AffineOperator`), and its dtype is that in which the chain runs.
    """
    for element in chain:
        x = _run_element(element, x)
    return x


def _run_element(element: Element, x: Tensor) -> Tensor:
    """Apply one element to x."""
    match element:
        case Sum(branches):
            total, *others = (run(branch, x) for branch in branches)
            for other in others:
                total = total + other
            return total
        case Concatenation(branches, axes):
            return torch.cat([run(branch, x) for branch in branches], x.ndim - axes - 1)
        case BorderCorrected(interior, chain, strips):
            y = interior(x)
            axes = len(interior.axes)
            for strip in strips:
                axis = y.ndim - axes + strip.axis
                border = run(chain, _cut(x, axis, strip.input))
                _cut(y, axis, strip.output).copy_(_cut(border, axis, strip.kept))
            return y
        case TapBiased(operator):
            channels = x.ndim - len(operator.axes) - 1
            image = x.narrow(channels, 0, 1)
            return operator(x) + element.mask(torch.ones_like(image[:1] if channels else image))
        case FusedPair(_, first, second, adds_input):
            y = second(first(x))
            return y + x if adds_input else y
        case Flatten():
            return x.flatten(1)
        case Activation(_, module):
            activated: Tensor = module(x)
            return activated
        case operator:
            return operator(x)


def _cut(x: Tensor, axis: int, positions: tuple[int, int]) -> Tensor:
    """Return a view of the positions [start, stop) of x along an axis."""
    start, stop = positions
    return x.narrow(axis, start, stop - start)


def output_shape(chain: Chain, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a chain's output for an input of the given shape."""
    for element in chain:
        match element:
            case Sum(branches):
                shape = output_shape(max(branches, key=len), shape)
            case Concatenation(branches, axes):
                shapes = [output_shape(branch, shape) for branch in branches]
                shape = (*shape[: -axes - 1], sum(each[-axes - 1] for each in shapes), *shapes[0][len(shape) - axes :])
            case BorderCorrected(interior) | TapBiased(interior):
                shape = interior.output_shape(shape)
            case FusedPair(_, first, second):
                shape = second.output_shape(first.output_shape(shape))
            case Flatten():
                shape = (shape[0], math.prod(shape[1:]))
            case Activation():
                pass
            case operator:
                shape = operator.output_shape(shape)
    return tuple(shape)


def cost(chain: Chain, shape: Sequence[int], itemsize: int) -> Cost:
    """Count the multiplications and the bytes of one call of a chain.

    Each operator reads its input and its weights, and writes its output.

    Args:
        chain: the chain.
        shape: shape of its input.
        itemsize: number of bytes per value.

    Returns:
        The sums over all elements, including those inside branches.
    """
    costs = []
    for element in chain:
        costs += list(_costs(element, shape, itemsize))
        shape = output_shape((element,), shape)
    return Cost(*map(sum, zip(*costs, strict=True))) if costs else Cost(0, 0)


def _costs(element: Element, shape: Sequence[int], itemsize: int) -> Iterator[Cost]:
    """Yield the cost of each operation of an element; the arguments are as in `cost`."""
    match element:
        case Sum(branches):
            yield from (cost(branch, shape, itemsize) for branch in branches)
            values = math.prod(output_shape((element,), shape))
            yield Cost(0, 3 * (len(branches) - 1) * values * itemsize)
        case Concatenation(branches):
            yield from (cost(branch, shape, itemsize) for branch in branches)
            yield Cost(0, 2 * math.prod(output_shape((element,), shape)) * itemsize)
        case BorderCorrected(interior, chain, strips):
            yield from _costs(interior, shape, itemsize)
            for strip in strips:
                cut = list(shape)
                cut[len(shape) - len(interior.axes) + strip.axis] = strip.input[1] - strip.input[0]
                yield cost(chain, cut, itemsize)
        case TapBiased(operator):
            yield _operator_cost(operator, shape, itemsize)
            yield _operator_cost(element.mask, (1, 1, *shape[2:]), itemsize)
        case FusedPair(_, first, second):
            one, other = _operator_cost(first, shape, itemsize), _operator_cost(second, first.output_shape(shape), itemsize)
            between = 2 * math.prod(first.output_shape(shape)) * itemsize
            yield Cost(one.multiplications + other.multiplications, one.bytes + other.bytes - between)
        case Flatten():
            return
        case Activation():
            yield Cost(0, 2 * math.prod(shape) * itemsize)
        case operator:
            yield _operator_cost(operator, shape, itemsize)


def _operator_cost(operator: AffineOperator, shape: Sequence[int], itemsize: int) -> Cost:
    """Return the cost of one operator. A bias map is added in a further pass over the output. A selection only copies."""
    output = math.prod(operator.output_shape(shape))
    if isinstance(operator, Selection):
        return Cost(0, (min(math.prod(shape), output) + output) * itemsize)
    bias_map = 2 * output + operator.bias.numel() if operator.bias.ndim > 1 else operator.bias.numel()
    for axis, (start, stop), values in operator.border_bias:
        size = operator.output_shape(shape)[axis - len(operator.axes)]
        bias_map += 2 * output * (stop - start) // size + values.numel()
    moved = math.prod(shape) + operator.weight.numel() + output + bias_map
    return Cost(operator.multiplications(shape), moved * itemsize)


def operators(chain: Chain) -> list[AffineOperator]:
    """Return all affine operators of a chain, including those inside its branches and those that recompute its borders."""
    return list(itertools.chain.from_iterable(map(_operators, chain)))


def _operators(element: Element) -> list[AffineOperator]:
    """Return all affine operators of one element; see `operators`."""
    match element:
        case Parallel(branches):
            return [operator for branch in branches for operator in operators(branch)]
        case BorderCorrected(interior, chain):
            return [interior, *operators(chain)]
        case TapBiased(operator):
            return [operator]
        case FusedPair(_, first, second):
            return [first, second]
        case Flatten() | Activation():
            return []
        case operator:
            return [operator]


def spatial_size(chain: Chain, x: Tensor) -> torch.Size:
    """Return the sizes of the spatial axes of x, an input of the chain; empty for linear layers."""
    return x.shape[x.ndim - len(operators(chain)[0].axes) :]
