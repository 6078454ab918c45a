"""Read nodes of a traced graph as affine operators.

A node is read as an affine operator if its ATen operator is affine in one operand and all other operands are constants.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy._compat import operator_schema
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.nodes import arguments, constant, device_of, same_dtype, shape_of

_aten = torch.ops.aten

#: ATen operators for 1, 2 and 3 spatial axes, in this order.
CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
TRANSPOSED_CONVOLUTIONS = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
AVERAGE_POOLS = (_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default)

#: Convolutions with padding="same" or "valid", and average pools with a given output size, for 1, 2 and 3 spatial axes.
_CONVOLUTIONS_PADDED_BY_NAME = (_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding)
_ADAPTIVE_POOLS = (
    _aten.adaptive_avg_pool1d.default,
    _aten.adaptive_avg_pool2d.default,
    _aten.adaptive_avg_pool3d.default,
)

#: The number of spatial axes of each operator above.
_AXES: dict[Any, int] = {
    target: axes
    for targets in (
        CONVOLUTIONS,
        _CONVOLUTIONS_PADDED_BY_NAME,
        TRANSPOSED_CONVOLUTIONS,
        AVERAGE_POOLS,
        _ADAPTIVE_POOLS,
    )
    for axes, target in enumerate(targets, 1)
}

#: Operators that return their first argument, and dropouts, which return it unless they are in training mode.
_IDENTITIES = {_aten.alias.default, _aten.clone.default, _aten.contiguous.default, _aten.detach.default}
_DROPOUTS = {_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default, _aten.feature_dropout_.default}

#: Products that may have a constant matrix as the right operand.
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.matmul.default}

#: Elementwise products and quotients, sums and differences. The commutative ones may have the constant as the left operand.
_SCALES = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor, _aten.div_.Tensor}
_SHIFTS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor}
_COMMUTATIVE = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.add.Tensor, _aten.add_.Tensor}


@dataclass(frozen=True, eq=False)
class AffineNode:
    """A node of a graph whose operator is affine in one operand.

    Attributes:
        operand: the node of that operand.
        axes: number of spatial axes, or None if the operand may have any number of them.
        build: returns the operator in float64 for a given number of spatial axes; None if the node returns its operand.
        name: path of the module that holds the weight of a convolution or a linear layer; empty for other operators.
        flattens: whether the node also flattens channels and positions into one axis of features.
    """

    operand: Node
    axes: int | None
    build: Callable[[int], AffineOperator] | None = None
    name: str = ""
    flattens: bool = False


def read_node(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a node as an affine operator with constant weights.

    Args:
        node: a node of the graph of `module`.
        module: a traced model in eval mode, which holds the constants.

    Returns:
        The affine node, or None if the node is not affine in one operand.
    """
    if node.op != "call_function" or operator_schema(node.target) is None:
        return None
    if node.target in _IDENTITIES or (node.target in _DROPOUTS and not node.args[2]):
        return _affine_in(node.args[0], None)
    readers: list[tuple[Any, Callable[[Node, GraphModule], AffineNode | None]]] = [
        (_SCALES | _SHIFTS, _read_scale_or_shift),
        (CONVOLUTIONS + _CONVOLUTIONS_PADDED_BY_NAME, _read_convolution),
        (TRANSPOSED_CONVOLUTIONS, _read_transposed_convolution),
        ({_aten.linear.default}, _read_linear),
        ({_aten.addmm.default}, _read_addmm),
        (_MATRIX_PRODUCTS, _read_matrix_product),
        ({_aten.batch_norm.default}, _read_batch_norm),
        (AVERAGE_POOLS, _read_pool),
        (_ADAPTIVE_POOLS, _read_adaptive_pool),
        ({_aten.mean.dim}, _read_mean),
    ]
    return next((reader(node, module) for targets, reader in readers if node.target in targets), None)


def _affine_in(operand: Any, axes: int | None, *further: Any, **options: Any) -> AffineNode | None:
    """Return an `AffineNode` with these fields, or None if the operand is not a node."""
    return AffineNode(operand, axes, *further, **options) if isinstance(operand, Node) else None


def _path(node: Any) -> str:
    """Return the path of the module whose weight a node reads."""
    return str(node.target).removesuffix(".weight")


def _bias(tensors: Mapping[str, Tensor], weight: Tensor, channels: int) -> Tensor:
    """Return the bias `[channels]` among the tensors, or zeros in the dtype of the weight if there is no bias."""
    return tensors["bias"] if "bias" in tensors else weight.new_zeros(channels)


def _per_axis(values: Any, axes: int) -> tuple[int, ...]:
    """Return one number per axis. `values` holds one number per axis, or one number for all axes."""
    entries = tuple(values) if isinstance(values, Sequence) else (values,)
    return entries * (axes // len(entries))


def _read_convolution(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a convolution with constant weight and bias."""
    if (named := arguments(node, "weight", "bias", module=module)) is None:
        return None
    (values, tensors), axes = named, _AXES[node.target]
    stride, dilation = (_per_axis(values[name], axes) for name in ("stride", "dilation"))

    def build(_: int) -> AffineOperator:
        weight = tensors["weight"]
        padding = _padding(values["padding"], weight.shape[2:], dilation)
        return AffineOperator(weight, _bias(tensors, weight, len(weight)), stride, padding, dilation, values["groups"])

    return _affine_in(values["input"], axes, build, _path(values["weight"]))


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """Return the padding of a convolution as one entry per axis.

    With "same", the zeros are divided between both ends. If their number is odd, the larger half is behind the input.

    Args:
        padding: "same", "valid", one number, or one number per axis.
        kernel: number of taps per axis.
        dilation: distance between two taps per axis.
    """
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        return tuple((each // 2, each - each // 2) for each in reach)
    return _per_axis(padding, len(kernel))


def _read_transposed_convolution(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a transposed convolution as a convolution with upsampling, whose kernel is flipped."""
    if (named := arguments(node, "weight", "bias", module=module)) is None:
        return None
    (values, tensors), axes = named, _AXES[node.target]
    stride, padding, output_padding, dilation = (
        _per_axis(values[name], axes) for name in ("stride", "padding", "output_padding", "dilation")
    )

    def build(_: int) -> AffineOperator:
        groups, weight = values["groups"], tensors["weight"]
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
        flipped = split.flatten(0, 1).flip(tuple(range(2, 2 + axes)))
        margins = [(k - 1) * d - p for k, d, p in zip(flipped.shape[2:], dilation, padding, strict=True)]
        both = tuple((margin, margin + more) for margin, more in zip(margins, output_padding, strict=True))
        bias = _bias(tensors, weight, len(flipped))
        return AffineOperator(flipped, bias, (1,) * axes, both, dilation, groups, stride)

    return _affine_in(values["input"], axes, build, _path(values["weight"]))


def _read_linear(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a linear layer with constant weight and bias."""
    if (named := arguments(node, "weight", "bias", module=module)) is None or named[1]["weight"].ndim != 2:
        return None
    values, tensors = named
    weight = tensors["weight"]
    return _affine_in(
        values["input"], 0, lambda _: AffineOperator(weight, _bias(tensors, weight, len(weight))), _path(values["weight"])
    )


def _read_addmm(node: Node, module: GraphModule) -> AffineNode | None:
    """Read bias + x · matrix. The Conv1D of Hugging Face transformers is traced to this operator."""
    bias, operand, matrix = node.args[:3]
    values = constant(bias, module), constant(matrix, module)
    if values[0] is None or values[1] is None or node.kwargs or values[0].ndim != 1:
        return None
    weight = values[1].double().T
    shift = values[0].double().expand(len(weight))
    return _affine_in(operand, 0, lambda _: AffineOperator(weight, shift), _path(matrix))


def _read_matrix_product(node: Node, module: GraphModule) -> AffineNode | None:
    """Read x · matrix with a constant matrix as a linear layer without bias."""
    operand, matrix = node.args[:2]
    value = constant(matrix, module)
    if value is None or value.ndim != 2 or len(shape_of(operand) or ()) < 2:
        return None
    weight = value.double().T
    return _affine_in(operand, 0, lambda _: AffineOperator(weight, weight.new_zeros(len(weight))), _path(matrix))


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
        return _channelwise(scale, shift + tensors["bias"] if "bias" in tensors else shift, axes)

    return _affine_in(values["input"], len(shape_of(values["input"]) or ()) - 2, build)


def _channelwise(scale: Tensor, shift: Tensor, axes: int) -> AffineOperator:
    """Return the operator x · scale + shift, with scale and shift of shape `[channels]`."""
    ones = (1,) * axes
    return AffineOperator(scale.reshape(-1, 1, *ones), shift, ones, (0,) * axes, ones, groups=len(scale))


def _read_pool(node: Node, module: GraphModule) -> AffineNode | None:
    """Read average pooling that divides by the size of its kernel at every position."""
    named = arguments(node, module=module)
    assert named is not None
    values, axes = named[0], _AXES[node.target]
    kernel, padding = _per_axis(values["kernel_size"], axes), _per_axis(values["padding"], axes)
    counts_padding = values["count_include_pad"] or not any(padding)
    if values["ceil_mode"] or not counts_padding or values.get("divisor_override") is not None:
        return None
    return _average(node.args[0], kernel, _per_axis(values["stride"] or kernel, axes), padding)


def _read_adaptive_pool(node: Node, module: GraphModule) -> AffineNode | None:
    """Read adaptive average pooling, if the input sizes are fixed and are multiples of the output sizes."""
    operand, axes = node.args[0], _AXES[node.target]
    shape = shape_of(operand)
    assert shape is not None
    sizes, outputs = [size for size in shape[-axes:] if isinstance(size, int)], _per_axis(node.args[1], axes)
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
        return _affine_in(operand, len(kernel))
    channels = (shape_of(operand) or ())[-len(kernel) - 1]
    if not isinstance(channels, int):
        return None

    def build(axes: int) -> AffineOperator:
        weight = torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64, device=device_of(operand))
        return AffineOperator(weight, weight.new_zeros(channels), stride, padding, (1,) * axes, groups=channels)

    return _affine_in(operand, len(kernel), build)


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
            return _channelwise(1 / each if is_inverse else each, torch.zeros_like(each), axes)
        return _channelwise(torch.ones_like(each), -each if is_inverse else each, axes)

    return _affine_in(operand, axes, build)


def _axes_behind_channels(value: Tensor) -> int | None:
    """Return how many axes follow the channel axis of a constant, which is its only axis longer than 1.

    Returns None if the constant has no such axis, or more than one.
    """
    behind = [value.ndim - 1 - axis for axis, size in enumerate(value.shape) if size != 1]
    return behind[0] if len(behind) == 1 else None
