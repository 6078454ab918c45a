"""The two memory layouts that the kernels read, and the conversion of any tensor to one of them.

- *Rows* are a matrix `[rows, channels]` whose channels are adjacent in memory.
- *Planes* are a contiguous tensor `[outer, channels, inner]`.

The axes of every dense tensor can be reordered and merged so that it has one of these layouts. A kernel therefore needs two
cases, and no stride but the distance between two rows.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import Tensor


class Arranged(NamedTuple):
    """A tensor viewed as a matrix of rows or as a stack of planes.

    Attributes:
        values: *rows* are `[rows, channels]` with channel stride 1 and any row stride; *planes* are
            `[outer, channels, inner]`, contiguous.
        mask: contiguous bool of shape `[rows]` or `[outer, inner]`, or None if there is no mask.
        order: the axes of the original tensor in the order of `values`, slowest first.
        channel: the index of the channel axis in `order`.
    """

    values: Tensor
    mask: Tensor | None
    order: tuple[int, ...]
    channel: int

    def view(self, y: Tensor) -> Tensor | None:
        """Return `y`, a tensor with the shape of the original, as a view with the shape of `values`.

        The result is None if the strides of `y` do not allow such a view without a copy.
        """
        return _merge_axes(y if self.order == tuple(range(y.ndim)) else y.permute(self.order), self.channel)

    def arrange(self, other: Tensor) -> Tensor:
        """Return `other`, a tensor with the shape of the original, with the shape of `values`: as a view, or as a copy."""
        view = self.view(other)
        return other.permute(self.order).contiguous().view(self.values.shape) if view is None else view


def arrange(x: Tensor, channel_axis: int, mask: Tensor | None) -> Arranged:
    """Return `x` as rows or planes, as a view if its strides allow that and as a copy otherwise.

    A tensor without gaps is contiguous once its axes are sorted by stride. The axes slower than the channel axis are merged
    into one, and so are the faster axes. Channels-last images and transposed matrices are therefore never copied. Rows with a
    constant stride (a slice of the channel axis) are not copied either. All other tensors, with gaps inside planes or with
    expanded axes, are copied once.

    Args:
        x: a tensor of any strides, not empty.
        channel_axis: the axis of the neurons, not negative.
        mask: bool, with the shape of `x` without the channel axis, or None. The mask is copied if its reordered axes are not
            contiguous.
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
    """Return a view of `x` in which the axes before the channel axis are one, and those after it are one.

    The result is None if the strides of `x` do not allow such a view without a copy.
    """
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
    """Return the shape of rows or planes without their channel axis."""
    return (values.shape[0], *values.shape[2:])


def is_channels_last(images: Tensor) -> bool:
    """Return whether the channels are the fastest axis of `images` `[batch, channels, height, width]`.

    Gaps between pixels are allowed. With a single channel the strides decide, as in PyTorch. Images that consist of a single
    value are not channels-last.
    """
    _, channels, height, width = images.shape
    _, channel_stride, _, column_stride = images.stride()
    return bool(channel_stride == 1 and column_stride >= channels and channels * height * width > 1)


def largest_power_of_2(size: int) -> int:
    """Return the largest power of two, at most 16, that divides `size`.

    A larger one would make no memory access wider.
    """
    return size & -size if size % 16 else 16
