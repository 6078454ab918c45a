"""Where a merged operator differs from its chain near the border, and by how much.

Zero padding inside a chain is not the zero padding of the merged operator. Where an operator reads its own padding, the chain
reads zeros, and the merged operator reads what the operators before would compute there. If that is only their bias, the
merged operator needs another bias at these positions (`zero_response`); otherwise they are recomputed (`border_strips`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator, Axis
from fastentropy.fusion.chains.elements import BorderStrip, Chain, Sum, operators, run


class ValidRange(NamedTuple):
    """The positions of a value, along one spatial axis, at which a merged operator is right.

    Attributes:
        start: the first of these positions.
        stop: the first position behind them.
        size: number of all positions of the value.
        zero_before: whether the merged operator computes zeros before the first position, as padding has them.
        zero_after: whether it computes zeros behind the last position.
    """

    start: int
    stop: int
    size: int
    zero_before: bool = True
    zero_after: bool = True

    @property
    def is_everything(self) -> bool:
        """Return whether the merged operator is right at every position."""
        return self.start <= 0 and self.stop >= self.size


def valid_range(chain: Chain, axis: int, size: int, *, zero_input: bool = False) -> ValidRange:
    """Return the output positions at which the merged operator equals the chain, for inputs of that size along an axis.

    By default biases are ignored: at these positions the two may differ by a constant, which is the same for every input.
    With `zero_input` only the biases count: at these positions the output for zeros is the same as far from the borders.
    """
    return _propagate(chain, axis, ValidRange(0, size, size), zero_input)


def _propagate(chain: Chain, axis: int, valid: ValidRange, zero_input: bool) -> ValidRange:
    for element in chain:
        if isinstance(element, Sum):
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
            valid = _propagate_operator(own, valid, *stays_zero)
    return valid


def _propagate_operator(axis: Axis, valid: ValidRange, stays_zero_before: bool, stays_zero_after: bool) -> ValidRange:
    """Return the range of the outputs that read valid positions only."""
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
    """Return whether the merged operator differs from the chain near the borders of large inputs.

    `zero_input` is as in `valid_range`: with it the biases alone are compared, without it everything else.
    """
    period = _stride(chain, axis)
    ranges = (valid_range(chain, axis, size, zero_input=zero_input) for size in range(1 << 20, (1 << 20) + period))
    return not all(valid.is_everything for valid in ranges)


def zero_response(chain: Chain, spatial_size: Sequence[int]) -> Tensor:
    """Return the output of a chain with spatial axes for zeros of that size: [out_channels, *output_size].

    Away from the borders the output is constant. The chain therefore runs on a smaller input, and its output is stretched.
    """
    first = operators(chain)[0]
    pairs = [_smaller_size(chain, axis, size) for axis, size in enumerate(spatial_size)]
    response = run(chain, first.bias.new_zeros((1, first.in_channels, *(size for size, _ in pairs))))[0]
    for axis, (_, positions) in enumerate(pairs, 1):
        response = response.index_select(axis, positions.to(response.device))
    return response


def _smaller_size(chain: Chain, axis: int, size: int) -> tuple[int, Tensor]:
    """Return the smallest size with the same borders, and for each output of `size` the equal output of the smaller size."""
    period = _stride(chain, axis)
    output = _output_size(chain, axis, size)
    if all(operator.axes[axis].upsampling == 1 for operator in operators(chain)):
        for smaller in range(size % period or period, size, period):
            start, stop, length = valid_range(chain, axis, smaller, zero_input=True)[:3]
            if _output_size(chain, axis, smaller) and start < stop:
                before, after = torch.arange(start), torch.arange(stop, length)
                inside = torch.full((output - len(before) - len(after),), start)
                return smaller, torch.cat([before, inside, after])
    return size, torch.arange(output)


def _stride(chain: Chain, axis: int) -> int:
    """Return the product of all strides along an axis: sizes that differ by a multiple of it have the same borders."""
    return math.prod(operator.axes[axis].stride for operator in operators(chain))


def border_strips(chain: Chain, spatial_size: Sequence[int]) -> tuple[BorderStrip, ...]:
    """Return the strips along the borders where a merged operator differs from the chain by more than its bias.

    Raises:
        ValueError: no position is left between the strips.
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


def _leading_strip(chain: Chain, axis: int, size: int, stop: int) -> BorderStrip:
    """Return the strip of outputs [0, stop), with the least part of the input that they need."""
    needed = min(max(_last_read(chain, axis, stop - 1) + 1, 1), size)
    while needed < size and _output_size(chain, axis, needed) < stop:
        needed += 1
    return BorderStrip(axis, (0, stop), (0, needed), (0, stop))


def _trailing_strip(chain: Chain, axis: int, size: int, start: int, output: int) -> BorderStrip:
    """Return the strip of outputs [start, output); its input begins at a multiple of the stride, to keep positions aligned."""
    stride = _stride(chain, axis)
    begin = min(max(_first_read(chain, axis, start), 0), size - 1) // stride * stride
    while begin and _output_size(chain, axis, size - begin) < output - start:
        begin -= stride
    length = _output_size(chain, axis, size - begin)
    return BorderStrip(axis, (start, output), (begin, size), (length - (output - start), length))


def _output_size(chain: Chain, axis: int, size: int) -> int:
    """Return the number of outputs for an input of that size, or 0 if a value inside of the chain has no position."""
    for element in chain:
        if isinstance(element, Sum):
            size = min(_output_size(branch, axis, size) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            size = max(element.axes[axis].output_size(size), 0) if size else 0
    return size


def _last_read(chain: Chain, axis: int, position: int) -> int:
    """Return the last input position that an output position needs to exist and to be right."""
    for element in reversed(chain):
        if isinstance(element, Sum):
            position = max(_last_read(branch, axis, position) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            position = -(-(own.stride * position + own.reach - own.before - min(own.after, 0)) // own.upsampling)
    return position


def _first_read(chain: Chain, axis: int, position: int) -> int:
    """Return the first input position that an output position needs to exist and to be right."""
    for element in reversed(chain):
        if isinstance(element, Sum):
            position = min(_first_read(branch, axis, position) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            position = (own.stride * position - max(own.before, 0)) // own.upsampling
    return position
