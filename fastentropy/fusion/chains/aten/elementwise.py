"""Read elementwise sums, differences, products and quotients.

Of a value and a constant, they scale and shift channels. Of two values, they may join two branches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, channelwise
from fastentropy.fusion.chains.nodes import constant, device_of, known, same_dtype, same_sizes, shape_of

_aten = torch.ops.aten

#: Elementwise operators, with the names under which PyTorch repeats them. Sums and differences may scale the second operand by
#: `alpha`. Only the first operand of a reversed difference may be scaled.
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.add.Scalar, _aten.add_.Scalar}
_DIFFERENCES = {
    *(_aten.sub.Tensor, _aten.sub_.Tensor, _aten.sub.Scalar, _aten.sub_.Scalar),
    *(_aten.subtract.Tensor, _aten.subtract_.Tensor, _aten.subtract.Scalar, _aten.subtract_.Scalar),
}
_REVERSED_DIFFERENCES = {_aten.rsub.Tensor, _aten.rsub.Scalar}
_NEGATIONS = {_aten.neg.default, _aten.neg_.default, _aten.negative.default, _aten.negative_.default}
_PRODUCTS = {
    *(_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar, _aten.mul_.Scalar),
    *(_aten.multiply.Tensor, _aten.multiply_.Tensor, _aten.multiply.Scalar, _aten.multiply_.Scalar),
}
_QUOTIENTS = {
    *(_aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar, _aten.div_.Scalar),
    *(_aten.divide.Tensor, _aten.divide_.Tensor, _aten.divide.Scalar, _aten.divide_.Scalar),
    *(_aten.true_divide.Tensor, _aten.true_divide_.Tensor, _aten.true_divide.Scalar, _aten.true_divide_.Scalar),
}

#: Repetitions of a constant, which an elementwise operator would repeat by itself.
_EXPANSIONS = {_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    operators = _SUMS | _DIFFERENCES | _REVERSED_DIFFERENCES | _NEGATIONS | _PRODUCTS | _QUOTIENTS
    products = {_aten.addcmul.default: _read_addcmul, _aten.addcmul_.default: _read_addcmul}
    return products | dict.fromkeys(operators | {_aten.lerp.Scalar}, _read_scale_or_shift)


class WeightedSum(NamedTuple):
    """The sum of two operands, each multiplied by a number."""

    operands: tuple[Any, Any]
    weights: tuple[float, float]


def read_weighted_sum(node: Node) -> WeightedSum | None:
    """Read a sum, a difference or a linear interpolation as the weighted sum of its two operands.

    Returns None for every other node.
    """
    if node.target == _aten.lerp.Scalar:
        left, right, weight = node.args
        return WeightedSum((left, right), (1 - weight, weight)) if isinstance(weight, int | float) else None
    if node.target not in _SUMS | _DIFFERENCES | _REVERSED_DIFFERENCES or len(node.args) < 2:
        return None
    left, right, *further = node.args
    alpha: Any = node.kwargs.get("alpha", *(further or [1]))
    if not isinstance(alpha, int | float):
        return None
    if node.target in _REVERSED_DIFFERENCES:
        return WeightedSum((left, right), (-alpha, 1))
    return WeightedSum((left, right), (1, alpha if node.target in _SUMS else -alpha))


def _read_scale_or_shift(node: Node, module: GraphModule) -> AffineNode | None:
    """Read an elementwise operator of one value x as x · scale + shift.

    The scale and the shift follow from a constant operand: a number, or a constant tensor with one value per channel. An
    operator of x and x itself (x + x) is a scale too.
    """
    if node.target in _NEGATIONS:
        return _scale_and_shift(node, node.args[0], _number(-1, node), _number(0, node))
    if weighted := read_weighted_sum(node):
        (left, right), (one, other) = weighted
        if left is right:
            return _scale_and_shift(node, left, _number(one + other, node), _number(0, node)) if one + other else None
        if (value := _constant_operand(right, node, module)) is not None:
            return _scale_and_shift(node, left, _number(one, node), value * other)
        value = _constant_operand(left, node, module)
        return None if value is None else _scale_and_shift(node, right, _number(other, node), value * one)
    if node.kwargs or len(node.args) != 2:
        return None  # a division that rounds
    left, right = node.args
    if (value := _constant_operand(right, node, module)) is not None:
        return _scale_and_shift(node, left, 1 / value if node.target in _QUOTIENTS else value, _number(0, node))
    value = _constant_operand(left, node, module)
    return None if value is None or node.target in _QUOTIENTS else _scale_and_shift(node, right, value, _number(0, node))


def _read_addcmul(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a + number · b · c, of which two are constants."""
    added, left, right = (_constant_operand(operand, node, module) for operand in node.args[:3])
    number: Any = node.kwargs.get("value", 1)
    if added is None and left is not None and right is not None:
        return _scale_and_shift(node, node.args[0], _number(1, node), number * left * right)
    if added is not None and left is None and right is not None:
        return _scale_and_shift(node, node.args[1], number * right, added)
    if added is not None and left is not None and right is None:
        return _scale_and_shift(node, node.args[2], number * left, added)
    return None


def _constant_operand(operand: Any, node: Node, module: GraphModule) -> Tensor | None:
    """Return an operand of a node in float64 if it is a number or a constant, or None."""
    if isinstance(operand, int | float):
        return _number(operand, node)
    while isinstance(operand, Node) and operand.target in _EXPANSIONS:
        operand = operand.args[0]
    value = constant(operand, module)
    return None if value is None else value.double()


def _number(number: float, node: Node) -> Tensor:
    """Return a number as a float64 tensor on the device of a node."""
    return torch.tensor(number, dtype=torch.float64, device=device_of(node))


def _scale_and_shift(node: Node, operand: Any, scale: Tensor, shift: Tensor) -> AffineNode | None:
    """Return the affine node of x · scale + shift. Scale and shift are numbers, or tensors with one value per channel.

    Returns None if a tensor does not have one value per channel, or if the operator changes the shape or the dtype of x.
    """
    shape = shape_of(operand)
    if shape is None or not same_sizes(shape_of(node) or (), shape) or not same_dtype(node, operand):
        return None
    behind = {_axes_behind_channels(value) for value in (scale, shift) if value.numel() != 1}
    if not behind <= {0, len(shape) - 2} or len(behind) > 1:
        return None
    axes = next(iter(behind), None)
    scale, shift = scale.flatten(), shift.flatten()

    def build(axes: int) -> AffineOperator:
        channels = known(shape[-axes - 1])
        return channelwise(scale.expand(channels), shift.expand(channels), axes)

    return affine_in(operand, axes, build, number=(scale, shift) if axes is None else None)


def _axes_behind_channels(value: Tensor) -> int | None:
    """Return how many axes follow the channel axis of a constant, which is its only axis longer than 1.

    Returns None if the constant has no such axis, or more than one.
    """
    behind = [value.ndim - 1 - axis for axis, size in enumerate(value.shape) if size != 1]
    return behind[0] if len(behind) == 1 else None
