"""The two layouts that the kernels know, and how a tensor of any strides becomes a view of one of them.

Every dense tensor is *rows* `[rows, channels]` or *planes* `[outer, channels, inner]`, so that a kernel needs two loops and
no strides but the distance between rows.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor


class Arranged(NamedTuple):
    """A tensor seen as rows or planes.

    Attributes:
        values: *rows* `[rows, channels]` (the channel fastest, any distance between rows) or *planes*
            `[outer, channels, inner]` (contiguous).
        mask: bool, contiguous, with the axes of `values` without the channel; None where there is no mask.
        order: the axes of the original tensor, slowest first.
        channel: the index of the channel axis in `order`.
    """

    values: Tensor
    mask: Tensor | None
    order: tuple[int, ...]
    channel: int

    def view(self, y: Tensor) -> Tensor | None:
        """Return a tensor of the original's shape in the same view; None where its strides do not allow it."""
        return _merge_axes(y if self.order == tuple(range(y.ndim)) else y.permute(self.order), self.channel)


def arrange(x: Tensor, channel_axis: int, mask: Tensor | None) -> Arranged:
    """Return `x` as rows or planes. `channel_axis` is not negative and `x` is not empty.

    With its axes sorted by stride, every tensor without gaps is contiguous. The axes slower than the channel merge into one,
    and the faster axes into another. So channels-last images and transposed matrices cost nothing. Rows at equal distances (a
    slice of the hidden axis) are taken as they are. All other tensors (gaps inside planes, expanded axes) are copied once.
    """
    order = tuple(range(x.ndim))
    values = None
    if not x.is_contiguous():
        by_stride = tuple(sorted(order, key=x.stride, reverse=True))
        values = _merge_axes(x.permute(by_stride), by_stride.index(channel_axis))
        if values is not None:
            order = by_stride
    if values is None:
        values = _merge_axes(x.contiguous(), channel_axis)
        assert values is not None
    if mask is not None:
        mask_order = [axis - (axis > channel_axis) for axis in order if axis != channel_axis]
        mask = mask.permute(mask_order).reshape(_without_channel(values)).contiguous()
    return Arranged(values, mask, order, order.index(channel_axis))


def _merge_axes(x: Tensor, channel_axis: int) -> Tensor | None:
    """Merge the axes before and those after the channel without a copy; return None where the strides do not allow it."""
    if x.ndim - 1 == channel_axis == 1 and x.stride(1) == 1:
        return x
    outer, channels, inner = prod(x.shape[:channel_axis]), x.shape[channel_axis], prod(x.shape[channel_axis + 1 :])
    if x.is_contiguous():
        return x.view(outer, channels) if inner == 1 else x.view(outer, channels, inner)
    if inner > 1 or (channels > 1 and x.stride(channel_axis) != 1):
        return None
    try:
        return x.view(outer, channels)
    except RuntimeError:
        return None


def _without_channel(values: Tensor) -> tuple[int, ...]:
    return (values.shape[0], *values.shape[2:])


def is_channels_last(images: Tensor) -> bool:
    """Return whether channels are the fastest axis of [batch, channels, height, width]; pixels may have gaps between them.

    For a single channel the strides decide, as in PyTorch. Images of a single value are not channels-last.
    """
    _, channels, height, width = images.shape
    _, channel_stride, _, column_stride = images.stride()
    return bool(channel_stride == 1 and column_stride >= channels and channels * height * width > 1)


def largest_power_of_2(size: int) -> int:
    """Return the largest power of two that divides `size`, up to 16. A larger one would make no access wider."""
    return size & -size if size % 16 else 16
