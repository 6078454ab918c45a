"""The forms of a count in a graph: the operators that count the states of an activation's input.

What they are compiled to depends on the backend. Inductor joins comparisons and sums with the operators that compute the input.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: The largest number that one of three packed counters of 10 bits can hold.
_PACKED = 1023


def count_as_sums(x: Any, like: Tensor, axis: int, is_counted: Any) -> Any:
    """Return the counts of the states of `x`, int64 [neurons, 3], as comparisons and sums in two steps.

    The first sum is short (an image row, or the tokens of a sequence), so that a GPU kernel does not have to split it. Up to
    1023 values it adds up three counters of 10 bits in one int32. The second sum is in int64, and so is the first if it may be
    longer than 2**31, so the counts are exact.

    Args:
        x: a proxy of the input in the graph.
        like: the input as the tracer knows it: its shape.
        axis: the axis of the neurons, not negative.
        is_counted: a proxy of a mask, bool, that is broadcast to the shape of `x`; None if all positions are counted.
    """
    axes = [each for each in range(like.ndim) if each != axis]
    states = [x < 0, x == 0, x > 0]
    if is_counted is not None:
        states = [state & is_counted for state in states]
    if not axes:
        return torch.stack(states, 1).to(torch.int64)
    off, zero, on = (state.to(torch.int32) for state in states)
    first = _first_axes(like.shape, axis, axes, like.is_cuda)
    sizes = [like.shape[each] for each in first]
    length = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    if length is not None and length <= _PACKED:
        packed = torch.sum(off + zero * (1 << 10) + on * (1 << 20), first, True, dtype=torch.int32)
        parts = [packed & _PACKED, (packed >> 10) & _PACKED, packed >> 20]
    else:
        dtype = torch.int32 if length is not None and length < 2**31 else torch.int64
        parts = [torch.sum(state, first, True, dtype=dtype) for state in (off, zero, on)]
    return torch.stack([torch.sum(part, axes, dtype=torch.int64) for part in parts], 1)


def _first_axes(shape: Sequence[Any], axis: int, axes: list[int], is_cuda: bool) -> list[int]:
    """Return the axes of the first sum: of a small image both, of any other one the rows.

    On a CPU an image is small if the packed counters hold its states, which saves the second sum.
    """
    if len(shape) == 4 and axis == 1:
        *_, height, width = shape
        is_known = isinstance(height, int) and isinstance(width, int)
        return [2, 3] if is_known and (width < 16 if is_cuda else height * width <= _PACKED) else [3]
    return [each for each in axes if each > axis] or axes[-1:]
