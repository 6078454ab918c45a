"""Define selections: linear operators each of whose outputs is one value of the input.

They are chosen channels, permuted channels, pixel shuffles and repeated positions. A selection composes like any other
operator, and runs as the operator of PyTorch that it was read from, which only copies.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator

_aten = torch.ops.aten

#: Repetitions of positions for 1, 2 and 3 spatial axes, in this order.
NEAREST = (_aten.upsample_nearest1d.vec, _aten.upsample_nearest2d.vec, _aten.upsample_nearest3d.vec)


@dataclass(frozen=True, eq=False, kw_only=True)
class Selection(AffineOperator):
    """An affine operator with a weight of zeros and ones and no bias, and the cheap operator that computes the same.

    Attributes:
        target: the operator of PyTorch. Its first argument is the input.
        arguments: its further arguments. Axes are counted from the last one, so that the batch axis may be missing.
    """

    target: Any
    arguments: tuple[Any, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the cheap operator to x. Positions at the end that do not fill a step of the stride are left out."""
        for index, axis in enumerate(self.axes):
            dim = x.ndim - len(self.axes) + index
            x = x.narrow(dim, 0, self.read_size(index, x.shape[dim])) if axis.stride > 1 else x
        selected: Tensor = self.target(x, *self.arguments)
        return selected

    def read_size(self, axis: int, size: int) -> int:
        """Return how many of `size` positions along a spatial axis are read: a multiple of the stride."""
        return size // self.stride[axis] * self.stride[axis]

    @property
    def repeats(self) -> bool:
        """Return whether the operator only repeats positions of each channel."""
        return self.groups == self.in_channels == self.out_channels and any(axis.upsampling > 1 for axis in self.axes)

    def tap_sum(self) -> Tensor:
        """Return the weight with which the operator reads an input that is constant per channel."""
        return self.weight.flatten(2)[..., 0] if self.repeats else super().tap_sum()

    def multiplications(self, shape: Sequence[int]) -> int:
        """Return the number of multiplications: none."""
        return 0

    def as_convolution(self) -> AffineOperator:
        """Return the same operator as one that runs as a convolution or a linear layer."""
        return AffineOperator(**{field.name: getattr(self, field.name) for field in fields(AffineOperator) if field.init})


class Window(Selection):
    """Positions that are padded with zeros or cut off at both ends. Of the others, every n-th may be kept."""

    def read_size(self, axis: int, size: int) -> int:
        """Return how many of `size` positions along a spatial axis are given to the cheap operator: all of them."""
        return size


def selected_channels(index: Tensor, channels: int, axes: int, *, has_batch: bool = False) -> Selection:
    """Return the operator whose output channels are some of the input channels.

    Args:
        index: the input channel of each output channel: int64, `[out_channels]`.
        channels: number of input channels.
        axes: number of spatial axes.
        has_batch: whether a single batch axis comes before the channels of every input.
    """
    weight = F.one_hot(index, channels).to(torch.float64).reshape(len(index), channels, *(1,) * axes)
    target, *arguments = _cheapest(index, channels, axes, has_batch and axes > 0)
    return Selection(**_fields(weight, axes), target=target, arguments=tuple(arguments))


def _cheapest(index: Tensor, channels: int, axes: int, may_shuffle: bool) -> tuple[Any, ...]:
    """Return the operator that chooses channels fastest, and its further arguments; those of `selected_channels` say which.

    `index_select` is slow in channels-last, and a slice copies nothing.
    """
    dim, order = -axes - 1, index.tolist()
    step = order[1] - order[0] if len(order) > 1 else 1
    if step > 0 and order == list(range(order[0], order[-1] + 1, step)):
        return _aten.slice.Tensor, dim, order[0], order[-1] + 1, step
    if order == list(range(channels))[::-1]:
        return _aten.flip.default, [dim]
    shift = channels - order[0]
    if order == [*range(order[0], channels), *range(order[0])]:
        return _aten.roll.default, [shift], [dim]
    for groups in range(2, channels if may_shuffle and channels == len(order) else 0):
        if channels % groups == 0 and order == torch.arange(channels, device="cpu").reshape(groups, -1).T.flatten().tolist():
            return _aten.channel_shuffle.default, groups
    return _aten.index_select.default, dim, index


def pixel_unshuffle(channels: int, factor: int, device: torch.device) -> Selection:
    """Return the operator that moves blocks of factor × factor positions into channels: a strided convolution."""
    weight = torch.eye(factor**2, dtype=torch.float64, device=device).reshape(-1, 1, factor, factor)
    geometry: dict[str, Any] = {**_fields(weight.repeat(channels, 1, 1, 1), 2), "stride": (factor,) * 2, "groups": channels}
    return Selection(**geometry, target=_aten.pixel_unshuffle.default, arguments=(factor,))


def pixel_shuffle(channels: int, factor: int, device: torch.device) -> Selection:
    """Return the operator that moves channels into blocks of factor × factor positions: a transposed convolution.

    Args:
        channels: number of output channels.
        factor: size of a block.
        device: the device of the weight.
    """
    blocks = torch.eye(factor**2, dtype=torch.float64, device=device).reshape(1, -1, factor, factor).flip(2, 3)
    weight = blocks.repeat(channels, 1, 1, 1)
    return Selection(**_transposed(weight, (factor,) * 2, channels), target=_aten.pixel_shuffle.default, arguments=(factor,))


def repeated_positions(channels: int, factors: Sequence[int], device: torch.device) -> Selection:
    """Return nearest upsampling by whole factors, one per spatial axis: a transposed depthwise convolution with ones."""
    weight = torch.ones(channels, 1, *factors, dtype=torch.float64, device=device)
    arguments = (None, [float(factor) for factor in factors])
    return Selection(**_transposed(weight, tuple(factors), channels), target=NEAREST[len(factors) - 1], arguments=arguments)


def window(channels: int, margins: Sequence[tuple[int, int]], stride: Sequence[int], device: torch.device) -> Window:
    """Return the operator that pads or crops positions and then keeps every n-th.

    Args:
        channels: number of channels.
        margins: for each spatial axis, the numbers of zeros before and after. A negative number cuts positions off. Along an
            axis with a stride above 1, and along all other axes then, there are no zeros.
        stride: for each spatial axis, the number n. It is above 1 for at most one axis.
        device: the device of the weight.
    """
    weight = torch.ones(channels, 1, *(1,) * len(margins), dtype=torch.float64, device=device)
    geometry: dict[str, Any] = {**_fields(weight, len(margins)), "padding": tuple(margins), "stride": tuple(stride)}
    changed = [axis for axis, numbers in enumerate(zip(margins, stride, strict=True)) if numbers != ((0, 0), 1)]
    if len(changed) == 1 and max(margins[changed[0]]) <= 0:
        before, after = margins[changed[0]]
        positions = -before, after if after else sys.maxsize, stride[changed[0]]
        return Window(**geometry, groups=channels, target=_aten.slice.Tensor, arguments=(changed[0] - len(margins), *positions))
    numbers = [number for margin in reversed(margins) for number in margin]
    return Window(**geometry, groups=channels, target=_aten.constant_pad_nd.default, arguments=(numbers,))


def summed_positions(channels: int, sizes: Sequence[int], device: torch.device) -> Selection:
    """Return the sum over positions, which is no selection, but runs as a cheap operator too.

    Args:
        channels: number of channels.
        sizes: for each spatial axis, its size, or 1 if it is not summed.
        device: the device of the weight.
    """
    weight = torch.ones(channels, 1, *sizes, dtype=torch.float64, device=device)
    geometry: dict[str, Any] = {**_fields(weight, len(sizes)), "stride": tuple(sizes), "groups": channels}
    dims = [axis - len(sizes) for axis, size in enumerate(sizes) if size > 1]
    return Selection(**geometry, target=_aten.sum.dim_IntList, arguments=(dims, True))


def is_exact_factor(factor: int, size: int) -> bool:
    """Return whether nearest upsampling to `size` positions repeats each position `factor` times.

    PyTorch multiplies the output position by 1 / factor in float32, which must not round to a number below the exact one.
    """
    inverse = float(torch.tensor(1 / factor, dtype=torch.float32, device="cpu"))
    return math.log2(factor).is_integer() or (inverse >= 1 / factor and size < 2**20 // factor)


def _fields(weight: Tensor, axes: int) -> dict[str, Any]:
    """Return the fields of an operator without padding, dilation, stride or bias."""
    ones = (1,) * axes
    return {"weight": weight, "bias": weight.new_zeros(len(weight)), "stride": ones, "padding": (0,) * axes, "dilation": ones}


def _transposed(weight: Tensor, factors: tuple[int, ...], channels: int) -> dict[str, Any]:
    """Return the fields of an operator that inserts factor − 1 zeros, so that each output reads one value of the input."""
    padding = tuple(factor - 1 for factor in factors)
    return {**_fields(weight, len(factors)), "padding": padding, "upsampling": factors, "groups": channels}
