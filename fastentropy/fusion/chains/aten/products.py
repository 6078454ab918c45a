"""Read linear layers and other products with a constant matrix."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, bias_or_zeros, weight_path
from fastentropy.fusion.chains.nodes import arguments, constant, shape_of

_aten = torch.ops.aten


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {
        _aten.linear.default: _read_linear,
        _aten.addmm.default: _read_addmm,
        _aten.mm.default: _read_matrix_product,
        _aten.matmul.default: _read_matrix_product,
    }


def _read_linear(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a linear layer with constant weight and bias."""
    if (named := arguments(node, "weight", "bias", module=module)) is None or named[1]["weight"].ndim != 2:
        return None
    values, tensors = named
    weight = tensors["weight"]
    return affine_in(
        values["input"],
        0,
        lambda _: AffineOperator(weight, bias_or_zeros(tensors, weight, len(weight))),
        weight_path(values["weight"]),
    )


def _read_addmm(node: Node, module: GraphModule) -> AffineNode | None:
    """Read bias + x · matrix. The Conv1D of Hugging Face transformers is traced to this operator."""
    bias, operand, matrix = node.args[:3]
    values = constant(bias, module), constant(matrix, module)
    if values[0] is None or values[1] is None or node.kwargs or values[0].ndim != 1:
        return None
    weight = values[1].double().T
    shift = values[0].double().expand(len(weight))
    return affine_in(operand, 0, lambda _: AffineOperator(weight, shift), weight_path(matrix))


def _read_matrix_product(node: Node, module: GraphModule) -> AffineNode | None:
    """Read x · matrix with a constant matrix as a linear layer without bias."""
    operand, matrix = node.args[:2]
    value = constant(matrix, module)
    if value is None or value.ndim != 2 or len(shape_of(operand) or ()) < 2:
        return None
    weight = value.double().T
    return affine_in(operand, 0, lambda _: AffineOperator(weight, weight.new_zeros(len(weight))), weight_path(matrix))
