"""Chains rewritten with the same function: batch norm folded, several operators merged into one, pools moved forward.

Zero padding inside of a chain is not the zero padding of the merged operator. Where what comes before it is pointwise,
only the bias differs near the border, and it becomes a map of the positions; elsewhere the border is recomputed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastentropy.fusion.affine import AffineOperator, Axis, add, compose, identity
from fastentropy.fusion.elements import Bordered, Chain, Element, Flatten, Kernel, Masked, Strip, Sum, operators, run
from fastentropy_kernels import MOST_MIDDLES

Borders: TypeAlias = Literal["exact", "train"]


def merge(
    chain: Chain,
    spatial_size: Sequence[int] | None,
    borders: Borders = "exact",
    composed: Callable[[Chain], AffineOperator] | None = None,
) -> Chain:
    """One operator for the whole chain, equal to it at every position for inputs of that spatial size, or of any if None.

    Its bias is what the chain answers to zeros; near a border that can differ from place to place. Where more than the bias
    differs there, the border is recomputed by the chain. A `Flatten` at the end stays.
    With `borders="train"` all zero padding moves to where the chain begins, as in the literature (Fu et al., ICML 2022; Kim
    et al., ICML 2023 and 2024): another function near the border, for those who train it afterwards.
    composed gives the operator of a chain; with `unweighted` in place of `compose_all`, the result is only good for timing.
    Raises ValueError, with the reason, where that cannot be.
    """
    body = chain[:-1] if isinstance(chain[-1], Flatten) else chain
    merged, tail = (composed or compose_all)(body), chain[len(body) :]
    if not merged.axes:
        return (merged, *tail)
    if spatial_size is None:
        return (merged if borders == "train" else _for_every_size(body, merged), *tail)
    if borders == "train":
        return (crop(merged, spatial_size), *tail)
    strips = border_strips(body, spatial_size)
    response = zero_response(body, spatial_size)
    interior = merged.bias.reshape(-1, *(1,) * len(spatial_size)).expand_as(response)
    differs = ~torch.isclose(response, interior, rtol=1e-12, atol=1e-12)
    for strip in strips:
        differs.narrow(1 + strip.axis, strip.output[0], strip.output[1] - strip.output[0]).fill_(False)
    merged = crop(replace(merged, bias=response) if differs.any() else merged, spatial_size)
    return (Bordered(merged, body, strips) if strips else merged, *tail)


def _for_every_size(chain: Chain, merged: AffineOperator) -> Element:
    axes = range(len(merged.axes))
    if any(_differs(chain, axis, of_zeros=False) for axis in axes):
        raise ValueError("inner zero padding: where the border is depends on the size, which is free")
    return masked(chain) if any(_differs(chain, axis, of_zeros=True) for axis in axes) else merged


def _differs(chain: Chain, axis: int, of_zeros: bool) -> bool:
    """Whether the merged operator differs at the borders of large inputs: in the bias alone, which zeros show, or in more."""
    period = _stride(chain, axis)
    readings = (_read(chain, axis, _Reading(0, size, size), of_zeros) for size in range(1 << 20, (1 << 20) + period))
    return any(reading.start > 0 or reading.stop < reading.size for reading in readings)


def crop(operator: AffineOperator, spatial_size: Sequence[int]) -> AffineOperator:
    """The operator without the taps that only ever read padding, where its output has a single position."""
    single = all(axis.output_size(size) == 1 for axis, size in zip(operator.axes, spatial_size, strict=True))
    if not operator.axes or not single or any(axis.upsampling > 1 for axis in operator.axes):
        return operator
    weight = operator.weight.new_zeros((*operator.weight.shape[:2], *spatial_size))
    read = [
        [tap for tap in range(axis.kernel) if 0 <= tap * axis.dilation - axis.before < size]
        for axis, size in zip(operator.axes, spatial_size, strict=True)
    ]
    if all(read):
        taps: Any = (..., *(slice(each[0], each[-1] + 1) for each in read))
        starts = [each[0] * axis.dilation - axis.before for each, axis in zip(read, operator.axes, strict=True)]
        places: Any = (..., *(slice(n, None, a.dilation) for n, a in zip(starts, operator.axes, strict=True)))
        weight[places][tuple(slice(0, n) for n in operator.weight[taps].shape)] = operator.weight[taps]
    ones = (1,) * len(operator.axes)
    bias = operator.bias.flatten(1)[:, 0] if operator.bias.ndim > 1 else operator.bias
    return AffineOperator(weight, bias, ones, (0,) * len(ones), ones, operator.groups)


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
            start, stop, length = _read(chain, axis, _Reading(0, smaller, smaller), of_zeros=True)[:3]
            if _length(chain, axis, smaller) and start < stop:
                before, after = torch.arange(start), torch.arange(stop, length)
                inside = torch.full((output - len(before) - len(after),), start)
                return smaller, torch.cat([before, inside, after])
    return size, torch.arange(output)


def _stride(chain: Chain, axis: int) -> int:
    """The product of all strides along an axis: borders of inputs whose sizes differ by a multiple of it are alike."""
    return math.prod(operator.axes[axis].stride for operator in operators(chain))


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
    """The composition of a chain without memory, on the meta device: its sizes are known before it is paid for.

    Raises ValueError where it is no operator.
    """
    return compose_all(_with_each(chain, _on_meta))


def unweighted(chain: Chain) -> AffineOperator:
    """The composition of a chain with zeros in place of its weight, which would cost more to compose than to time."""
    shape, bias = outline(chain), compose_all(_with_each(chain, _without_extent)).bias
    weight = torch.zeros(shape.weight.shape, dtype=torch.float32, device=bias.device)
    return replace(shape, weight=weight, bias=bias)


def _with_each(chain: Chain, change: Callable[[AffineOperator], AffineOperator]) -> Chain:
    """A chain with each of its operators changed, those of branches too."""

    def changed(element: Element) -> Element:
        if isinstance(element, Sum):
            return Sum(tuple(_with_each(branch, change) for branch in element.branches))
        assert isinstance(element, AffineOperator)
        return change(element)

    return tuple(map(changed, chain))


def _on_meta(operator: AffineOperator) -> AffineOperator:
    return replace(operator, weight=operator.weight.to("meta"), bias=operator.bias.to("meta"))


def _without_extent(operator: AffineOperator) -> AffineOperator:
    """An operator with a single tap, the sum of the taps of another: of what is constant, it gives the same."""
    weight = operator.weight.flatten(2).sum(2) if operator.axes else operator.weight
    return AffineOperator(weight, operator.bias, groups=operator.groups)


class _Reading(NamedTuple):
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
    reading = _read(chain, axis, _Reading(0, size, size))
    return reading.start, reading.stop, reading.size


def _read(chain: Chain, axis: int, reading: _Reading, of_zeros: bool = False) -> _Reading:
    for element in chain:
        if isinstance(element, Sum):
            ends = [_read(branch, axis, reading, of_zeros) for branch in element.branches]
            reading = _Reading(
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


def _read_operator(axis: Axis, reading: _Reading, before: bool, after: bool) -> _Reading:
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
        reading.before and before,
        reading.after and after,
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
    stride = _stride(chain, axis)
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
    return second.is_channelwise or (first.is_channelwise and not _pads(second))


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


def masked(chain: Chain) -> Masked:
    """One operator for pointwise operators and what follows them, or for these and the value itself: exact at every size.

    Raises ValueError for another chain, or where what follows has zero padding inside.
    """
    body, adds_value = _without_residual(chain)
    count = next((index for index, element in enumerate(body) if not _is_pointwise(element)), len(body))
    if not 0 < count < len(body):
        raise ValueError("no pointwise operators with others behind them")
    head, (padded, *others) = compose_all(body[:count]), body[count:]
    if isinstance(padded, Sum) or not all(isinstance(each, AffineOperator) and not _pads(each) for each in others):
        raise ValueError("inner zero padding: more than a bias differs at the border")
    rest = compose_all((padded, *others))
    grouped = rest.weight.reshape(rest.groups, -1, *rest.weight.shape[1:])
    tap_bias = torch.einsum("goi...,gi->go...", grouped, head.bias.reshape(rest.groups, -1)).flatten(0, 1)
    merged = replace(compose(head, rest), bias=rest.bias)
    if adds_value:
        whole = add(merged, identity(merged.in_channels, merged))
        if whole.axes != merged.axes:
            raise ValueError("the value itself reads beyond the taps of the merged operator")
        merged = whole
    return Masked(merged, tap_bias)


def _without_residual(chain: Chain) -> tuple[Chain, bool]:
    """A chain, or the branch of a chain that only adds a branch to the value itself."""
    if len(chain) == 1 and isinstance(chain[0], Sum):
        branches = [branch for branch in chain[0].branches if branch]
        if len(branches) == 1 and len(chain[0].branches) == 2:
            return branches[0], True
    return chain, False


def _is_pointwise(element: Element) -> bool:
    return isinstance(element, AffineOperator) and bool(element.axes) and element.is_pointwise


def _pads(operator: AffineOperator) -> bool:
    return any(axis.before > 0 or axis.after > 0 or axis.upsampling > 1 for axis in operator.axes)


def kernels(chain: Chain) -> Chain:
    """The chain with each pair of neighbours that a fused kernel computes in one, and the input that is added to it."""
    paired: list[Element] = []
    for element in chain:
        previous = paired[-1] if paired else None
        if isinstance(previous, AffineOperator) and (kernel := _kernel(previous, element)):
            paired[-1] = kernel
        else:
            paired.append(_kernels_of_branches(element) if isinstance(element, Sum) else element)
    return tuple(paired)


def _kernels_of_branches(element: Sum) -> Element:
    branches = tuple(kernels(branch) for branch in element.branches)
    body, adds_value = _without_residual((Sum(branches),))
    if adds_value and len(body) == 1 and isinstance(body[0], Kernel):
        return replace(body[0], adds_input=True)
    return element if branches == element.branches else Sum(branches)


def _kernel(first: AffineOperator, second: Element) -> Kernel | None:
    """The kernel of `fastentropy_kernels` that computes one operator after the other, if there is one."""
    if not isinstance(second, AffineOperator) or first.bias.ndim > 1 or second.bias.ndim > 1:
        return None
    if not first.axes:
        return Kernel("linear_pair", first, second) if first.out_channels <= MOST_MIDDLES else None
    plain = all(axis.upsampling == 1 and axis.before == axis.after >= 0 for axis in first.axes)
    spread = first.groups in (1, first.in_channels) and (first.groups == 1 or first.in_channels == first.out_channels)
    pointwise = second.is_pointwise and second.groups == 1
    return Kernel("conv_pointwise", first, second) if len(first.axes) == 2 and plain and spread and pointwise else None


def spatial_size(chain: Chain, x: Tensor) -> torch.Size:
    """The sizes of the spatial axes of a chain's input."""
    return x.shape[x.ndim - len(operators(chain)[0].axes) :]
