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
#: The smallest and largest number of pixels that the first sum adds up on a CPU. The loop returns to them for each 16 channels,
#: so the values of more pixels may have left the cache. Sums of fewer pixels take longer to add up.
_FEWEST_PIXELS, _MOST_PIXELS = 8, 32


def count_as_sums(x: Any, like: Tensor, axis: int, is_counted: Any) -> list[Any]:
    """Return how many values of each neuron of `x` are off, zero and on, int64 [neurons] each, as sums in two steps.

    The first sum is short (pixels of an image, or the tokens of a sequence), so that a GPU kernel does not have to split it. Up
    to 1023 values it adds up three counters of 10 bits in one int32. The second sum is in int64, and so is the first if it may
    be longer than 2**31, so the counts are exact.

    Args:
        x: a proxy of the input in the graph.
        like: the input as the tracer knows it: its shape.
        axis: the axis of the neurons, not negative.
        is_counted: a proxy of a mask, bool, that is broadcast to the shape of `x`; None if all positions are counted.
    """
    axes = [each for each in range(like.ndim) if each != axis]
    if not axes:
        return [state.to(torch.int64) for state in _states(x, is_counted)]
    pixels = _pixels(like, axis) if is_counted is None else None
    if pixels is not None:
        x = x.flatten(2).unflatten(2, (like.shape[2] * like.shape[3] // pixels, pixels))
        first, sizes = [3], [pixels]
    else:
        first = _first_axes(like.shape, axis, axes, like.is_cuda)
        sizes = [like.shape[each] for each in first]
    length = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    if length is not None and length <= _PACKED:
        packed = torch.sum(_packed_state(x, is_counted), first, True, dtype=torch.int32)
        parts = [packed & _PACKED, (packed >> 10) & _PACKED, packed >> 20]
    else:
        dtype = torch.int32 if length is not None and length < 2**31 else torch.int64
        parts = [torch.sum(state.to(torch.int32), first, True, dtype=dtype) for state in _states(x, is_counted)]
    return [torch.sum(part, axes, dtype=torch.int64) for part in parts]


def _states(x: Any, is_counted: Any) -> list[Any]:
    """Return whether each value is off, zero and on; none of them where it is NaN or not counted."""
    states = [x < 0, x == 0, x > 0]
    return states if is_counted is None else [state & is_counted for state in states]


def _packed_state(x: Any, is_counted: Any) -> Any:
    """Return the state of each value as 1 in one of three packed counters. On a CPU, products would take longer."""
    state = torch.where(x > 0, 1 << 20, torch.where(x == 0, 1 << 10, (x < 0).to(torch.int32)))
    return state if is_counted is None else torch.where(is_counted, state, 0)


def _pixels(like: Tensor, axis: int) -> int | None:
    """Return how many pixels of an image on a CPU the first sum adds up; None if it is a sum along axes of the image.

    Inductor puts the channels of images of known size last, so that the loop over the pixels of a channel strides over memory.
    """
    if like.is_cuda or like.ndim != 4 or axis != 1 or not all(isinstance(size, int) for size in like.shape):
        return None
    area = like.shape[2] * like.shape[3]
    return next((each for each in range(_MOST_PIXELS, _FEWEST_PIXELS - 1, -1) if area % each == 0), None)


def _first_axes(shape: Sequence[Any], axis: int, axes: list[int], is_cuda: bool) -> list[int]:
    """Return the axes of the first sum: of a small image both, of any other one the rows.

    On a CPU an image is small if the packed counters hold its states, which saves the second sum.
    """
    if len(shape) == 4 and axis == 1:
        *_, height, width = shape
        is_known = isinstance(height, int) and isinstance(width, int)
        return [2, 3] if is_known and (width < 16 if is_cuda else height * width <= _PACKED) else [3]
    return [each for each in axes if each > axis] or axes[-1:]
