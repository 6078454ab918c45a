"""Read a node of a traced graph as an affine operator: which ATen operators are affine in one operand, and their numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy._compat import operator_schema
from fastentropy.fusion.chains.affine import AffineOperator

_aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {
    getattr(getattr(_aten, f"conv{axes}d"), overload): axes for axes in (1, 2, 3) for overload in ("default", "padding")
}
_TRANSPOSED: dict[Any, int] = {
    _aten.conv_transpose1d.default: 1,
    _aten.conv_transpose2d.input: 2,
    _aten.conv_transpose3d.input: 3,
}
_POOLS: dict[Any, int] = {_aten.avg_pool1d.default: 1, _aten.avg_pool2d.default: 2, _aten.avg_pool3d.default: 3}
_ADAPTIVE_POOLS: dict[Any, int] = {
    _aten.adaptive_avg_pool1d.default: 1,
    _aten.adaptive_avg_pool2d.default: 2,
    _aten.adaptive_avg_pool3d.default: 3,
}
_DROPOUTS = {_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default, _aten.feature_dropout_.default}
_IDENTITIES = {_aten.alias.default, _aten.clone.default, _aten.contiguous.default, _aten.detach.default}
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.matmul.default}
_SCALES = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.div.Tensor, _aten.div_.Tensor}
_COMMUTATIVE = {_aten.mul.Tensor, _aten.mul_.Tensor, _aten.add.Tensor, _aten.add_.Tensor}
_SHIFTS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor}


@dataclass(frozen=True, eq=False)
class AffineNode:
    """A node that is affine in `operand`.

    axes is the number of spatial axes, None where the node takes values of any shape. build gives the operator in float64
    for a number of axes; None for a node that does nothing. name is the path of the module that has the weights.
    """

    operand: Node
    axes: int | None
    build: Callable[[int], AffineOperator] | None = None
    name: str = ""
    flattens: bool = False


def read_node(node: Node, module: GraphModule) -> AffineNode | None:
    """A node as an affine operator with constant numbers; None where it is none."""
    if node.op != "call_function" or operator_schema(node.target) is None:
        return None
    if node.target in _IDENTITIES or (node.target in _DROPOUTS and not node.args[2]):
        return _over(node.args[0], None)
    if node.target in _SCALES or node.target in _SHIFTS:
        return _scale_or_shift(node, module)
    readers: list[tuple[Any, Callable[[Node, GraphModule], AffineNode | None]]] = [
        (_CONVOLUTIONS, _convolution),
        (_TRANSPOSED, _transposed),
        ({_aten.linear.default}, _linear),
        ({_aten.addmm.default}, _addmm),
        (_MATRIX_PRODUCTS, _matrix_product),
        ({_aten.batch_norm.default}, _batch_norm),
        (_POOLS, _pool),
        (_ADAPTIVE_POOLS, _adaptive_pool),
        ({_aten.mean.dim}, _mean),
    ]
    return next((reader(node, module) for targets, reader in readers if node.target in targets), None)


def shape_of(node: Any) -> tuple[int | torch.SymInt, ...] | None:
    """The shape of a node's tensor, with numbers for what the trace fixed; None for anything else."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        return None
    return tuple(size if (fixed := fixed_size(size)) is None else fixed for size in value.shape)


def fixed_size(size: int | torch.SymInt) -> int | None:
    """A size that a trace fixed, though it may still be written as a symbol; None for a free one."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def constant(argument: Any, module: GraphModule) -> Tensor | None:
    """The value of a node that is a constant of the model: a dense tensor of real floating numbers; None for anything else."""
    if not (isinstance(argument, Node) and argument.op == "get_attr"):
        return None
    value = attrgetter(str(argument.target))(module)
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided and value.is_floating_point()
    return value.detach() if is_dense else None


def _over(operand: Any, axes: int | None, *further: Any, **options: Any) -> AffineNode | None:
    return AffineNode(operand, axes, *further, **options) if isinstance(operand, Node) else None


def _named(node: Node, *tensors: str, module: GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The arguments of a node by name, and those among them that must be constants, in float64; None where one is not."""
    arguments = node.normalized_arguments(module, normalize_to_only_use_kwargs=True)
    assert arguments is not None
    values = dict(arguments.kwargs)
    found = {name: constant(values[name], module) for name in tensors if values.get(name) is not None}
    if any(value is None for value in found.values()):
        return None
    return values, {name: value.double() for name, value in found.items() if value is not None}


def _path(node: Any) -> str:
    return str(node.target).removesuffix(".weight")


def _bias(tensors: Mapping[str, Tensor], weight: Tensor, channels: int) -> Tensor:
    return tensors["bias"] if "bias" in tensors else weight.new_zeros(channels)


def _repeated(values: Any, axes: int) -> tuple[int, ...]:
    """A number for each axis, of which there may be one for all."""
    entries = tuple(values) if isinstance(values, Sequence) else (values,)
    return entries * (axes // len(entries))


def _convolution(node: Node, module: GraphModule) -> AffineNode | None:
    if (named := _named(node, "weight", "bias", module=module)) is None:
        return None
    (values, tensors), axes = named, _CONVOLUTIONS[node.target]
    stride, dilation = (_repeated(values[name], axes) for name in ("stride", "dilation"))

    def build(_: int) -> AffineOperator:
        weight = tensors["weight"]
        padding = _padding(values["padding"], weight.shape[2:], dilation)
        return AffineOperator(weight, _bias(tensors, weight, len(weight)), stride, padding, dilation, values["groups"])

    return _over(values["input"], axes, build, _path(values["weight"]))


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """Padding as numbers: what "same" lacks of an even number stands after."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        return tuple((each // 2, each - each // 2) for each in reach)
    return _repeated(padding, len(kernel))


def _transposed(node: Node, module: GraphModule) -> AffineNode | None:
    if (named := _named(node, "weight", "bias", module=module)) is None:
        return None
    (values, tensors), axes = named, _TRANSPOSED[node.target]
    stride, padding, output_padding, dilation = (
        _repeated(values[name], axes) for name in ("stride", "padding", "output_padding", "dilation")
    )

    def build(_: int) -> AffineOperator:
        groups, weight = values["groups"], tensors["weight"]
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
        flipped = split.flatten(0, 1).flip(tuple(range(2, 2 + axes)))
        margins = [(k - 1) * d - p for k, d, p in zip(flipped.shape[2:], dilation, padding, strict=True)]
        both = tuple((margin, margin + more) for margin, more in zip(margins, output_padding, strict=True))
        bias = _bias(tensors, weight, len(flipped))
        return AffineOperator(flipped, bias, (1,) * axes, both, dilation, groups, stride)

    return _over(values["input"], axes, build, _path(values["weight"]))


def _linear(node: Node, module: GraphModule) -> AffineNode | None:
    if (named := _named(node, "weight", "bias", module=module)) is None or named[1]["weight"].ndim != 2:
        return None
    values, tensors = named
    weight = tensors["weight"]
    return _over(
        values["input"], 0, lambda _: AffineOperator(weight, _bias(tensors, weight, len(weight))), _path(values["weight"])
    )


def _addmm(node: Node, module: GraphModule) -> AffineNode | None:
    """bias + x · matrix, as transformers' Conv1D is traced."""
    bias, operand, matrix = node.args[:3]
    values = constant(bias, module), constant(matrix, module)
    if values[0] is None or values[1] is None or node.kwargs or values[0].ndim != 1:
        return None
    weight = values[1].double().T
    shift = values[0].double().expand(len(weight))
    return _over(operand, 0, lambda _: AffineOperator(weight, shift), _path(matrix))


def _matrix_product(node: Node, module: GraphModule) -> AffineNode | None:
    operand, matrix = node.args[:2]
    value = constant(matrix, module)
    if value is None or value.ndim != 2 or len(shape_of(operand) or ()) < 2:
        return None
    weight = value.double().T
    return _over(operand, 0, lambda _: AffineOperator(weight, weight.new_zeros(len(weight))), _path(matrix))


def _batch_norm(node: Node, module: GraphModule) -> AffineNode | None:
    """Batch norm in eval mode, y = (x − mean) / sqrt(var + eps) · weight + bias (Ioffe and Szegedy, arXiv 1502.03167)."""
    named = _named(node, "weight", "bias", "running_mean", "running_var", module=module)
    if named is None or named[0]["training"] or not {"running_mean", "running_var"} <= set(named[1]):
        return None
    values, tensors = named

    def build(axes: int) -> AffineOperator:
        scale = torch.rsqrt(tensors["running_var"] + values["eps"])
        scale = scale * tensors["weight"] if "weight" in tensors else scale
        shift = -tensors["running_mean"] * scale
        return _channelwise(scale, shift + tensors["bias"] if "bias" in tensors else shift, axes)

    return _over(values["input"], len(shape_of(values["input"]) or ()) - 2, build)


def _channelwise(scale: Tensor, shift: Tensor, axes: int) -> AffineOperator:
    ones = (1,) * axes
    return AffineOperator(scale.reshape(-1, 1, *ones), shift, ones, (0,) * axes, ones, groups=len(scale))


def _pool(node: Node, module: GraphModule) -> AffineNode | None:
    named = _named(node, module=module)
    assert named is not None
    values, axes = named[0], _POOLS[node.target]
    kernel, padding = _repeated(values["kernel_size"], axes), _repeated(values["padding"], axes)
    counts_padding = values["count_include_pad"] or not any(padding)
    if values["ceil_mode"] or not counts_padding or values.get("divisor_override") is not None:
        return None
    return _average(node.args[0], kernel, _repeated(values["stride"] or kernel, axes), padding)


def _adaptive_pool(node: Node, module: GraphModule) -> AffineNode | None:
    operand, axes = node.args[0], _ADAPTIVE_POOLS[node.target]
    shape = shape_of(operand)
    assert shape is not None
    sizes, outputs = [size for size in shape[-axes:] if isinstance(size, int)], _repeated(node.args[1], axes)
    if len(sizes) < axes or any(size % output for size, output in zip(sizes, outputs, strict=True)):
        return None
    kernel = tuple(size // output for size, output in zip(sizes, outputs, strict=True))
    return _average(operand, kernel, kernel, (0,) * axes)


def _mean(node: Node, module: GraphModule) -> AffineNode | None:
    """The mean over all spatial axes: average pooling, and a flattening where these axes are not kept."""
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
    return average and AffineNode(average.operand, average.axes, average.build, flattens=not keep)


def _average(operand: Any, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> AffineNode | None:
    if all(k == s == 1 for k, s in zip(kernel, stride, strict=True)) and not any(padding):
        return _over(operand, len(kernel))
    channels = (shape_of(operand) or ())[-len(kernel) - 1]
    if not isinstance(channels, int):
        return None

    def build(axes: int) -> AffineOperator:
        weight = torch.full((channels, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64, device=_device(operand))
        return AffineOperator(weight, weight.new_zeros(channels), stride, padding, (1,) * axes, groups=channels)

    return _over(operand, len(kernel), build)


def _scale_or_shift(node: Node, module: GraphModule) -> AffineNode | None:
    """x · c, c · x, x / c, x + c, c + x or x − c with a number, or a constant that has one value for each channel."""
    operand, other = node.args[:2]
    if node.target in _COMMUTATIVE and constant(operand, module) is not None:
        operand, other = other, operand
    is_number = isinstance(other, int | float)
    value = torch.tensor(other, dtype=torch.float64, device=_device(operand)) if is_number else constant(other, module)
    shape = shape_of(operand)
    if value is None or node.kwargs or shape is None or shape_of(node) != shape or not _same_dtype(node, operand):
        return None
    if (axes := _axes_of_constant(value, len(shape))) is NotImplemented:
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

    return _over(operand, axes, build)


def _device(operand: Any) -> torch.device:
    device: torch.device = operand.meta["val"].device
    return device


def _same_dtype(node: Node, operand: Any) -> bool:
    return bool(node.meta["val"].dtype == operand.meta["val"].dtype)


def _axes_of_constant(value: Tensor, dimensions: int) -> Any:
    """How many spatial axes a value has whose channels the constant runs over; None for a number, NotImplemented for more."""
    long = [value.ndim - 1 - index for index, size in enumerate(value.shape) if size != 1]  # counted from the last axis
    if value.numel() == 1:
        return None
    if len(long) == 1 and long[0] in (0, dimensions - 2):
        return long[0]
    return NotImplemented
