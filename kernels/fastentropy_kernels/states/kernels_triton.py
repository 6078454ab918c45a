"""GPU: an activation and the states of its input in one pass, or the states alone.

Each lane packs three 10-bit counters into one int32 while its program reads a strip, and sums only the values that it holds
itself. After the strip the counts of the lanes are summed over the tile and added to memory once.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import activate
from fastentropy_kernels.counting_triton import atomic_add, count_lanes, unpack, zero_counters

# In a tile with more rows than this the sums over the lanes are wide; in an int32 a strip would be only a few tiles long.
MOST_NARROW: tl.constexpr = tl.constexpr(128)

# A wide sum is one int64 of three 21-bit counters: the second and the third of them, and the largest count that one holds.
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
    """One program owns a strip: `strip_rows` rows of BLOCK_CHANNELS channels, in tiles of BLOCK_ROWS x BLOCK_CHANNELS.

    Neighbouring programs own neighbouring channels of the same rows. Counts leave the registers once, after the strip.

    Args:
        x_ptr: [rows, channels] float32, float16 or bfloat16, rows `x_row_stride` apart.
        y_ptr: [rows, channels], rows `y_row_stride` apart, dtype of `x_ptr`: receives the activation; may be `x_ptr`.
            None to count alone.
        mask_ptr: [rows] bool, contiguous: positions where it is false are not counted. None to count all.
        counts_ptr: [channels, states] int64, contiguous: the counts are added to it. `states` is 3 (off, zero, on) without
            edges and len(edges) + 1 with edges.
        nan_ptr: [channels] int64: the number of NaN values is added to it. None not to count them.
        weight_ptr: [channels], dtype of `x_ptr`: the slopes of prelu. None for other activations.
        rows: number of rows.
        channels: number of channels.
        x_row_stride: distance between two rows of x, in elements.
        y_row_stride: distance between two rows of y, in elements.
        weight_stride: distance between two slopes, in elements; 0 where all channels share one.
        strip_rows: rows of a strip, a multiple of BLOCK_ROWS.
        parameters: tuple of float32 numbers, those of the activation.
        edges: tuple of float32 numbers in rising order, empty for the states off, zero and on.
        ACTIVATION: a key of `activations.ACTIVATIONS`.
        STAGES: how many tiles are loaded ahead.
        REPEATS: how many rows of a tile a lane holds.
        BLOCK_ROWS: rows of a tile.
        BLOCK_CHANNELS: channels of a tile.
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
    """One program owns a strip: BLOCK_CHANNELS channels, and `strip` of the `tiles` that these have over outer and inner.

    A tile is BLOCK_CHANNELS x BLOCK_INNER values of one outer index. Planes are `inner_multiples * INNER_MULTIPLE` long: the
    product tells the compiler how every plane is aligned. Counts leave the registers once, after the strip.

    Args:
        x_ptr: [outer, channels, inner] float32, float16 or bfloat16, contiguous.
        y_ptr: [outer, channels, inner], contiguous, dtype of `x_ptr`: receives the activation; may be `x_ptr`.
            None to count alone.
        mask_ptr: [outer, inner] bool, contiguous: positions where it is false are not counted. None to count all.
        counts_ptr: [channels, states] int64, contiguous: the counts are added to it. `states` is 3 (off, zero, on) without
            edges and len(edges) + 1 with edges.
        nan_ptr: [channels] int64: the number of NaN values is added to it. None not to count them.
        weight_ptr: [channels], dtype of `x_ptr`: the slopes of prelu. None for other activations.
        tiles: number of tiles of a block of channels, `outer * cdiv(inner, BLOCK_INNER)`.
        channels: number of channels.
        inner_multiples: length of a plane, in multiples of INNER_MULTIPLE.
        weight_stride: distance between two slopes, in elements; 0 where all channels share one.
        strip: tiles of a strip.
        parameters: tuple of float32 numbers, those of the activation.
        edges: tuple of float32 numbers in rising order, empty for the states off, zero and on.
        ACTIVATION: a key of `activations.ACTIVATIONS`.
        STAGES: how many tiles are loaded ahead.
        REPEATS: how many positions of a plane a lane holds in a tile.
        INNER_MULTIPLE: a power of two that divides the length of a plane.
        BLOCK_CHANNELS: channels of a tile.
        BLOCK_INNER: positions of a plane in a tile.
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
        # A division in every tile would cost as much as three values.
        is_last_of_plane = block + 1 == inner_blocks
        image += is_last_of_plane
        block = tl.where(is_last_of_plane, 0, block + 1)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 1, True, first_channel, channel, channels, edges)


@triton.jit
def _load(pointers, inside):
    """Load as float32. Values outside read as NaN, which is in no state and so needs no test of its own."""
    return tl.load(pointers, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _load_weight(weight_ptr, weight_stride, channel, channels):
    """Load the slopes of the channels as float32; return zeros where there are none."""
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
    """Sum the counts of the lanes over AXIS and add them to memory, with one atomic per channel for each count but 0.

    Args:
        counts_ptr: [channels, states] int64.
        nan_ptr: [channels] int64 or None; what was counted at `positions` and is in no state is added to it.
        counts: the counters of the lanes, as `count_lanes` returns them.
        positions: int32, how often each position of the tile was counted.
        AXIS: the axis of the tile that does not run over channels.
        IS_WIDE: whether a sum may exceed what a lane can count.
        first_channel: first channel of the tile.
        channel: [BLOCK_CHANNELS] int64, the channels of the tile.
        channels: number of channels.
        edges: the edges of the histogram, empty for signs.
    """
    if len(edges) == 0:
        on, off, zero = _sum_packed(counts[0], AXIS, IS_WIDE)
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
    """Add to rows of three in the order of memory: neighbouring lanes add to neighbours, which takes one transaction."""
    numbers = tl.join(tl.join(off, on), tl.join(zero, tl.zeros_like(zero))).reshape(4 * off.shape[0])
    number = tl.arange(0, 4 * off.shape[0])
    channel, column = first_channel + number // 4, number % 4
    atomic_add(counts_ptr + channel * 3 + column, numbers, (column < 3) & (channel < channels))


@triton.jit
def _sum_packed(counts, AXIS: tl.constexpr, IS_WIDE: tl.constexpr):
    """Sum all three counters in one reduction, so that threads wait for each other once.

    The counters keep their 10 bits, or get 21 bits where the sums are wide.
    """
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
    """Sum the counter at PLACE over AXIS."""
    return tl.sum(unpack(counts, PLACE), AXIS)
