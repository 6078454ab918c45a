"""How far a merged operator differs from its chain near the border."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator, Axis
from fastentropy.fusion.chains.elements import BorderStrip, Chain, Sum, operators, run


def has_border(chain: Chain, axis: int, of_zeros: bool) -> bool:
    """Whether the merged operator differs at the borders of large inputs: in the bias alone, which zeros show, or in more."""
    period = _stride(chain, axis)
    readings = (_read(chain, axis, ValidRange(0, size, size), of_zeros) for size in range(1 << 20, (1 << 20) + period))
    return any(reading.start > 0 or reading.stop < reading.size for reading in readings)


def zero_response(chain: Chain, spatial_size: Sequence[int]) -> Tensor:
    """What a chain with spatial axes answers to zeros of that size: [out_channels, *output_size].

    Away from the borders it is constant, so a smaller input is asked, and its answer stretched.
    """
    first = operators(chain)[0]
    pairs = [_smaller(chain, axis, size) for axis, size in enumerate(spatial_size)]
    response = run(chain, first.bias.new_zeros((1, first.in_channels, *(size for size, _ in pairs))))[0]
    for axis, (_, positions) in enumerate(pairs, 1):
        response = response.index_select(axis, positions.to(response.device))
    return response


def _smaller(chain: Chain, axis: int, size: int) -> tuple[int, Tensor]:
    """The smallest input with the same borders, and at which of its outputs each output of the given size is to be found."""
    period = _stride(chain, axis)
    output = _length(chain, axis, size)
    if all(operator.axes[axis].upsampling == 1 for operator in operators(chain)):
        for smaller in range(size % period or period, size, period):
            start, stop, length = _read(chain, axis, ValidRange(0, smaller, smaller), of_zeros=True)[:3]
            if _length(chain, axis, smaller) and start < stop:
                before, after = torch.arange(start), torch.arange(stop, length)
                inside = torch.full((output - len(before) - len(after),), start)
                return smaller, torch.cat([before, inside, after])
    return size, torch.arange(output)


def _stride(chain: Chain, axis: int) -> int:
    """The product of all strides along an axis: borders of inputs whose sizes differ by a multiple of it are alike."""
    return math.prod(operator.axes[axis].stride for operator in operators(chain))


class ValidRange(NamedTuple):
    """Along one axis, the positions of a value at which a merged operator is right.

    They are [start, stop) of size; before and after tell whether what it would compute beyond the ends is zero, as padding is.
    Of an input of zeros, that is so until a bias is added.
    """

    start: int
    stop: int
    size: int
    before: bool = True
    after: bool = True


def right_positions(chain: Chain, axis: int, size: int) -> tuple[int, int, int]:
    """From where to where along a spatial axis the merged operator equals the chain but for its bias, and the output's size."""
    reading = _read(chain, axis, ValidRange(0, size, size))
    return reading.start, reading.stop, reading.size


def _read(chain: Chain, axis: int, reading: ValidRange, of_zeros: bool = False) -> ValidRange:
    for element in chain:
        if isinstance(element, Sum):
            ends = [_read(branch, axis, reading, of_zeros) for branch in element.branches]
            reading = ValidRange(
                max(end.start for end in ends),
                min(end.stop for end in ends),
                ends[0].size,
                all(end.before for end in ends),
                all(end.after for end in ends),
            )
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            no_bias = of_zeros and not element.bias.any()
            before, after = (no_bias if of_zeros else margin >= own.reach for margin in (own.before, own.after))
            reading = _read_operator(own, reading, before, after)
    return reading


def _read_operator(axis: Axis, reading: ValidRange, before: bool, after: bool) -> ValidRange:
    """The first output that reads no wrong position, and the first after it that does."""
    stuffed = (reading.size - 1) * axis.upsampling + 1
    first = (reading.start - 1) * axis.upsampling + 1 if reading.start else (None if reading.before else 0)
    last = reading.stop * axis.upsampling if reading.stop < reading.size else (None if reading.after else stuffed)
    size = axis.output_size(reading.size)
    start = 0 if first is None else -(-(first + axis.before) // axis.stride)
    stop = size if last is None else -(-(last + axis.before - axis.reach) // axis.stride)
    return ValidRange(
        min(max(start, 0), size),
        min(max(stop, 0), size),
        size,
        reading.before and before,
        reading.after and after,
    )


def border_strips(chain: Chain, spatial_size: Sequence[int]) -> tuple[BorderStrip, ...]:
    """Where a merged operator differs from the chain by more than its bias: strips along the borders, empty if nowhere.

    Raises ValueError where nothing is left between them.
    """
    strips = []
    for axis, size in enumerate(spatial_size):
        start, stop, output = right_positions(chain, axis, size)
        if (start or stop < output) and start >= stop:
            raise ValueError("inner zero padding: one operator would be wrong at every position of so small an input")
        if start:
            strips.append(_leading_strip(chain, axis, size, start))
        if stop < output:
            strips.append(_trailing_strip(chain, axis, size, stop, output))
    return tuple(strips)


def _leading_strip(chain: Chain, axis: int, size: int, stop: int) -> BorderStrip:
    """The outputs [0, stop), from as little of the input as they read."""
    needed = min(max(_last_read(chain, axis, stop - 1) + 1, 1), size)
    while needed < size and _length(chain, axis, needed) < stop:
        needed += 1
    return BorderStrip(axis, (0, stop), (0, needed), (0, stop))


def _trailing_strip(chain: Chain, axis: int, size: int, start: int, output: int) -> BorderStrip:
    """The outputs [start, output), from an input that begins at a multiple of the stride, so that positions correspond."""
    stride = _stride(chain, axis)
    begin = min(max(_first_read(chain, axis, start), 0), size - 1) // stride * stride
    while begin and _length(chain, axis, size - begin) < output - start:
        begin -= stride
    length = _length(chain, axis, size - begin)
    return BorderStrip(axis, (start, output), (begin, size), (length - (output - start), length))


def _length(chain: Chain, axis: int, size: int) -> int:
    """How many outputs an input of that size has; 0 where something in between would have no position."""
    for element in chain:
        if isinstance(element, Sum):
            size = min(_length(branch, axis, size) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            size = max(element.axes[axis].output_size(size), 0) if size else 0
    return size


def _last_read(chain: Chain, axis: int, position: int) -> int:
    """The last input position without which an output position would not be there, or not be right."""
    for element in reversed(chain):
        if isinstance(element, Sum):
            position = max(_last_read(branch, axis, position) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            position = -(-(own.stride * position + own.reach - own.before - min(own.after, 0)) // own.upsampling)
    return position


def _first_read(chain: Chain, axis: int, position: int) -> int:
    """The first input position without which an output position would not be there, or not be right."""
    for element in reversed(chain):
        if isinstance(element, Sum):
            position = min(_first_read(branch, axis, position) for branch in element.branches)
        elif isinstance(element, AffineOperator):
            own = element.axes[axis]
            position = (own.stride * position - max(own.before, 0)) // own.upsampling
    return position
