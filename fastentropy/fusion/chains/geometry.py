"""Define the geometry of an operator along one spatial axis, and of the operators that are composed or added along it.

The geometry says which positions of the input a tap (an entry of the kernel) reads. It holds no weights.
"""

import math
from typing import NamedTuple


class Axis(NamedTuple):
    """The geometry of an operator along one spatial axis.

    Attributes:
        kernel: number of taps.
        stride: distance between the input positions that two neighbouring outputs read.
        before: number of zeros padded before the first position; a negative number removes positions instead.
        after: number of zeros padded after the last position; a negative number removes positions instead.
        dilation: distance between two neighbouring taps.
        upsampling: distance between two neighbouring input values after zeros are inserted between them; 1 inserts none.
    """

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1
    upsampling: int = 1

    @property
    def reach(self) -> int:
        """Return the distance from the first tap to the last, in positions."""
        return (self.kernel - 1) * self.dilation

    def output_size(self, size: int) -> int:
        """Return the number of output positions for an input with `size` positions."""
        stuffed = (size - 1) * self.upsampling + 1
        return (stuffed + self.before + self.after - self.reach - 1) // self.stride + 1


def compose_axes(first: Axis, second: Axis) -> Axis:
    """Return the geometry of a composition along one axis; raise ValueError if no convolution has that geometry."""
    if second.upsampling > 1 and first.stride > 1:
        raise ValueError("a transposed convolution behind a strided one: together they are no convolution")
    stride, upsampling = first.stride * second.stride, first.upsampling * second.upsampling
    if stride > 1 and upsampling > 1:
        raise ValueError("a strided convolution behind a transposed one: together they are no convolution")
    spread, spacing = second.upsampling * first.dilation, first.stride * second.dilation
    dilation = _common_step(first.kernel, spread, second.kernel, spacing) or max(first.dilation, second.dilation)
    kernel = ((first.kernel - 1) * spread + (second.kernel - 1) * spacing) // dilation + 1
    before, after = (
        second.upsampling * inner + first.stride * outer
        for inner, outer in ((first.before, second.before), (first.after, second.after))
    )
    return Axis(kernel, stride, before, after, dilation, upsampling)


def sizes_agree(left: Axis, right: Axis) -> bool:
    """Return whether two operators give the same output size along an axis for every input size."""
    margins = {axis.reach - axis.before - axis.after for axis in (left, right)}
    return len(margins) == 1 and (left.stride, left.upsampling) == (right.stride, right.upsampling)


def add_axes(left: Axis, right: Axis) -> Axis:
    """Return the geometry along one axis of a kernel that contains the taps of both operators."""
    step = _common_step(left.kernel, left.dilation, right.kernel, right.dilation)
    dilation = math.gcd(step, left.before - right.before) or max(left.dilation, right.dilation)
    before, after = max(left.before, right.before), max(left.after, right.after)
    reach = left.reach - left.before - left.after + before + after
    return Axis(reach // dilation + 1, left.stride, before, after, dilation, left.upsampling)


def _common_step(k1: int, d1: int, k2: int, d2: int) -> int:
    """Return the largest dilation whose grid contains the taps of two kernels, or 0 if each kernel has one tap.

    k1 and k2 are the numbers of taps along an axis, d1 and d2 the distances between neighbouring taps.
    """
    return math.gcd(d1 if k1 > 1 else 0, d2 if k2 > 1 else 0)


def is_transposed(axis: Axis) -> bool:
    """Return whether PyTorch's transposed convolution has a padding and an output padding for this geometry."""
    return axis.before <= axis.reach and 0 <= axis.after - axis.before < max(axis.upsampling, axis.dilation)
