"""Define affine operators, their composition and their addition: the algebra of chains (stretches of linear operators).

Every operator is written as a convolution. A linear layer is a convolution without spatial axes. Batch norm in eval mode and
average pooling are depthwise convolutions. A transposed convolution is a convolution of an input with zeros inserted between
its values (Dumoulin and Visin, arXiv 1603.07285).

For output position o, tap t (entry t of the kernel) reads position s·o + d·t − p of the input after zeros were inserted. Here
s is the stride, d the dilation and p the padding. The rules of composition follow from this formula.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastentropy.fusion.chains.bias_slabs import BiasSlab
from fastentropy.fusion.chains.blocks import in_blocks, linear, multiply
from fastentropy.fusion.chains.geometry import Axis, add_axes, compose_axes, is_transposed, sizes_agree


@dataclass(frozen=True, eq=False)
class AffineOperator:
    """A convolution of a zero-padded input over 1, 2 or 3 spatial axes, or a linear layer, which has no spatial axes.

    Channels are axis 1 of the input, or its last axis if the operator has no spatial axes.

    Attributes:
        weight: `[out_channels, in_channels / groups, *kernel]`, in float64 or, if it is one of the model's, in its own dtype.
        bias: `[out_channels]`, or `[out_channels, *output_size]` if the bias depends on the position (a bias map).
        stride: one number per spatial axis.
        padding: one entry per spatial axis: the pair of the numbers of zeros before and after, or one number for both.
        dilation: one number per spatial axis.
        groups: number of groups of channels.
        upsampling: one number per spatial axis; upsampling − 1 zeros are inserted between two values of the input. It is 1
            unless the operator is a transposed convolution.
        names: paths of the modules that the operator was read from, in the order in which they are applied.
        border_bias: what is added to a bias `[out_channels]` near the borders, in place of a bias map.
        axes: the geometry of the fields above, as one `Axis` per spatial axis.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...] = ()
    padding: tuple[Any, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    upsampling: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    border_bias: tuple[BiasSlab, ...] = ()
    axes: tuple[Axis, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Complete `padding` and `upsampling`, and set `axes`.

        Raises ValueError if a field has the wrong number of entries, or if the output channels do not divide into the groups.
        """
        kernel = self.weight.shape[2:]
        upsampling = self.upsampling or (1,) * len(kernel)
        if not len(self.stride) == len(self.padding) == len(self.dilation) == len(upsampling) == len(kernel):
            raise ValueError(f"stride, padding and dilation must have {len(kernel)} entries each, one per kernel axis")
        if self.weight.shape[0] % self.groups:
            raise ValueError(f"{self.weight.shape[0]} output channels do not divide into {self.groups} groups")
        padding = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in self.padding)
        parts = zip(kernel, self.stride, padding, self.dilation, upsampling, strict=True)
        object.__setattr__(self, "padding", padding)
        object.__setattr__(self, "upsampling", upsampling)
        object.__setattr__(self, "axes", tuple(Axis(k, s, p[0], p[1], d, u) for k, s, p, d, u in parts))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Return the number of taps along each spatial axis."""
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        """Return the number of channels of the input."""
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Return the number of channels of the output."""
        return self.weight.shape[0]

    @property
    def has_uniform_bias(self) -> bool:
        """Return whether the bias is the same at all positions."""
        return self.bias.ndim == 1 and not self.border_bias

    @property
    def is_pointwise(self) -> bool:
        """Return whether each output position reads only the input position with the same index."""
        return all(axis._replace(dilation=1) == Axis(1) for axis in self.axes)

    @property
    def is_channelwise(self) -> bool:
        """Return whether each output channel is one input channel, scaled and shifted, as in batch norm."""
        return self.is_pointwise and self.groups == self.in_channels == self.out_channels

    @property
    def is_average(self) -> bool:
        """Return whether this is average pooling: each output channel is the mean of one input channel over the kernel."""
        depthwise = self.groups == self.in_channels == self.out_channels and self.has_uniform_bias and not self.is_pointwise
        dense = all(axis.upsampling == 1 and (axis.dilation == 1 or axis.kernel == 1) for axis in self.axes)
        return depthwise and dense and bool((self.weight.double() == 1 / math.prod(self.kernel)).all()) and not self.bias.any()

    @property
    def reads_zeros(self) -> bool:
        """Return whether the operator reads zeros that are not values of its input: zeros of its padding or upsampling."""
        return any(axis.before > 0 or axis.after > 0 or axis.upsampling > 1 for axis in self.axes)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the operator to x, in the dtype of x.

        The shape of x is `[batch, in_channels, *spatial]`, or `[..., in_channels]` if the operator has no spatial axes. The
        batch axis may be missing.
        """
        if not self.axes:
            return linear(x, self.dense_weight(), self.bias)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[len(self.axes) - 1]
        bias = self.bias if self.bias.ndim > 1 else self.bias.reshape(-1, *(1,) * len(self.axes))
        padding = [zeros for axis in reversed(self.axes) for zeros in (axis.before, axis.after)]
        padded = F.pad(self._upsample(x), [max(zeros, 0) for zeros in padding])
        cropped = F.pad(padded, [min(zeros, 0) for zeros in padding])
        geometry = (self.stride, 0, self.dilation, self.groups)
        output = convolution(cropped, self.weight.to(x.dtype), None, *geometry) + bias.to(x.dtype)
        for slab in self.border_bias:
            slab.add_to(output)
        return output

    def _upsample(self, x: Tensor) -> Tensor:
        """Return x with zeros inserted between its values along the spatial axes."""
        if all(axis.upsampling == 1 for axis in self.axes):
            return x
        sizes = [(n - 1) * axis.upsampling + 1 for n, axis in zip(x.shape[-len(self.axes) :], self.axes, strict=True)]
        stuffed = x.new_zeros((*x.shape[: -len(self.axes)], *sizes))
        positions: Any = (..., *(slice(None, None, axis.upsampling) for axis in self.axes))
        stuffed[positions] = x
        return stuffed

    def tap_sum(self) -> Tensor:
        """Return the weight with which the operator reads an input that is constant per channel: `[out, in / groups]`."""
        return self.weight.flatten(2).sum(2, dtype=torch.float64) if self.axes else self.weight

    def at_constant(self, values: Tensor) -> Tensor:
        """Return the output `[out_channels]`, far from any border, for an input with one value per channel, `[in_channels]`."""
        if values.is_meta:
            return values.new_empty(self.out_channels)
        if self.groups == 1:
            return self.bias + torch.cat([block.double() @ values for block in in_blocks(self.tap_sum())])
        taps = self.tap_sum().double().reshape(self.groups, self.out_channels // self.groups, self.weight.shape[1])
        return self.bias + torch.einsum("goi,gi->go", taps, values.reshape(self.groups, -1)).flatten()

    def dense_weight(self) -> Tensor:
        """Return the weight `[out_channels, in_channels, *kernel]` that the same operator has with one group."""
        return _blocks(self, 1)[0]

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the output for an input of the given shape."""
        if not self.axes:
            return (*shape[:-1], self.out_channels)
        size = (axis.output_size(n) for n, axis in zip(shape[-len(self.axes) :], self.axes, strict=True))
        return (*shape[: -len(self.axes) - 1], self.out_channels, *size)

    def multiplications(self, shape: Sequence[int]) -> int:
        """Count the multiplications for an input of the given shape, without those by zeros that upsampling inserts."""
        inserted = math.prod(axis.upsampling for axis in self.axes)
        return math.prod(self.output_shape(shape)) * math.prod(self.weight.shape[1:]) // inserted


def identity(channels: int, like: AffineOperator) -> AffineOperator:
    """Return an operator that returns an input of `channels` channels unchanged, with the axes and the device of `like`."""
    axes = len(like.axes)
    weight = like.weight.new_ones((channels, 1) + (1,) * axes, dtype=torch.float64)
    return AffineOperator(weight, like.bias.new_zeros(channels), (1,) * axes, (0,) * axes, (1,) * axes, channels)


def compose(first: AffineOperator, second: AffineOperator, dtype: torch.dtype = torch.float64) -> AffineOperator:
    """Compute in float64 one operator that computes second(first(x)), exact except near the borders.

    The result is exact at every output position at which `second` reads no zero of its own padding or upsampling. If
    `second` reads such a zero, the result instead reads the value that `first` would compute at the position of the zero: the
    bias of `first`, plus values of x if the taps of `first` reach x from there. `borders.valid_range` returns the exact
    positions.

    Args:
        first: the operator that is applied to x.
        second: the operator that is applied to the output of `first`.
        dtype: the dtype in which the weight of the result is stored.

    Returns:
        The operator, with gcd(first.groups, second.groups) groups.

    Raises:
        ValueError: the shapes do not match, or the composition is not a convolution.
    """
    if first.out_channels != second.in_channels or len(first.axes) != len(second.axes):
        raise ValueError(f"{_describe(second)} cannot follow {_describe(first)}")
    axes = [compose_axes(*pair) for pair in zip(first.axes, second.axes, strict=True)]
    groups = math.gcd(first.groups, second.groups)
    shape = (second.out_channels, first.in_channels // groups, *(axis.kernel for axis in axes))
    bias, names = second.at_constant(first.bias), first.names + second.names
    if first.weight.is_meta:
        return _from_axes(first.weight.new_empty(shape), bias, axes, groups, names)
    if first.groups == second.groups == math.prod(second.kernel) == 1 and shape[1:] == first.weight.shape[1:]:
        product = multiply(second.weight.flatten(1), first.weight.flatten(1), dtype)
        return _from_axes(product.reshape(shape), bias, axes, groups, names)
    weight = first.weight.new_zeros(shape, dtype=torch.float64)
    first = replace(first, weight=first.weight.double())
    spread = [b.upsampling * a.dilation for a, b in zip(first.axes, second.axes, strict=True)]
    dilation = [axis.dilation for axis in axes]
    for tap in itertools.product(*map(range, second.kernel)):
        at_tap: Any = (..., *tap)
        offset = [
            t * b.dilation * a.stride // step for t, a, b, step in zip(tap, first.axes, second.axes, dilation, strict=True)
        ]
        window = _window(first.kernel, offset, spread, dilation)
        weight[window] += _multiply(first, second.weight[at_tap].double(), second.groups)
    return _from_axes(weight.to(dtype), bias, axes, groups, names)


def add(left: AffineOperator, right: AffineOperator) -> AffineOperator:
    """Return one operator that computes left(x) + right(x), exact at every position.

    Raises:
        ValueError: the numbers of channels differ, or the sizes of the two outputs differ for some input size.
    """
    channels_agree = left.in_channels == right.in_channels and left.out_channels == right.out_channels
    if not channels_agree or not all(sizes_agree(*pair) for pair in zip(left.axes, right.axes, strict=True)):
        raise ValueError(f"{_describe(left)} and {_describe(right)} give outputs of different sizes and cannot be added")
    axes = [add_axes(*pair) for pair in zip(left.axes, right.axes, strict=True)]
    groups = math.gcd(left.groups, right.groups)
    blocks = [_blocks(operator, groups) for operator in (left, right)]
    weight = blocks[0].new_zeros((*blocks[0].shape[:3], *(axis.kernel for axis in axes)), dtype=torch.float64)
    if weight.is_meta:
        return _from_axes(weight.flatten(0, 1), left.bias, axes, groups)
    for operator, block in zip((left, right), blocks, strict=True):
        offset = [(axis.before - own.before) // axis.dilation for axis, own in zip(axes, operator.axes, strict=True)]
        spread = [own.dilation for own in operator.axes]
        weight[_window(operator.kernel, offset, spread, [axis.dilation for axis in axes])] += block
    return _from_axes(weight.flatten(0, 1), left.bias + right.bias, axes, groups)


def stack(operators: Sequence[AffineOperator]) -> AffineOperator:
    """Return one operator whose output channels are those of all given operators, in this order; it has one group.

    Raises:
        ValueError: the numbers of input channels differ, or the sizes of the outputs differ for some input size.
    """
    channels, first = sum(operator.out_channels for operator in operators), 0
    total: AffineOperator | None = None
    for operator in operators:
        weight, bias = operator.dense_weight().double(), operator.bias
        rows = slice(first, first + operator.out_channels)
        among = weight.new_zeros((channels, *weight.shape[1:])), bias.new_zeros((channels, *bias.shape[1:]))
        among[0][rows], among[1][rows] = weight, bias
        geometry = (operator.stride, operator.padding, operator.dilation)
        part = AffineOperator(*among, *geometry, upsampling=operator.upsampling)
        total, first = part if total is None else add(total, part), rows.stop
    assert total is not None, "stack needs an operator"
    return total


def _from_axes(weight: Tensor, bias: Tensor, axes: Sequence[Axis], groups: int, names: tuple[str, ...] = ()) -> AffineOperator:
    """Return the operator with the given weight, bias and geometry; raise ValueError if PyTorch has no such operator."""
    if any(axis.upsampling > 1 for axis in axes):
        if any(axis.stride > 1 for axis in axes):
            raise ValueError("a strided and a transposed convolution: together they are no convolution")
        if not all(is_transposed(axis) for axis in axes):
            raise ValueError("a padded convolution behind a transposed one: together they are no transposed convolution")
    stride, dilation, upsampling = (
        tuple(getattr(axis, name) for axis in axes) for name in ("stride", "dilation", "upsampling")
    )
    padding = tuple((axis.before, axis.after) for axis in axes)
    return AffineOperator(weight, bias, stride, padding, dilation, groups, upsampling, names)


def _multiply(first: AffineOperator, matrix: Tensor, matrix_groups: int) -> Tensor:
    """Multiply a grouped matrix by the weight of `first`, whose output channels are the inputs of the matrix.

    Entries that are zero because of the groups are neither stored nor multiplied. Depthwise convolutions therefore stay small.

    Args:
        first: the operator that is applied first.
        matrix: `[out, first.out_channels / matrix_groups]`.
        matrix_groups: number of groups of the matrix.

    Returns:
        The weight of the product, `[out, in / groups, *kernel]`, with gcd(first.groups, matrix_groups) groups.
    """
    groups = math.gcd(first.groups, matrix_groups)
    if first.groups == groups:
        inner = first.weight.reshape(matrix_groups, -1, *first.weight.shape[1:])
        outer = matrix.reshape(matrix_groups, -1, matrix.shape[1])
        return torch.einsum("gom,gmi...->goi...", outer, inner).flatten(0, 1)
    parts = first.groups // groups
    outer = _blocks(AffineOperator(matrix, matrix[:, 0], groups=matrix_groups), groups)
    outer = outer.reshape(groups, outer.shape[1], parts, -1)
    inner = first.weight.reshape(groups, parts, -1, *first.weight.shape[1:])
    return torch.einsum("gopm,gpmi...->gopi...", outer, inner).flatten(2, 3).flatten(0, 1)


def _blocks(operator: AffineOperator, groups: int) -> Tensor:
    """Return the weight that an operator has with fewer groups; entries between channels of different own groups are zero.

    Args:
        operator: the operator, which has a multiple of `groups` groups.
        groups: number of groups of the result.

    Returns:
        `[groups, out_channels / groups, in_channels / groups, *kernel]`.
    """
    ratio = operator.groups // groups
    out, in_ = operator.out_channels // operator.groups, operator.weight.shape[1]
    if operator.weight.is_meta:
        return operator.weight.new_empty((groups, ratio * out, ratio * in_, *operator.kernel))
    if ratio == 1:
        return operator.weight.reshape(groups, out, in_, *operator.kernel)
    own = operator.weight.reshape(groups, ratio, out, in_, *operator.kernel)
    diagonal = torch.eye(ratio, dtype=own.dtype, device=own.device)
    return torch.einsum("gaoi...,ab->gaobi...", own, diagonal).reshape(groups, ratio * out, ratio * in_, *operator.kernel)


def _window(kernel: Sequence[int], offset: Sequence[int], spread: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """Return the index that selects the taps of a kernel in a merged kernel.

    Args:
        kernel: number of taps of the kernel, per axis.
        offset: index of its first tap in the merged kernel, per axis.
        spread: distance between two of its taps in positions, per axis.
        dilation: distance between two taps of the merged kernel in positions, per axis.
    """
    taps = (
        slice(start, start + (k - 1) * d // step + 1, d // step if k > 1 else 1)
        for start, k, d, step in zip(offset, kernel, spread, dilation, strict=True)
    )
    return (..., *taps)


def _describe(operator: AffineOperator) -> str:
    """Return kind, kernel, channels and stride of an operator in words, for error messages."""
    kernel = "×".join(map(str, operator.kernel))
    name = f"a {kernel} convolution" if kernel else "a linear layer"
    return f"{name} from {operator.in_channels} to {operator.out_channels} channels (stride {operator.stride})"
