"""Find the positions near the border at which a merged operator differs from its chain, and correct them.

A chain is a stretch of linear operators. The merged operator is the single operator composed from them (`affine.compose`).
The two treat zero padding inside the chain differently. If an operator of the chain reads its own padding, it reads zeros. In
the merged operator, these zeros are replaced by the values that the preceding operators would compute outside of the image.

If these values are only a bias, the merged operator needs another bias at the affected output positions (see `bias_maps`).
Otherwise the affected outputs are recomputed with the chain (`border_strips`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import BorderStrip, Chain, Parallel, operators
from fastentropy.fusion.chains.geometry import Axis
from fastentropy.fusion.chains.selections import Selection

#: The number of output positions behind the border that show how a form of a chain computes all others.
INTERIOR = 8


class ValidRange(NamedTuple):
    """The positions along one spatial axis at which a merged operator computes the same value as its chain.

    The value is the output of the chain, or an intermediate value of it. The merged operator is evaluated as if every
    operator of the chain also computed outputs outside of the image.

    Attributes:
        start: the first exact position.
        stop: the position after the last exact one.
        size: number of all positions.
        zero_before: whether the merged operator computes zeros at the positions before 0, as the next padding assumes.
        zero_after: whether the merged operator computes zeros at the positions from `size` on.
    """

    start: int
    stop: int
    size: int
    zero_before: bool = True
    zero_after: bool = True

    @property
    def is_everything(self) -> bool:
        """Return whether the merged operator is exact at every position."""
        return self.start <= 0 and self.stop >= self.size


def valid_range(chain: Chain, axis: int, size: int, *, zero_input: bool = False) -> ValidRange:
    """Return the output positions at which the merged operator of a chain equals the chain.

    Args:
        chain: operators with spatial axes, and sums and concatenations of them.
        axis: index of the spatial axis.
        size: number of input positions along the axis.
        zero_input: compare the outputs for an input of zeros, which come from the biases alone. By default the biases are
            ignored: at the returned positions the two outputs may differ by a constant, the same for every input.

    Returns:
        The range of the output.
    """
    return _propagate(chain, axis, ValidRange(0, size, size), zero_input)


def _propagate(chain: Chain, axis: int, valid: ValidRange, zero_input: bool) -> ValidRange:
    """Return the range of the output of a chain, given the range of its input; see `valid_range`."""
    for element in chain:
        if isinstance(element, Parallel):
            ends = [_propagate(branch, axis, valid, zero_input) for branch in element.branches]
            valid = ValidRange(
                max(end.start for end in ends),
                min(end.stop for end in ends),
                ends[0].size,
                all(end.zero_before for end in ends),
                all(end.zero_after for end in ends),
            )
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            if zero_input:  # for a zero input, all values are zero until a bias is added
                stays_zero = [not element.bias.any()] * 2
            else:
                stays_zero = [margin >= own.reach for margin in (own.before, own.after)]
            if isinstance(element, Selection) and element.repeats:
                valid = _repeated(valid, own.upsampling)
            else:
                valid = _propagate_operator(own, valid, *stays_zero)
    return valid


def _repeated(valid: ValidRange, factor: int) -> ValidRange:
    """Return the range of a value whose positions are repeated `factor` times."""
    start, stop, size = (factor * position for position in valid[:3])
    return valid._replace(start=start, stop=stop, size=size)


def _propagate_operator(axis: Axis, valid: ValidRange, stays_zero_before: bool, stays_zero_after: bool) -> ValidRange:
    """Return the range of the outputs of one operator that read exact input positions only.

    Args:
        axis: the geometry of the operator.
        valid: the range of its input.
        stays_zero_before: whether its outputs before position 0 are zero if its inputs before position 0 are zero.
        stays_zero_after: the same for the positions after the last one.
    """
    stuffed = (valid.size - 1) * axis.upsampling + 1
    first = (valid.start - 1) * axis.upsampling + 1 if valid.start else (None if valid.zero_before else 0)
    last = valid.stop * axis.upsampling if valid.stop < valid.size else (None if valid.zero_after else stuffed)
    size = axis.output_size(valid.size)
    start = 0 if first is None else -(-(first + axis.before) // axis.stride)
    stop = size if last is None else -(-(last + axis.before - axis.reach) // axis.stride)
    return ValidRange(
        min(max(start, 0), size),
        min(max(stop, 0), size),
        size,
        valid.zero_before and stays_zero_before,
        valid.zero_after and stays_zero_after,
    )


def differs_at_border(chain: Chain, axis: int, *, zero_input: bool) -> bool:
    """Return whether the merged operator of a chain differs from the chain near the borders of large inputs.

    Args:
        chain: operators with spatial axes, and sums and concatenations of them.
        axis: index of the spatial axis.
        zero_input: compare the outputs for an input of zeros, which come from the biases alone; by default the biases are
            ignored. See `valid_range`.
    """
    period = _stride(chain, axis)
    ranges = (valid_range(chain, axis, size, zero_input=zero_input) for size in range(1 << 20, (1 << 20) + period))
    return not all(valid.is_everything for valid in ranges)


class SmallerSize(NamedTuple):
    """An input size along an axis whose output for an input of zeros has the same borders as that of a larger size.

    Attributes:
        size: the input size.
        positions: for each output position of the larger size, the position of the equal value: int64.
        interior: the position of the value that is repeated, or None if the two sizes are the same.
    """

    size: int
    positions: Tensor
    interior: int | None


def smaller_size(chain: Chain, axis: int, size: int) -> SmallerSize:
    """Return the smallest input size along an axis whose output for zeros has the same borders as that of `size`.

    If no smaller size will do, this is `size` itself.
    """
    period = _stride(chain, axis)
    output = _output_size(chain, axis, size)
    if all(operator.axes[axis].upsampling == 1 for operator in operators(chain)):
        for smaller in range(size % period or period, size, period):
            start, stop, length = valid_range(chain, axis, smaller, zero_input=True)[:3]
            if _output_size(chain, axis, smaller) and start < stop:
                before, after = torch.arange(start, device="cpu"), torch.arange(stop, length, device="cpu")
                inside = torch.full((output - len(before) - len(after),), start, device="cpu")
                kept = torch.cat([before, inside, after])
                return SmallerSize(smaller, kept, start)
    return SmallerSize(size, torch.arange(output, device="cpu"), None)


def _stride(chain: Chain, axis: int) -> int:
    """Return the product of all strides along an axis.

    Two input sizes that differ by a multiple of this product have the same borders.
    """
    return math.prod(operator.axes[axis].stride for operator in operators(chain))


def border_strips(chain: Chain, spatial_size: Sequence[int]) -> tuple[BorderStrip, ...]:
    """Return the strips along the borders in which a merged operator differs from its chain by more than a bias.

    Args:
        chain: operators with spatial axes, and sums and concatenations of them.
        spatial_size: size of the input along each spatial axis.

    Returns:
        At most two strips per spatial axis. Each strip says which outputs are recomputed, and from which part of the input.

    Raises:
        ValueError: the merged operator is exact at no position of some axis.
    """
    strips = []
    for axis, size in enumerate(spatial_size):
        start, stop, output = valid_range(chain, axis, size)[:3]
        if (start or stop < output) and start >= stop:
            raise ValueError("inner zero padding: one operator would be wrong at every position of so small an input")
        if start:
            strips.append(_leading_strip(chain, axis, size, start))
        if stop < output:
            strips.append(_trailing_strip(chain, axis, size, stop, output))
    return tuple(strips)


def border_parts(chain: Chain, axis: int, size: int) -> tuple[BorderStrip, ...]:
    """Return the two ends of a spatial axis, each with some of the interior.

    Nothing is returned if the two would take no less work than the whole axis.

    Args:
        chain: operators with spatial axes, and their parallel branches.
        axis: index of the spatial axis.
        size: number of input positions along the axis.
    """
    output = _output_size(chain, axis, size)
    ranges = [valid_range(chain, axis, size, zero_input=zero_input) for zero_input in (False, True)]
    some = max(INTERIOR, math.prod(operator.axes[axis].upsampling for operator in operators(chain)))
    stop = max(valid.start for valid in ranges) + some
    start = min(valid.stop for valid in ranges) - some
    if not 0 < stop < start < output:
        return ()
    parts = _leading_strip(chain, axis, size, stop), _trailing_strip(chain, axis, size, start, output)
    return parts if sum(part.input[1] - part.input[0] for part in parts) < size else ()


def _leading_strip(chain: Chain, axis: int, size: int, stop: int) -> BorderStrip:
    """Return the strip of the outputs [0, stop), with the smallest part of the input that suffices to recompute them.

    `size` is the number of input positions along the axis.
    """
    needed = min(max(_last_read(chain, axis, stop - 1) + 1, 1), size)
    while needed < size and _output_size(chain, axis, needed) < stop:
        needed += 1
    return BorderStrip(axis, (0, stop), (0, needed), (0, stop))


def _trailing_strip(chain: Chain, axis: int, size: int, start: int, output: int) -> BorderStrip:
    """Return the strip of the outputs [start, output), with the part of the input from which they are recomputed.

    That part begins at a multiple of the chain's stride, because its outputs must fall on the positions of the whole output.
    `size` and `output` are the numbers of input and output positions along the axis.
    """
    stride = _stride(chain, axis)
    begin = min(max(_first_read(chain, axis, start), 0), size - 1) // stride * stride
    while begin and _output_size(chain, axis, size - begin) < output - start:
        begin -= stride
    length = _output_size(chain, axis, size - begin)
    return BorderStrip(axis, (start, output), (begin, size), (length - (output - start), length))


def _output_size(chain: Chain, axis: int, size: int) -> int:
    """Return the number of output positions for an input with `size` positions; 0 if an intermediate value would be empty."""
    for element in chain:
        if isinstance(element, Parallel):
            size = min(_output_size(branch, axis, size) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            size = max(element.axes[axis].output_size(size), 0) if size else 0
    return size


def _last_read(chain: Chain, axis: int, position: int) -> int:
    """Return the last input position that the chain needs in order to compute an output position exactly.

    Positions outside of the input are possible.
    """
    for element in reversed(chain):
        if isinstance(element, Parallel):
            position = max(_last_read(branch, axis, position) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            position = -(-(own.stride * position + own.reach - own.before - min(own.after, 0)) // own.upsampling)
    return position


def _first_read(chain: Chain, axis: int, position: int) -> int:
    """Return the first input position that the chain needs in order to compute an output position exactly.

    Positions outside of the input are possible.
    """
    for element in reversed(chain):
        if isinstance(element, Parallel):
            position = min(_first_read(branch, axis, position) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            position = (own.stride * position - max(own.before, 0)) // own.upsampling
    return position
