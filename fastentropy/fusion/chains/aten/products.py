"""Read linear layers and other products with a constant matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, bias_or_zeros, weight_path
from fastentropy.fusion.chains.nodes import arguments, constant, same_size, same_sizes, shape_of

_aten = torch.ops.aten

#: Repetitions of a matrix, one for each sample.
_EXPANSIONS = {_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {
        _aten.linear.default: _read_linear,
        _aten.addmm.default: _read_addmm,
        _aten.mm.default: _read_matrix_product,
        _aten.matmul.default: _read_matrix_product,
        _aten.bmm.default: _read_matrix_product,
        _aten.einsum.default: _read_einsum,
    }


def _read_linear(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a linear layer with constant weight and bias."""
    if (named := arguments(node, "weight", "bias", module=module)) is None or named[1]["weight"].ndim != 2:
        return None
    values, tensors = named

    def build(_: int) -> AffineOperator:
        weight = tensors["weight"]
        return AffineOperator(weight, bias_or_zeros(tensors, weight, len(weight)))

    return affine_in(values["input"], 0, build, weight_path(values["weight"]))


def _read_addmm(node: Node, module: GraphModule) -> AffineNode | None:
    """Read bias + x · matrix. The Conv1D of Hugging Face transformers is traced to this operator."""
    bias, operand, matrix = node.args[:3]
    values = constant(bias, module), constant(matrix, module)
    if values[0] is None or values[1] is None or node.kwargs or values[0].ndim != 1:
        return None
    transposed, bias = values[1].T, values[0].expand(values[1].shape[1])
    return affine_in(operand, 0, lambda _: AffineOperator(transposed, bias.double()), weight_path(matrix))


def _read_matrix_product(node: Node, module: GraphModule) -> AffineNode | None:
    """Read x · matrix with a constant matrix as a linear layer, and matrix · x as a pointwise convolution."""
    left, right = node.args[:2]
    if (found := _constant_matrix(right, module)) is not None:
        operand, (matrix, path), axes = left, found, 0
    elif (found := _constant_matrix(left, module)) is not None:
        operand, (matrix, path), axes = right, found, 1
    else:
        return None
    before, after = shape_of(operand) or (), shape_of(node) or ()
    if len(before) < 2 or (axes and len(before) != 3) or not same_sizes(before[: -1 - axes], after[: -1 - axes]):
        return None
    return _pointwise(operand, matrix if axes else matrix.T, axes, path)


def _constant_matrix(argument: Any, module: GraphModule) -> tuple[Tensor, str] | None:
    """Return a constant matrix and the path of its module; one that is repeated for each sample counts too."""
    source = argument
    while isinstance(source, Node) and source.target in _EXPANSIONS:
        source = source.args[0]
    value = constant(source, module)
    if value is None or value.ndim < 2 or value.shape[:-2].numel() != 1:
        return None
    if not same_sizes((shape_of(argument) or value.shape)[-2:], value.shape[-2:]):
        return None
    return value.reshape(value.shape[-2:]), weight_path(source)


def _read_einsum(node: Node, module: GraphModule) -> AffineNode | None:
    """Read an einsum of a value and a constant matrix over the channels, such as "bchw,oc->bohw" and "...c,oc->...o"."""
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, Sequence) or len(operands) != 2:
        return None
    terms, _, result = equation.replace(" ", "").partition("->")
    for first, second in ((0, 1), (1, 0)):
        operand, matrix = operands[first], constant(operands[second], module)
        shape = shape_of(operand)
        if matrix is None or matrix.ndim != 2 or shape is None:
            continue
        given, wanted = (_without_ellipsis(term, len(shape)) for term in (terms.split(",")[first], result))
        weights = terms.split(",")[second]
        contracted = set(given) - set(wanted)
        if len(contracted) != 1 or len(set(given)) != len(given) or not contracted < set(weights):
            continue
        (channel,) = contracted
        new, place = weights.replace(channel, ""), given.index(channel)
        oriented = matrix if weights == new + channel else matrix.T
        axes = len(shape) - 1 - place
        is_layer = place in (1, len(shape) - 1) and axes <= 3 and new not in given
        if is_layer and wanted == given.replace(channel, new) and same_size(shape[place], oriented.shape[1]):
            return _pointwise(operand, oriented, axes, weight_path(operands[second]))
    return None


def _without_ellipsis(term: str, dimensions: int) -> str:
    """Return a term of an einsum with digits in the place of its ellipsis, so that it has one character per axis."""
    return term.replace("...", "01234567"[: max(dimensions - len(term.replace("...", "")), 0)])


def _pointwise(operand: Any, weight: Tensor, axes: int, path: str) -> AffineNode | None:
    """Return the affine node of a pointwise convolution without bias, with a weight `[out_channels, in_channels]`."""
    ones = (1,) * axes

    def build(_: int) -> AffineOperator:
        kernel = weight.reshape(*weight.shape, *ones)
        return AffineOperator(kernel, bias_or_zeros({}, kernel, len(kernel)), ones, (0,) * axes, ones)

    return affine_in(operand, axes, build, path)
