"""Read average pooling and means over all positions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, per_axis
from fastentropy.fusion.chains.nodes import arguments, device_of, shape_of

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
    return {_aten.mean.dim: _read_mean} | pools


def _read_pool(node: Node, module: GraphModule) -> AffineNode | None:
    """Read average pooling that divides by the size of its kernel at every position."""
    named = arguments(node, module=module)
    assert named is not None
    values, axes = named[0], _AXES[node.target]
    kernel, padding = per_axis(values["kernel_size"], axes), per_axis(values["padding"], axes)
    counts_padding = values["count_include_pad"] or not any(padding)
    if values["ceil_mode"] or not counts_padding or values.get("divisor_override") is not None:
        return None
    return _average(node.args[0], kernel, per_axis(values["stride"] or kernel, axes), padding)


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
    """Read the mean over all spatial axes as average pooling. If these axes are not kept, the node also flattens."""
    operand, dims = node.args[:2]
    shape, keep = shape_of(operand) or (), len(node.args) > 2 and bool(node.args[2])
    if node.kwargs or len(shape) < 3 or not isinstance(dims, Sequence):
        return None
    spatial = tuple(size for size in shape[2:] if isinstance(size, int))
    if sorted(d % len(shape) for d in dims if isinstance(d, int)) != list(range(2, len(shape))):
        return None
    if len(spatial) < len(shape) - 2:
        return None
    average = _average(operand, spatial, spatial, (0,) * len(spatial))
    return average and replace(average, flattens=not keep)


def _average(operand: Any, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> AffineNode | None:
    """Return average pooling of an operand as an affine node. Kernel, stride and padding have one number per axis.

    Returns None if the number of channels is free.
    """
    if all(k == s == 1 for k, s in zip(kernel, stride, strict=True)) and not any(padding):
        return affine_in(operand, len(kernel))
    channels = (shape_of(operand) or ())[-len(kernel) - 1]
    if not isinstance(channels, int):
        return None

    def build(axes: int) -> AffineOperator:
        weight = torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64, device=device_of(operand))
        return AffineOperator(weight, weight.new_zeros(channels), stride, padding, (1,) * axes, groups=channels)

    return affine_in(operand, len(kernel), build)
