"""GPU: an activation and the states of its input in one pass, or the states alone.

While a strip is read every lane keeps its own counts, three of ten bits in an int32, and only values that one lane holds are
summed. The lanes' counts are summed over the tile and added to memory once, when the strip is done.
"""

# Kernels have no types of their own, and Triton none for its decorator.
# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import activate
from fastentropy_kernels.counting_triton import atomic_add, count_lanes, unpack, zero_counters

# Beyond so many rows of a tile the sums over its lanes are wide, so that a strip has more than a few tiles.
MOST_NARROW: tl.constexpr = tl.constexpr(128)

# The same for the sums over a tile's lanes, in an int64, where an int32 as above does not hold them.
_WIDE_SECOND: tl.constexpr = tl.constexpr(1 << 21)
_WIDE_THIRD: tl.constexpr = tl.constexpr(1 << 42)
MOST_SUMMED: tl.constexpr = tl.constexpr((1 << 21) - 1)


@triton.jit
def states_rows_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    nan_ptr,
    weight_ptr,
    rows,
    channels,
    x_row_stride,
    y_row_stride,
    weight_stride,
    strip_rows,
    parameters,
    edges,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """One program: `strip_rows` rows, BLOCK_CHANNELS wide, in tiles of BLOCK_ROWS x BLOCK_CHANNELS.

    Neighbouring programs hold neighbouring channels of the same rows. A lane holds REPEATS rows of a tile, and STAGES tiles are
    on their way at a time. Counts leave the registers once, after the strip.
    """
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    first_channel = program % channel_blocks * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    first_row = program // channel_blocks * strip_rows
    last_row = tl.minimum(first_row + strip_rows, rows)
    weight = _load_weight(weight_ptr, weight_stride, channel, channels)
    counts = zero_counters(BLOCK_ROWS // REPEATS, BLOCK_CHANNELS, edges)
    positions = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in tl.range(first_row, last_row, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        x = _load(x_ptr + row[:, None] * x_row_stride + channel[None, :], inside)
        if y_ptr is not None:
            y = activate(x, ACTIVATION, parameters, weight[None, :])
            tl.store(y_ptr + row[:, None] * y_row_stride + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        counted = row < rows
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + row, mask=row < rows, other=0) != 0
            x = tl.where(counted[:, None], x, float("nan"))
        if nan_ptr is not None:
            positions += counted
        counts = count_lanes(counts, x, edges, REPEATS, 0)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 0, BLOCK_ROWS > MOST_NARROW, first_channel, channel, channels, edges)


@triton.jit
def states_planes_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    nan_ptr,
    weight_ptr,
    tiles,
    channels,
    inner_multiples,
    weight_stride,
    strip,
    parameters,
    edges,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    REPEATS: tl.constexpr,
    INNER_MULTIPLE: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One program: BLOCK_CHANNELS channels and `strip` of the `tiles` that these channels have over outer and inner.

    A tile is BLOCK_CHANNELS x BLOCK_INNER values of one outer index, of which a lane holds REPEATS places of a plane, and
    STAGES tiles are on their way at a time. Planes are `inner_multiples * INNER_MULTIPLE` long: a product tells the compiler
    the alignment of every plane. Counts leave the registers once, after the strip.
    """
    inner = inner_multiples * tl.full((), INNER_MULTIPLE, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    first_channel = program % channel_blocks * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    inner_blocks = tl.cdiv(inner, BLOCK_INNER)
    first_tile = program // channel_blocks * strip
    last_tile = tl.minimum(first_tile + strip, tiles)
    weight = _load_weight(weight_ptr, weight_stride, channel, channels)
    counts = zero_counters(BLOCK_CHANNELS, BLOCK_INNER // REPEATS, edges)
    positions = tl.zeros((BLOCK_INNER,), tl.int32)
    image = first_tile // inner_blocks
    block = first_tile % inner_blocks
    for _ in tl.range(first_tile, last_tile, num_stages=STAGES):
        position = block * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        inside = (channel < channels)[:, None] & (position < inner)[None, :]
        offset = (image * channels + channel)[:, None] * inner + position[None, :]
        x = _load(x_ptr + offset, inside)
        if y_ptr is not None:
            y = activate(x, ACTIVATION, parameters, weight[:, None])
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
        counted = position < inner
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + image * inner + position, mask=position < inner, other=0) != 0
            x = tl.where(counted[None, :], x, float("nan"))
        if nan_ptr is not None:
            positions += counted
        counts = count_lanes(counts, x, edges, REPEATS, 1)
        # A division for every tile would cost as much as three of its values.
        is_last_of_plane = block + 1 == inner_blocks
        image += is_last_of_plane
        block = tl.where(is_last_of_plane, 0, block + 1)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 1, True, first_channel, channel, channels, edges)


@triton.jit
def _load(pointers, inside):
    """Load as float32; what lies outside reads as NaN, which is in no state and so needs no test of its own."""
    return tl.load(pointers, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _load_weight(weight_ptr, weight_stride, channel, channels):
    if weight_ptr is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(weight_ptr + channel * weight_stride, mask=channel < channels, other=0).to(tl.float32)


@triton.jit
def _add_counts(
    counts_ptr,
    nan_ptr,
    counts,
    positions,
    AXIS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    first_channel,
    channel,
    channels,
    edges,
):
    """Sum the lanes' counts over AXIS and add them to memory: an atomic per channel for each count that is not 0.

    `counts_ptr` is [channels, states]. What was counted at `positions` and is in no state is added to `nan_ptr`. IS_WIDE says
    that a sum may be more than a lane can count.
    """
    if len(edges) == 0:
        on, off, zero = _sum_together(counts[0], AXIS, IS_WIDE)
        _add_in_order(counts_ptr, off, zero, on, first_channel, channels)
        numbers = on + off + zero
    else:
        numbers = _sum(counts[0], 0, AXIS)
        at_least = numbers
        for state in tl.static_range(len(edges)):
            beyond = _sum(counts[(state + 1) // 3], (state + 1) % 3, AXIS)
            atomic_add(counts_ptr + channel * (len(edges) + 1) + state, at_least - beyond, channel < channels)
            at_least = beyond
        atomic_add(counts_ptr + channel * (len(edges) + 1) + len(edges), at_least, channel < channels)
    if nan_ptr is not None:
        atomic_add(nan_ptr + channel, tl.sum(positions, 0) - numbers, channel < channels)


@triton.jit
def _add_in_order(counts_ptr, off, zero, on, first_channel, channels):
    """Add to rows of three as they lie in memory: neighbouring lanes add to neighbouring places, which are one transaction."""
    numbers = tl.join(tl.join(off, on), tl.join(zero, tl.zeros_like(zero))).reshape(4 * off.shape[0])
    number = tl.arange(0, 4 * off.shape[0])
    channel, column = first_channel + number // 4, number % 4
    atomic_add(counts_ptr + channel * 3 + column, numbers, (column < 3) & (channel < channels))


@triton.jit
def _sum_together(counts, AXIS: tl.constexpr, IS_WIDE: tl.constexpr):
    """Sum all three counts in one reduction, as they are or of 21 bits each: what waits for other threads is done once."""
    if not IS_WIDE:
        sums = tl.sum(counts, AXIS)
        return unpack(sums, 0), unpack(sums, 1), unpack(sums, 2)
    else:
        first, second, third = unpack(counts, 0), unpack(counts, 1), unpack(counts, 2)
        wide = first.to(tl.int64) + second.to(tl.int64) * _WIDE_SECOND + third.to(tl.int64) * _WIDE_THIRD
        sums = tl.sum(wide, AXIS)
        return sums & MOST_SUMMED, sums // _WIDE_SECOND & MOST_SUMMED, sums // _WIDE_THIRD


@triton.jit
def _sum(counts, PLACE: tl.constexpr, AXIS: tl.constexpr):
    return tl.sum(unpack(counts, PLACE), AXIS)
