"""GPU: loads and products of tiles that the chain kernels share."""

from __future__ import annotations

# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import INTERPRETED

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def spread(along_positions, along_channels, CHANNELS_LAST: tl.constexpr):
    """See two vectors as the axes of a tile in the order of memory, whose last axis is the fastest."""
    if CHANNELS_LAST:
        return along_positions[:, None], along_channels[None, :]
    else:
        return along_positions[None, :], along_channels[:, None]


@triton.jit
def load_tile(pointer, offset, inside, channel, channels, channel_stride, CHANNELS_LAST: tl.constexpr):
    """Load positions by channels in the order of memory; what lies outside reads as 0, which adds nothing."""
    offset, along_channels = spread(offset, channel.to(tl.int64) * channel_stride, CHANNELS_LAST)
    inside, known = spread(inside, channel < channels, CHANNELS_LAST)
    return tl.load(pointer + offset + along_channels, mask=inside & known, other=0)


@triton.jit
def load_transposed(pointer, row, rows, column, columns):
    """Load a tile of a contiguous matrix [rows, columns] as [column, row]."""
    return tl.load(
        pointer + column[:, None] + row[None, :].to(tl.int64) * columns,
        mask=(column < columns)[:, None] & (row < rows)[None, :],
        other=0,
    )


@triton.jit
def dot(left, right, sums):
    """Add the matrix product in float32."""
    if _INTERPRETED:  # which would multiply the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")
