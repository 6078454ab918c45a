"""GPU: kernels that count the states of a tensor, and compute its activation (times a gate) in the same pass if requested.

Each program reads a strip of tiles. Its lanes count three states in 10-bit counters of one int32, each for its own values
only. After the strip, the counts are summed over the lanes and added to memory once.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import activate
from fastentropy_kernels.counting_triton import atomic_add, count_lanes, unpack, zero_counters

# The lanes of a tile with more rows than this are summed with wide (21-bit) counters. With 10-bit counters, a strip could be
# only a few tiles long.
MAX_NARROW: tl.constexpr = tl.constexpr(128)

# A wide sum packs three 21-bit counters into one int64. Adding _WIDE_SECOND or _WIDE_THIRD adds one to the second or third
# counter. MAX_SUMMED is the largest count that a counter can hold.
_WIDE_SECOND: tl.constexpr = tl.constexpr(1 << 21)
_WIDE_THIRD: tl.constexpr = tl.constexpr(1 << 42)
MAX_SUMMED: tl.constexpr = tl.constexpr((1 << 21) - 1)


@triton.jit
def states_rows_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    gate_ptr,
    nan_ptr,
    weight_ptr,
    rows,
    channels,
    x_row_stride,
    y_row_stride,
    gate_row_stride,
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
    """Count, for each channel, how many values of x are in each state, and write the activation of x if `y_ptr` is given.

    One program counts a strip: `strip_rows` rows of BLOCK_CHANNELS channels, in tiles of BLOCK_ROWS x BLOCK_CHANNELS.
    Consecutive programs read neighbouring channels of the same rows. The counts stay in registers until the end of the strip.

    Args:
        x_ptr: [rows, channels] float32, float16 or bfloat16, with row stride `x_row_stride` and channel stride 1.
        y_ptr: [rows, channels], dtype of `x_ptr`, with row stride `y_row_stride`; receives the activation. It may equal
            `x_ptr`. None to count only.
        mask_ptr: [rows] bool, contiguous. Rows at which it is false are not counted. None to count all.
        counts_ptr: [channels, states] int64, contiguous; the counts are added to it. `states` is 3 (off, zero, on) without
            edges and len(edges) + 1 with edges.
        gate_ptr: [rows, channels], dtype of `x_ptr`, with row stride `gate_row_stride`; the activation is multiplied by it.
            None not to multiply.
        nan_ptr: [channels] int64; the number of NaN values of each channel is added to it. None not to count them.
        weight_ptr: [channels], dtype of `x_ptr`, the slopes of prelu. None for other activations.
        rows: number of rows.
        channels: number of channels.
        x_row_stride: distance between two rows of x, in elements.
        y_row_stride: distance between two rows of y, in elements.
        gate_row_stride: distance between two rows of the gate, in elements.
        weight_stride: distance between two slopes, in elements; 0 if all channels share one slope.
        strip_rows: number of rows in a strip, a multiple of BLOCK_ROWS.
        parameters: tuple of float32 numbers, the parameters of the activation.
        edges: tuple of float32 numbers in rising order, which divide the values of x into len(edges) + 1 states. A value that
            equals an edge belongs to the state above it. Empty for the states off (x < 0), zero and on (x > 0).
        ACTIVATION: a key of `activations.ACTIVATIONS`.
        STAGES: `num_stages` of the loop over tiles.
        REPEATS: how many rows of a tile are added into the same counter.
        BLOCK_ROWS: number of rows in a tile.
        BLOCK_CHANNELS: number of channels in a tile.
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
            y = activate(x, ACTIVATION, parameters, weight[None, :]).to(y_ptr.dtype.element_ty)
            if gate_ptr is not None:
                y = _product(y, gate_ptr + row[:, None] * gate_row_stride + channel[None, :], inside)
            tl.store(y_ptr + row[:, None] * y_row_stride + channel[None, :], y, mask=inside)
        counted = row < rows
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + row, mask=row < rows, other=0) != 0
            x = tl.where(counted[:, None], x, float("nan"))
        if nan_ptr is not None:
            positions += counted
        counts = count_lanes(counts, x, edges, REPEATS, 0)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 0, BLOCK_ROWS > MAX_NARROW, first_channel, channel, channels, edges)


@triton.jit
def states_planes_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    gate_ptr,
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
    """Count the states of planes for each channel, and write their activation if `y_ptr` is given.

    A tile is BLOCK_CHANNELS x BLOCK_INNER values with the same outer index. A block of BLOCK_CHANNELS channels consists of
    `tiles` tiles, over all outer and inner indices. One program counts a strip: `strip` successive tiles of a block. The
    counts stay in registers until the end of the strip.

    The length of a plane is given as `inner_multiples * INNER_MULTIPLE`, because the product tells the compiler how each plane
    is aligned.

    Args:
        x_ptr: [outer, channels, inner] float32, float16 or bfloat16, contiguous.
        y_ptr: [outer, channels, inner], dtype of `x_ptr`, contiguous; receives the activation. It may equal `x_ptr`. None to
            count only.
        mask_ptr: [outer, inner] bool, contiguous. Positions at which it is false are not counted. None to count all.
        counts_ptr: [channels, states] int64, contiguous; the counts are added to it. `states` is 3 (off, zero, on) without
            edges and len(edges) + 1 with edges.
        gate_ptr: [outer, channels, inner], dtype of `x_ptr`, contiguous; the activation is multiplied by it. None not to
            multiply.
        nan_ptr: [channels] int64; the number of NaN values of each channel is added to it. None not to count them.
        weight_ptr: [channels], dtype of `x_ptr`, the slopes of prelu. None for other activations.
        tiles: number of tiles of a block of channels, `outer * cdiv(inner, BLOCK_INNER)`.
        channels: number of channels.
        inner_multiples: length of a plane, divided by INNER_MULTIPLE.
        weight_stride: distance between two slopes, in elements; 0 if all channels share one slope.
        strip: number of tiles in a strip.
        parameters: tuple of float32 numbers, the parameters of the activation.
        edges: tuple of float32 numbers in rising order, which divide the values of x into len(edges) + 1 states. A value that
            equals an edge belongs to the state above it. Empty for the states off (x < 0), zero and on (x > 0).
        ACTIVATION: a key of `activations.ACTIVATIONS`.
        STAGES: `num_stages` of the loop over tiles.
        REPEATS: how many positions of a plane each lane counts in a tile.
        INNER_MULTIPLE: a power of two that divides the length of a plane.
        BLOCK_CHANNELS: number of channels in a tile.
        BLOCK_INNER: number of positions of a plane in a tile.
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
            y = activate(x, ACTIVATION, parameters, weight[:, None]).to(y_ptr.dtype.element_ty)
            if gate_ptr is not None:
                y = _product(y, gate_ptr + offset, inside)
            tl.store(y_ptr + offset, y, mask=inside)
        counted = position < inner
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + image * inner + position, mask=position < inner, other=0) != 0
            x = tl.where(counted[None, :], x, float("nan"))
        if nan_ptr is not None:
            positions += counted
        counts = count_lanes(counts, x, edges, REPEATS, 1)
        # Step to the next tile without a division, because a division per tile would cost as much as counting three values.
        is_last_of_plane = block + 1 == inner_blocks
        image += is_last_of_plane
        block = tl.where(is_last_of_plane, 0, block + 1)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 1, True, first_channel, channel, channels, edges)


@triton.jit
def _load(pointers, inside):
    """Load a tile as float32.

    Args:
        pointers: pointers to the values.
        inside: bool, whether a value exists. NaN is returned for the others; it has no state, so no later test is needed.
    """
    return tl.load(pointers, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _product(y, gate_pointers, inside):
    """Return the product of an activation and its gate, as PyTorch rounds it: once more after the activation was rounded.

    Args:
        y: tile of the activation, in the dtype of the output.
        gate_pointers: pointers to the values of the gate, of the same dtype.
        inside: bool, whether a value exists.
    """
    return (y.to(tl.float32) * _load(gate_pointers, inside)).to(y.dtype)


@triton.jit
def _load_weight(weight_ptr, weight_stride, channel, channels):
    """Load the slopes of prelu for the channels of a tile as float32, or return zeros if there are none.

    Args:
        weight_ptr: the slopes, or None.
        weight_stride: distance between two slopes, in elements.
        channel: [BLOCK_CHANNELS] int64, the channels of the tile.
        channels: number of channels.
    """
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
    """Sum the counters of the lanes over AXIS, and add the sums to memory.

    There is one atomic addition for each channel and state whose count is not 0.

    Args:
        counts_ptr: [channels, states] int64; the counts are added to it.
        nan_ptr: [channels] int64 or None; the numbers of NaN values are added to it. They are the counted values without a
            state.
        counts: the counters of the lanes, as `count_lanes` returns them.
        positions: [BLOCK_ROWS] or [BLOCK_INNER] int32, how often each position of the tile was counted in the strip.
        AXIS: the axis of the tile that does not run over channels.
        IS_WIDE: whether a sum may exceed 10 bits, the size of a lane's counter.
        first_channel: the first channel of the tile.
        channel: [BLOCK_CHANNELS] int64, the channels of the tile.
        channels: number of channels.
        edges: the edges of the histogram; empty to count off, zero and on.
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
    """Add the counts of off, zero and on to memory, in the order of their addresses.

    Neighbouring lanes then add to neighbouring addresses, which takes one transaction.

    Args:
        counts_ptr: [channels, 3] int64.
        off: [BLOCK_CHANNELS] counts of a block of channels.
        zero: [BLOCK_CHANNELS] counts.
        on: [BLOCK_CHANNELS] counts.
        first_channel: the first channel of the block.
        channels: number of channels.
    """
    numbers = tl.join(tl.join(off, on), tl.join(zero, tl.zeros_like(zero))).reshape(4 * off.shape[0])
    number = tl.arange(0, 4 * off.shape[0])
    channel, column = first_channel + number // 4, number % 4
    atomic_add(counts_ptr + channel * 3 + column, numbers, (column < 3) & (channel < channels))


@triton.jit
def _sum_packed(counts, AXIS: tl.constexpr, IS_WIDE: tl.constexpr):
    """Sum the three packed counters of the lanes over AXIS, in one reduction.

    One reduction makes the threads of a program wait for each other only once.

    Args:
        counts: int32 tile, three 10-bit counters in each lane.
        AXIS: the axis to sum over.
        IS_WIDE: whether the counters are widened to 21 bits before the sum.

    Returns:
        The sums of the first, the second and the third counter.
    """
    if not IS_WIDE:
        sums = tl.sum(counts, AXIS)
        return unpack(sums, 0), unpack(sums, 1), unpack(sums, 2)
    else:
        first, second, third = unpack(counts, 0), unpack(counts, 1), unpack(counts, 2)
        wide = first.to(tl.int64) + second.to(tl.int64) * _WIDE_SECOND + third.to(tl.int64) * _WIDE_THIRD
        sums = tl.sum(wide, AXIS)
        return sums & MAX_SUMMED, sums // _WIDE_SECOND & MAX_SUMMED, sums // _WIDE_THIRD


@triton.jit
def _sum(counts, PLACE: tl.constexpr, AXIS: tl.constexpr):
    """Sum one of the three packed counters of the lanes over AXIS: the one with index PLACE (0, 1 or 2)."""
    return tl.sum(unpack(counts, PLACE), AXIS)
