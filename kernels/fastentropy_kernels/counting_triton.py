"""GPU: counters of the states of a tile, three to each int32.

Each lane (an element of the tile of counters) packs three 10-bit counters into one int32. The three counts therefore take one
register, and counting a value takes a selection and an addition. A lane can count at most MAX_COUNTED values before a counter
overflows.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="assignment, no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

# Adding one of these to an int32 adds one to its first, second or third counter.
_FIRST: tl.constexpr = tl.constexpr(1)
_SECOND: tl.constexpr = tl.constexpr(1 << 10)
_THIRD: tl.constexpr = tl.constexpr(1 << 20)
# The largest count that a 10-bit counter can hold.
MAX_COUNTED: tl.constexpr = tl.constexpr((1 << 10) - 1)


@triton.jit
def zero_counters(HEIGHT: tl.constexpr, WIDTH: tl.constexpr, edges):
    """Return counters that are all zero, as a tuple of int32 tiles.

    Args:
        HEIGHT: height of each tile.
        WIDTH: width of each tile.
        edges: tuple of the edges of a histogram. With edges, the tuple holds len(edges) + 1 counters per lane, three in each
            tile. Without edges, it holds one tile, for the states on, off and zero.
    """
    counts = (tl.zeros((HEIGHT, WIDTH), tl.int32),)
    for _ in tl.static_range(len(edges) // 3):
        counts = counts + (tl.zeros((HEIGHT, WIDTH), tl.int32),)  # noqa: RUF005
    return counts


@triton.jit
def count_lanes(counts, x, edges, REPEATS: tl.constexpr, AXIS: tl.constexpr):
    """Return the counters of all lanes after counting the values of the tile `x`.

    Without edges, the three counters count the states on, off and zero. With edges, the counters are cumulative: counter 0
    counts all numbers, and counter i counts the numbers that are at least `edges[i - 1]`. Each tile holds three of these
    counters.

    Args:
        counts: the counters so far, a tuple of int32 tiles as `zero_counters` returns it.
        x: float32 tile. NaN is not counted.
        edges: tuple of float32 numbers in rising order; empty to count states.
        REPEATS: how many values along AXIS are counted by one lane.
        AXIS: the axis of `x` along which the values of a lane lie.
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
    """Sum the packed counters of each lane's values, which lie along AXIS.

    A lane has several values (REPEATS) if the tile is larger than one access by all threads.

    Args:
        state: int32 tile, what each value adds to the packed counters.
        REPEATS: how many values along AXIS belong to one lane.
        AXIS: the axis of `state` along which the values of a lane lie.
    """
    if REPEATS == 1:
        return state
    elif AXIS == 0:
        return tl.sum(state.reshape(REPEATS, state.shape[0] // REPEATS, state.shape[1]), 0)
    else:
        return tl.sum(state.reshape(state.shape[0], REPEATS, state.shape[1] // REPEATS), 1)


@triton.jit
def _three_at_least(x, edges, FIRST: tl.constexpr):
    """Return what each value of `x` adds to the counters FIRST, FIRST + 1 and FIRST + 2, packed into one int32.

    Counter 0 counts all numbers, and counter i counts the numbers that are at least `edges[i - 1]`.
    """
    state = tl.where(x >= (float("-inf") if FIRST == 0 else edges[FIRST - 1]), _FIRST, 0)
    if len(edges) > FIRST:
        state += tl.where(x >= edges[FIRST], _SECOND, 0)
    if len(edges) > FIRST + 1:
        state += tl.where(x >= edges[FIRST + 1], _THIRD, 0)
    return state


@triton.jit
def unpack(counts, PLACE: tl.constexpr):
    """Return one of the three counters of each int32 of `counts`: the one with index PLACE (0, 1 or 2)."""
    return counts // (1 << 10 * PLACE) & MAX_COUNTED


@triton.jit
def atomic_add(pointers, number, inside):
    """Add numbers to int64 values in memory by atomic additions.

    Args:
        pointers: pointers to the int64 values.
        number: integers, one for each pointer. Nothing is written if the number is 0.
        inside: bool, whether the pointer may be written to.
    """
    tl.atomic_add(pointers, number.to(tl.int64), mask=inside & (number != 0), sem="relaxed")
