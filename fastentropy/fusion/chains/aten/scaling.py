"""Read operators that scale and shift each channel: batch norm, and products and sums with one constant per channel."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, channelwise
from fastentropy.fusion.chains.nodes import arguments, constant, device_of, same_dtype, shape_of

_aten = torch.ops.aten

#: Elementwise products and quotients, sums and differences. The commutative ones may have the constant as the left operand.
_SCALES = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor, _aten.div_.Tensor}
_SHIFTS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor}
_COMMUTATIVE = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.add.Tensor, _aten.add_.Tensor}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {_aten.batch_norm.default: _read_batch_norm} | dict.fromkeys(_SCALES | _SHIFTS, _read_scale_or_shift)


def _read_batch_norm(node: Node, module: GraphModule) -> AffineNode | None:
    """Read batch norm in eval mode: y = (x − mean) / sqrt(var + eps) · weight + bias (Ioffe and Szegedy, arXiv 1502.03167)."""
    named = arguments(node, "weight", "bias", "running_mean", "running_var", module=module)
    if named is None or named[0]["training"] or not {"running_mean", "running_var"} <= set(named[1]):
        return None
    values, tensors = named

    def build(axes: int) -> AffineOperator:
        scale = torch.rsqrt(tensors["running_var"] + values["eps"])
        scale = scale * tensors["weight"] if "weight" in tensors else scale
        shift = -tensors["running_mean"] * scale
        return channelwise(scale, shift + tensors["bias"] if "bias" in tensors else shift, axes)

    return affine_in(values["input"], len(shape_of(values["input"]) or ()) - 2, build)


def _read_scale_or_shift(node: Node, module: GraphModule) -> AffineNode | None:
    """Read x · c, c · x, x / c, x + c, c + x or x − c. c is a number or a constant tensor with one value per channel."""
    operand, other = node.args[:2]
    if node.target in _COMMUTATIVE and constant(operand, module) is not None:
        operand, other = other, operand
    is_number = isinstance(other, int | float)
    value = torch.tensor(other, dtype=torch.float64, device=device_of(operand)) if is_number else constant(other, module)
    shape = shape_of(operand)
    if value is None or node.kwargs or shape is None or shape_of(node) != shape or not same_dtype(node, operand):
        return None
    axes = _axes_behind_channels(value)
    if value.numel() != 1 and axes not in (0, len(shape) - 2):
        return None
    is_scale, is_inverse = node.target in _SCALES, node.target not in _COMMUTATIVE
    value = value.double().flatten()

    def build(axes: int) -> AffineOperator:
        channels = shape[-axes - 1]
        assert isinstance(channels, int), "the operators of a chain fix the number of channels"
        each = value.expand(channels)
        if is_scale:
            return channelwise(1 / each if is_inverse else each, torch.zeros_like(each), axes)
        return channelwise(torch.ones_like(each), -each if is_inverse else each, axes)

    return affine_in(operand, axes, build)


def _axes_behind_channels(value: Tensor) -> int | None:
    """Return how many axes follow the channel axis of a constant, which is its only axis longer than 1.

    Returns None if the constant has no such axis, or more than one.
    """
    behind = [value.ndim - 1 - axis for axis, size in enumerate(value.shape) if size != 1]
    return behind[0] if len(behind) == 1 else None
