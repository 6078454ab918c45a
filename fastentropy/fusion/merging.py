"""Chains rewritten with the same function: batch norm folded, several operators merged into one, pools moved forward.

Zero padding inside of a chain is not the zero padding of the merged operator. Where what comes before it is pointwise,
only the bias differs near the border, and it becomes a map of the positions; elsewhere the border is recomputed.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy.fusion.affine import AffineOperator, Axis, add, compose, identity
from fastentropy.fusion.elements import Bordered, Chain, Element, Flatten, Kernel, Strip, Sum, operators, run


def merge(chain: Chain, spatial_size: Sequence[int]) -> Chain:
    """One operator for the whole chain, equal to it at every position for inputs of that spatial size.

    Its bias is what the chain answers to zeros; near a border that can differ from place to place. Where more than the bias
    differs there, the border is recomputed by the chain. A `Flatten` at the end stays.
    Raises ValueError, with the reason, where that cannot be.
    """
    body = chain[:-1] if isinstance(chain[-1], Flatten) else chain
    merged = compose_all(body)
    tail = chain[len(body) :]
    if not merged.axes:
        return (merged, *tail)
    strips = border_strips(body, spatial_size)
    response = zero_response(body, spatial_size)
    interior = merged.bias.reshape(-1, *(1,) * len(spatial_size)).expand_as(response)
    differs = ~torch.isclose(response, interior, rtol=1e-12, atol=1e-12)
    for strip in strips:
        differs.narrow(1 + strip.axis, strip.output[0], strip.output[1] - strip.output[0]).fill_(False)
    merged = replace(merged, bias=response) if differs.any() else merged
    return (Bordered(merged, body, strips) if strips else merged, *tail)


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
    period = math.prod(operator.axes[axis].stride for operator in operators(chain))
    output = _length(chain, axis, size)
    if all(operator.axes[axis].upsampling == 1 for operator in operators(chain)):
        for smaller in range(size % period or period, size, period):
            start, stop, length = _read(chain, axis, _Reading(0, smaller, smaller, False, False))[:3]
            if _length(chain, axis, smaller) and start < stop:
                before, after = torch.arange(start), torch.arange(stop, length)
                inside = torch.full((output - len(before) - len(after),), start)
                return smaller, torch.cat([before, inside, after])
    return size, torch.arange(output)


def compose_all(chain: Chain) -> AffineOperator:
    """The composition of all elements of a chain, exact but for the borders.

    Raises ValueError where it is no operator.
    """
    merged, *others = (_add_all(element) for element in chain)
    for operator in others:
        merged = compose(merged, operator)
    return merged


def _add_all(element: Element) -> AffineOperator:
    if not isinstance(element, Sum):
        assert isinstance(element, AffineOperator)
        return element
    branches = [compose_all(branch) if branch else None for branch in element.branches]
    like = next(operator for operator in branches if operator is not None)
    total, *others = (identity(like.in_channels, like) if operator is None else operator for operator in branches)
    for other in others:
        total = add(total, other)
    return total


def outline(chain: Chain) -> AffineOperator:
    """The merged operator of a chain without memory, on the meta device: its sizes are known before it is paid for.

    Raises ValueError where it is no operator.
    """
    return compose_all(tuple(map(_outline, chain)))


def _outline(element: Element) -> Element:
    if isinstance(element, Sum):
        return Sum(tuple(tuple(map(_outline, branch)) for branch in element.branches))
    assert isinstance(element, AffineOperator)
    return replace(element, weight=element.weight.to("meta"), bias=element.bias.to("meta"))


class _Reading(NamedTuple):
    """Along one axis, the positions of a value at which a merged operator is right.

    They are [start, stop) of size; before and after tell whether what it would compute beyond the ends is zero, as padding is.
    """

    start: int
    stop: int
    size: int
    before: bool = True
    after: bool = True


def right_positions(chain: Chain, axis: int, size: int) -> tuple[int, int, int]:
    """From where to where along a spatial axis the merged operator equals the chain but for its bias, and the output's size."""
    reading = _read(chain, axis, _Reading(0, size, size))
    return reading.start, reading.stop, reading.size


def _read(chain: Chain, axis: int, reading: _Reading) -> _Reading:
    for element in chain:
        if isinstance(element, Sum):
            ends = [_read(branch, axis, reading) for branch in element.branches]
            reading = _Reading(
                max(end.start for end in ends),
                min(end.stop for end in ends),
                ends[0].size,
                all(end.before for end in ends),
                all(end.after for end in ends),
            )
        elif isinstance(element, AffineOperator):
            reading = _read_operator(element.axes[axis], reading)
    return reading


def _read_operator(axis: Axis, reading: _Reading) -> _Reading:
    """The first output that reads no wrong position, and the first after it that does."""
    stuffed = (reading.size - 1) * axis.upsampling + 1
    first = (reading.start - 1) * axis.upsampling + 1 if reading.start else (None if reading.before else 0)
    last = reading.stop * axis.upsampling if reading.stop < reading.size else (None if reading.after else stuffed)
    size = axis.output_size(reading.size)
    start = 0 if first is None else -(-(first + axis.before) // axis.stride)
    stop = size if last is None else -(-(last + axis.before - axis.reach) // axis.stride)
    return _Reading(
        min(max(start, 0), size),
        min(max(stop, 0), size),
        size,
        reading.before and axis.before >= axis.reach,
        reading.after and axis.after >= axis.reach,
    )


def border_strips(chain: Chain, spatial_size: Sequence[int]) -> tuple[Strip, ...]:
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


def _leading_strip(chain: Chain, axis: int, size: int, stop: int) -> Strip:
    """The outputs [0, stop), from as little of the input as they read."""
    needed = min(max(_last_read(chain, axis, stop - 1) + 1, 1), size)
    while needed < size and _length(chain, axis, needed) < stop:
        needed += 1
    return Strip(axis, (0, stop), (0, needed), (0, stop))


def _trailing_strip(chain: Chain, axis: int, size: int, start: int, output: int) -> Strip:
    """The outputs [start, output), from an input that begins at a multiple of the stride, so that positions correspond."""
    stride = math.prod(o.axes[axis].stride for o in operators(chain))
    begin = min(max(_first_read(chain, axis, start), 0), size - 1) // stride * stride
    while begin and _length(chain, axis, size - begin) < output - start:
        begin -= stride
    length = _length(chain, axis, size - begin)
    return Strip(axis, (start, output), (begin, size), (length - (output - start), length))


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


def fold(chain: Chain) -> Chain:
    """Compose every operator that only scales and shifts channels (a batch norm) with its neighbour, where that is exact."""
    folded: list[Element] = []
    for element in chain:
        previous = folded[-1] if folded else None
        if isinstance(element, Sum):
            folded.append(Sum(tuple(fold(branch) for branch in element.branches)))
        elif isinstance(previous, AffineOperator) and isinstance(element, AffineOperator) and _folds(previous, element):
            folded[-1] = compose(previous, element)
        else:
            folded.append(element)
    return tuple(folded)


def _folds(first: AffineOperator, second: AffineOperator) -> bool:
    """Whether one of two operators is a scale that the other can take, at the border too; an average stays one."""
    if first.is_average or second.is_average:
        return False
    unpadded = all(axis.before <= 0 and axis.after <= 0 for axis in second.axes)
    return second.is_channelwise or (first.is_channelwise and unpadded)


def pools_first(chain: Chain) -> Chain:
    """The chain with every unpadded average pooling moved before the pointwise operators that it follows.

    A mean of affine values is the affine value of the mean.
    """
    moved: list[Element] = []
    for element in chain:
        place = len(moved)
        if isinstance(element, AffineOperator) and element.is_average and not _is_padded(element):
            while place and (pointwise := _pointwise_before(moved, place)):
                element, place = _average_of(element, pointwise.in_channels), place - 1
        moved.insert(place, element)
    return tuple(moved)


def _pointwise_before(moved: Sequence[Element], place: int) -> AffineOperator | None:
    before = moved[place - 1]
    return before if isinstance(before, AffineOperator) and before.is_pointwise and before.bias.ndim == 1 else None


def _average_of(pool: AffineOperator, channels: int) -> AffineOperator:
    """The same pooling for another number of channels."""
    weight = pool.weight[:1].expand(channels, *pool.weight.shape[1:]).contiguous()
    return replace(pool, weight=weight, bias=pool.bias.new_zeros(channels), groups=channels)


def _is_padded(operator: AffineOperator) -> bool:
    return any(axis.before or axis.after for axis in operator.axes)


def kernels(chain: Chain) -> Chain:
    """The chain with each pair of neighbours that a fused kernel computes in one."""
    paired: list[Element] = []
    for element in chain:
        if isinstance(element, Sum):
            element = Sum(tuple(kernels(branch) for branch in element.branches))
        previous = paired[-1] if paired else None
        both = isinstance(previous, AffineOperator) and isinstance(element, AffineOperator)
        name = _kernel_name(previous, element) if both else None
        if name:
            paired[-1] = Kernel(name, previous, element)
        else:
            paired.append(element)
    return tuple(paired)


def _kernel_name(first: AffineOperator, second: AffineOperator) -> str | None:
    if first.bias.ndim > 1 or second.bias.ndim > 1:
        return None
    if not first.axes:
        return "linear_pair" if first.out_channels <= 128 else None
    plain = all(axis.upsampling == 1 and axis.before == axis.after >= 0 for axis in first.axes)
    spread = first.groups in (1, first.in_channels) and (first.groups == 1 or first.in_channels == first.out_channels)
    pointwise = second.is_pointwise and second.groups == 1
    return "conv_pointwise" if len(first.axes) == 2 and plain and spread and pointwise else None


def spatial_size(chain: Chain, x: Tensor) -> torch.Size:
    """The sizes of the spatial axes of a chain's input."""
    return x.shape[x.ndim - len(operators(chain)[0].axes) :]
