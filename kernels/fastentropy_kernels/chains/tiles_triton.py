"""GPU: loads and products of tiles, which all chain kernels share.

A tile has an axis of positions (pixels or rows) and an axis of channels, in the order of memory. Products are summed in
float32. float32 is multiplied exactly, without TF32; 16-bit formats run on the matrix units.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import INTERPRETED

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def load_tile(pointer, offset, inside, channel, channels, channel_stride, CHANNELS_LAST: tl.constexpr):
    """Load a tile of positions and channels in the order of memory. What lies outside reads as 0, which adds nothing.

    Args:
        pointer: the first value of images or rows, in any float dtype.
        offset: int64 `[positions]`, where each position begins, counted in values.
        inside: bool `[positions]`, whether there is something to read.
        channel: int32 `[block]`, the channels of the tile.
        channels: how many channels there are.
        channel_stride: distance between channels in values.
        CHANNELS_LAST: whether the tile is `[positions, block]`, with channels as the fastest axis, or its transpose.
    """
    offset, along_channels = spread(offset, channel.to(tl.int64) * channel_stride, CHANNELS_LAST)
    inside, exists = spread(inside, channel < channels, CHANNELS_LAST)
    return tl.load(pointer + offset + along_channels, mask=inside & exists, other=0)


@triton.jit
def spread(along_positions, along_channels, CHANNELS_LAST: tl.constexpr):
    """Return two vectors as the axes of a tile in the order of memory: its last axis is the fastest."""
    if CHANNELS_LAST:
        return along_positions[:, None], along_channels[None, :]
    else:
        return along_positions[None, :], along_channels[:, None]


@triton.jit
def load_transposed(pointer, row, rows, column, columns):
    """Load a tile `[column, row]` of the contiguous matrix `[rows, columns]` at `pointer`. What lies outside reads as 0."""
    return tl.load(
        pointer + column[:, None] + row[None, :].to(tl.int64) * columns,
        mask=(column < columns)[:, None] & (row < rows)[None, :],
        other=0,
    )


@triton.jit
def dot(left, right, sums):
    """Return `sums` plus the matrix product, in float32."""
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
