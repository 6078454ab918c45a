"""Read average pooling, and means and sums over positions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, per_axis
from fastentropy.fusion.chains.nodes import arguments, device_of, same_dtype, shape_of
from fastentropy.fusion.chains.selections import summed_positions

_aten = torch.ops.aten

#: Average pools for 1, 2 and 3 spatial axes, in this order, and those with a given output size.
AVERAGE_POOLS = (_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default)
_ADAPTIVE_POOLS = (
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default,
)

#: The number of spatial axes of each operator above.
_AXES: dict[Any, int] = {target: axes for targets in (AVERAGE_POOLS, _ADAPTIVE_POOLS) for axes, target in enumerate(targets, 1)}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    pools = dict.fromkeys(AVERAGE_POOLS, _read_pool) | dict.fromkeys(_ADAPTIVE_POOLS, _read_adaptive_pool)
    return {_aten.mean.dim: _read_mean, _aten.sum.dim_IntList: _read_sum} | pools


def _read_pool(node: Node, module: GraphModule) -> AffineNode | None:
    """Read average pooling that divides by the size of its kernel at every position."""
    named = arguments(node, module=module)
    assert named is not None
    values, axes = named[0], _AXES[node.target]
    kernel, padding = per_axis(values["kernel_size"], axes), per_axis(values["padding"], axes)
    counts_padding = values["count_include_pad"] or not any(padding)
    stride = per_axis(values["stride"] or kernel, axes)
    if values["ceil_mode"] and not _divides(node, kernel, stride, padding):
        return None
    if not counts_padding or values.get("divisor_override") is not None:
        return None
    return _average(node.args[0], kernel, stride, padding)


def _divides(node: Node, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> bool:
    """Return whether a pool gives the same sizes with and without `ceil_mode`. The pool numbers have one entry per axis."""
    before, after = (shape_of(each) or () for each in (node.args[0], node))
    numbers = zip(before[-len(kernel) :], after[-len(kernel) :], kernel, stride, padding, strict=True)
    return all(isinstance(n, int) and (n + 2 * p - k) // s + 1 == m for n, m, k, s, p in numbers)


def _read_adaptive_pool(node: Node, module: GraphModule) -> AffineNode | None:
    """Read adaptive average pooling, if the input sizes are fixed and are multiples of the output sizes."""
    operand, axes = node.args[0], _AXES[node.target]
    shape = shape_of(operand)
    assert shape is not None
    sizes, outputs = [size for size in shape[-axes:] if isinstance(size, int)], per_axis(node.args[1], axes)
    if len(sizes) < axes or any(size % output for size, output in zip(sizes, outputs, strict=True)):
        return None
    kernel = tuple(size // output for size, output in zip(sizes, outputs, strict=True))
    return _average(operand, kernel, kernel, (0,) * axes)


def _read_mean(node: Node, module: GraphModule) -> AffineNode | None:
    """Read the mean over spatial axes as average pooling. If all of them are left out then, the node also flattens."""
    if (read := _reduced_sizes(node)) is None:
        return None
    sizes, flattens = read
    average = _average(node.args[0], sizes, sizes, (0,) * len(sizes))
    return average and replace(average, flattens=flattens)


def _read_sum(node: Node, module: GraphModule) -> AffineNode | None:
    """Read the sum over spatial axes. If all of them are left out then, the node also flattens."""
    operand, read = node.args[0], _reduced_sizes(node)
    channels = (shape_of(operand) or (None, None))[1]
    if read is None or not isinstance(channels, int) or not same_dtype(node, operand):
        return None
    (sizes, flattens), device = read, device_of(operand)
    if max(sizes) == 1:
        return affine_in(operand, len(sizes), flattens=flattens)
    return affine_in(operand, len(sizes), lambda _: summed_positions(channels, sizes, device), flattens=flattens)


def _reduced_sizes(node: Node) -> tuple[tuple[int, ...], bool] | None:
    """Read a reduction over spatial axes.

    Returns:
        For each spatial axis, how many positions are reduced to one, and whether the reduced axes are left out. None if others
        than spatial axes of fixed sizes are reduced, or if only some of them are, and left out.
    """
    operand, dims = node.args[:2]
    shape, keep = shape_of(operand) or (), len(node.args) > 2 and bool(node.args[2])
    if node.kwargs or not 3 <= len(shape) <= 5 or not isinstance(dims, Sequence):
        return None
    reduced = {dim % len(shape) for dim in dims if isinstance(dim, int)}
    sizes = [size if axis in reduced else 1 for axis, size in enumerate(shape)][2:]
    fixed = tuple(size for size in sizes if isinstance(size, int))
    if not reduced or min(reduced) < 2 or len(fixed) < len(sizes) or not (keep or len(reduced) == len(sizes)):
        return None
    return fixed, not keep


def _average(operand: Any, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> AffineNode | None:
    """Return average pooling of an operand as an affine node. Kernel, stride and padding have one number per axis.

    Returns None if the number of channels is free.
    """
    if all(k == s == 1 for k, s in zip(kernel, stride, strict=True)) and not any(padding):
        return affine_in(operand, len(kernel))
    channels = (shape_of(operand) or ())[-len(kernel) - 1]
    if not isinstance(channels, int):
        return None

    device = device_of(operand)
    return affine_in(operand, len(kernel), lambda _: average(channels, kernel, stride, padding, device))


def average(
    channels: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device
) -> AffineOperator:
    """Return average pooling as an operator. Kernel, stride and padding have one number per axis."""
    weight = torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64, device=device)
    ones = (1,) * len(kernel)
    return AffineOperator(weight, weight.new_zeros(channels), tuple(stride), tuple(padding), ones, groups=channels)
