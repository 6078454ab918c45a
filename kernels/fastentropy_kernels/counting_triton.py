"""GPU: counters of three states in one integer per lane."""

from __future__ import annotations

# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

# Where the three counts of a lane lie in its int32, and how far each can count.
_FIRST: tl.constexpr = tl.constexpr(1)


_SECOND: tl.constexpr = tl.constexpr(1 << 10)


_THIRD: tl.constexpr = tl.constexpr(1 << 20)


MOST_COUNTED: tl.constexpr = tl.constexpr((1 << 10) - 1)


@triton.jit
def count_lanes(counts, x, edges, REPEATS: tl.constexpr, AXIS: tl.constexpr):  # noqa: N803
    """Count each value where its lane keeps its counts: on, off and zero, or at least -infinity, edges[0], edges[1], …"""
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
def _sum_repeats(state, REPEATS: tl.constexpr, AXIS: tl.constexpr):  # noqa: N803
    """Sum what one lane holds along AXIS: a tile that is longer than all threads together comes round to each again."""
    if REPEATS == 1:
        return state
    elif AXIS == 0:
        return tl.sum(state.reshape(REPEATS, state.shape[0] // REPEATS, state.shape[1]), 0)
    else:
        return tl.sum(state.reshape(state.shape[0], REPEATS, state.shape[1] // REPEATS), 1)


@triton.jit
def _three_at_least(x, edges, FIRST: tl.constexpr):  # noqa: N803
    state = tl.where(x >= (float("-inf") if FIRST == 0 else edges[FIRST - 1]), _FIRST, 0)
    if len(edges) > FIRST:
        state += tl.where(x >= edges[FIRST], _SECOND, 0)
    if len(edges) > FIRST + 1:
        state += tl.where(x >= edges[FIRST + 1], _THIRD, 0)
    return state


@triton.jit
def unpack(counts, PLACE: tl.constexpr):  # noqa: N803
    return counts // (1 << 10 * PLACE) & MOST_COUNTED


@triton.jit
def atomic_add(pointers, number, inside):
    tl.atomic_add(pointers, number.to(tl.int64), mask=inside & (number != 0), sem="relaxed")
