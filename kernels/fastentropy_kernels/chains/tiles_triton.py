"""GPU: loads and products of tiles, for all kernels of fused chains.

A tile has an axis of positions (pixels or rows) and an axis of channels. Its last axis is the one that is fastest in memory.
Products are summed in float32. float32 is multiplied exactly, without TF32. 16-bit formats are multiplied by the matrix units.
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
    """Load a tile of positions and channels, with the axis that is fastest in memory as the last.

    Positions and channels that do not exist are loaded as 0, which adds nothing to a sum.

    Args:
        pointer: the first value of images or rows, in any float dtype.
        offset: int64 `[positions]`, the distance from `pointer` to the first channel of each position, in values.
        inside: bool `[positions]`, whether the position exists.
        channel: `[block]`, the channels of the tile, any integer dtype.
        channels: number of channels. Larger elements of `channel` do not exist.
        channel_stride: distance between two channels, in values.
        CHANNELS_LAST: whether channels are the fastest axis. The tile is then `[positions, block]`, otherwise
            `[block, positions]`.
    """
    offset, along_channels = spread(offset, channel.to(tl.int64) * channel_stride, CHANNELS_LAST)
    inside, exists = spread(inside, channel < channels, CHANNELS_LAST)
    return tl.load(pointer + offset + along_channels, mask=inside & exists, other=0)


@triton.jit
def spread(along_positions, along_channels, CHANNELS_LAST: tl.constexpr):
    """Return a vector along positions and a vector along channels with the axes of a tile, so that they broadcast.

    Args:
        along_positions: `[positions]`, any dtype.
        along_channels: `[block]`, any dtype.
        CHANNELS_LAST: whether channels are the last axis of the tile.

    Returns:
        `[positions, 1]` and `[1, block]` if CHANNELS_LAST, otherwise `[1, positions]` and `[block, 1]`.
    """
    if CHANNELS_LAST:
        return along_positions[:, None], along_channels[None, :]
    else:
        return along_positions[None, :], along_channels[:, None]


@triton.jit
def load_transposed(pointer, row, rows, column, columns):
    """Load a transposed tile of a contiguous matrix. Elements outside the matrix are loaded as 0.

    Args:
        pointer: the matrix `[rows, columns]`.
        row: the rows to load, which become the last axis of the tile.
        rows: number of rows of the matrix.
        column: the columns to load, which become the first axis of the tile.
        columns: number of columns of the matrix.
    """
    return tl.load(
        pointer + column[:, None] + row[None, :].to(tl.int64) * columns,
        mask=(column < columns)[:, None] & (row < rows)[None, :],
        other=0,
    )


@triton.jit
def dot(left, right, sums):
    """Return the float32 tile `sums` plus the matrix product of `left` and `right`."""
    if _INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
