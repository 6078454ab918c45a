"""GPU: three counters packed into one int32 per lane.

Each lane packs three 10-bit counters into one int32. So the three counts take one register, and counting a value takes a
selection and an addition. A lane counts at most MOST_COUNTED values.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# The value that adds one to each of the three counters of a lane.
_FIRST: tl.constexpr = tl.constexpr(1)
_SECOND: tl.constexpr = tl.constexpr(1 << 10)
_THIRD: tl.constexpr = tl.constexpr(1 << 20)
# The largest count that a counter holds.
MOST_COUNTED: tl.constexpr = tl.constexpr((1 << 10) - 1)


@triton.jit
def zero_counters(HEIGHT: tl.constexpr, WIDTH: tl.constexpr, edges):
    """Return a tuple of int32 tiles of zeros: one for the signs, one for every three of the len(edges) + 1 counters."""
    counts = (tl.zeros((HEIGHT, WIDTH), tl.int32),)
    for _ in tl.static_range(len(edges) // 3):
        counts = counts + (tl.zeros((HEIGHT, WIDTH), tl.int32),)  # noqa: RUF005
    return counts


@triton.jit
def count_lanes(counts, x, edges, REPEATS: tl.constexpr, AXIS: tl.constexpr):
    """Return the counters of all lanes with the values of the tile `x` added.

    Args:
        counts: tuple of int32 tiles, as `zero_counters` makes them.
        x: float32 tile. NaN is not counted.
        edges: tuple of float32 numbers. Without edges, the three counters are those of on, off and zero. With edges,
            counter 0 counts the numbers from -infinity on, and counter i those from `edges[i - 1]` on, three in each tile.
        REPEATS: how many values along AXIS belong to one lane.
        AXIS: the axis of `x` along which lanes repeat.
    """
    if len(edges) == 0:
        state = tl.where(x > 0, _FIRST, tl.where(x < 0, _SECOND, tl.where(x == 0, _THIRD, 0)))
        return (counts[0] + _sum_repeats(state, REPEATS, AXIS),)
    else:
        counted = ()
        for group in tl.static_range(len(counts)):
            state = _three_at_least(x, edges, 3 * group)
            counted = counted + (counts[group] + _sum_repeats(state, REPEATS, AXIS),)  # noqa: RUF005
        return counted


@triton.jit
def _sum_repeats(state, REPEATS: tl.constexpr, AXIS: tl.constexpr):
    """Sum the values of each lane along AXIS: where a tile is longer than all threads together, a lane has several."""
    if REPEATS == 1:
        return state
    elif AXIS == 0:
        return tl.sum(state.reshape(REPEATS, state.shape[0] // REPEATS, state.shape[1]), 0)
    else:
        return tl.sum(state.reshape(state.shape[0], REPEATS, state.shape[1] // REPEATS), 1)


@triton.jit
def _three_at_least(x, edges, FIRST: tl.constexpr):
    """Return what `x` adds to the counters FIRST, FIRST + 1 and FIRST + 2, which are packed into one int32."""
    state = tl.where(x >= (float("-inf") if FIRST == 0 else edges[FIRST - 1]), _FIRST, 0)
    if len(edges) > FIRST:
        state += tl.where(x >= edges[FIRST], _SECOND, 0)
    if len(edges) > FIRST + 1:
        state += tl.where(x >= edges[FIRST + 1], _THIRD, 0)
    return state


@triton.jit
def unpack(counts, PLACE: tl.constexpr):
    """Return the counter at PLACE (0, 1 or 2) of each int32 of `counts`."""
    return counts // (1 << 10 * PLACE) & MOST_COUNTED


@triton.jit
def atomic_add(pointers, number, inside):
    """Add `number` to the int64 at `pointers`, where `inside` is true and there is something to add."""
    tl.atomic_add(pointers, number.to(tl.int64), mask=inside & (number != 0), sem="relaxed")
