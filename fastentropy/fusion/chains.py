"""Find the chains of a traced model: maximal stretches of linear operators with one input and one output."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.affine import AffineOperator, Chain, Sum

_aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {_aten.conv1d.default: 1, _aten.conv2d.default: 2, _aten.conv3d.default: 3}
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}
_DROPOUTS = {_aten.dropout.default, _aten.dropout_.default, _aten.feature_dropout.default, _aten.feature_dropout_.default}
_IDENTITIES = {_aten.alias.default, _aten.clone.default}

_Steps = tuple["Node | tuple[_Steps, ...]", ...]


@dataclass(frozen=True, eq=False)
class FoundChain:
    """A chain in a graph: `elements` take the value of `source` to the value of `end`, and nothing else reads between.

    The weights are float64. `members` are the nodes from after the source to the end, and `names` the paths of the
    operators' modules in the model, in call order.
    """

    source: Node
    end: Node
    members: tuple[Node, ...]
    elements: Chain
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Segment:
    """A chain in the making: node after node, or branches that are added. `axes` is None as long as no operator fixed it."""

    source: Node
    steps: _Steps
    axes: int | None
    members: frozenset[Node]


def find_chains(module: GraphModule) -> list[FoundChain]:
    """The maximal chains of a graph of ATen operators as `torch.export` gives it, in call order."""
    segments: dict[Node, _Segment] = {}
    for node in module.graph.nodes:
        segment = _add_branches(node, segments) if node.target in _ADDITIONS else _extend(node, segments)
        if segment is not None:
            segments[node] = segment
    inner = {member for end, segment in segments.items() for member in segment.members if member is not end}
    return [_found(end, segment, module) for end, segment in segments.items() if end not in inner and _names(segment.steps)]


def overwritten_constants(module: GraphModule) -> list[str]:
    """The names of the buffers that a graph writes over."""
    constants = module.graph.find_nodes(op="get_attr")
    return [str(node.target) for node in constants if any(_writes(user, node) for user in node.users)]


def _found(end: Node, segment: _Segment, module: GraphModule) -> FoundChain:
    members = tuple(node for node in module.graph.nodes if node in segment.members)
    return FoundChain(segment.source, end, members, _elements(segment.steps, module), _names(segment.steps))


def _extend(node: Node, segments: Mapping[Node, _Segment]) -> _Segment | None:
    """The segment that ends with a linear operator of one input."""
    if not _is_linear(node):
        return None
    operand, axes, steps = node.args[0], _axes(node), () if _axes(node) is None else (node,)
    assert isinstance(operand, Node)
    before = segments.get(operand)
    if before and len(operand.users) == 1 and (None in (axes, before.axes) or axes == before.axes):
        merged_axes = before.axes if axes is None else axes
        return _Segment(before.source, before.steps + steps, merged_axes, before.members | {node})
    return None if _is_overwritten(operand) else _Segment(operand, steps, axes, frozenset({node}))


def _add_branches(node: Node, segments: Mapping[Node, _Segment]) -> _Segment | None:
    """The segment that ends with the addition of two branches of one value, continued backwards where nothing else reads it."""
    left, right = node.args[:2]
    if not (isinstance(left, Node) and isinstance(right, Node)) or node.kwargs or _shape(left) != _shape(right):
        return None
    branches = [_branch(operand, segments) for operand in (left, right)]
    source, members = branches[0].source, branches[0].members | branches[1].members | {node}
    axes = {branch.axes for branch in branches} - {None}
    overwrites_source = node.target == _aten.add_.Tensor and left is source
    if branches[1].source is not source or len(axes) != 1 or overwrites_source or _is_overwritten(source):
        return None
    steps: _Steps = (tuple(branch.steps for branch in branches),)
    before = segments.get(source)
    if before and members.issuperset(source.users) and before.axes in (None, *axes):
        return _Segment(before.source, before.steps + steps, axes.pop(), before.members | members)
    return _Segment(source, steps, axes.pop(), members)


def _branch(operand: Node, segments: Mapping[Node, _Segment]) -> _Segment:
    if operand in segments and len(operand.users) == 1:
        return segments[operand]
    return _Segment(operand, (), None, frozenset())


def _is_linear(node: Node) -> bool:
    """Whether a node is an affine function of its first operand, with constant weights."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target in _DROPOUTS:
        return not node.args[2]
    if node.target in _CONVOLUTIONS or node.target == _aten.linear.default:
        return all(_is_constant(argument) for argument in node.args[1:3])
    if node.target == _aten.batch_norm.default:
        uses_batch_statistics, running = node.args[5], node.args[3:5]
        constants = all(_is_constant(argument) for argument in node.args[1:5])
        return constants and not uses_batch_statistics and None not in running
    return node.target in _IDENTITIES


def _is_constant(argument: Any) -> bool:
    return argument is None or (isinstance(argument, Node) and argument.op == "get_attr")


def _is_overwritten(node: Node) -> bool:
    """Whether an in-place operator writes over a value that others read: when they read it would then matter."""
    return len(node.users) > 1 and any(_writes(user, node) for user in node.users)


def _writes(user: Node, node: Node) -> bool:
    """Whether a reader of a node writes over it, itself or through a view."""
    if isinstance(user.target, torch._ops.OpOverload):
        schema = user.target._schema
        if schema.is_mutable:
            return user.args[0] is node
        is_view = any(returned.alias_info for returned in schema.returns)
    else:
        is_view = user.target is getitem  # one of the views that split or chunk gives
    return is_view and any(_writes(other, user) for other in user.users)


def _axes(node: Node) -> int | None:
    """How many spatial axes an operator has; None where it acts on values of any shape."""
    if node.target == _aten.batch_norm.default:
        return len(_shape(node) or ()) - 2
    return 0 if node.target == _aten.linear.default else _CONVOLUTIONS.get(node.target)


def _shape(node: Node) -> torch.Size | None:
    """The shape of a tensor; None for a number."""
    return getattr(node.meta.get("val"), "shape", None)


def _operators(steps: _Steps) -> list[Node]:
    return [
        operator
        for step in steps
        for operator in ([step] if isinstance(step, Node) else [o for branch in step for o in _operators(branch)])
    ]


def _names(steps: _Steps) -> tuple[str, ...]:
    """The paths of the convolutions and linear layers among the steps."""
    weights = [node.args[1] for node in _operators(steps) if node.target != _aten.batch_norm.default]
    return tuple(str(weight.target).removesuffix(".weight") for weight in weights if isinstance(weight, Node))


def _elements(steps: _Steps, module: GraphModule) -> Chain:
    return tuple(
        _operator(step, module) if isinstance(step, Node) else Sum(tuple(_elements(branch, module) for branch in step))
        for step in steps
    )


def _operator(node: Node, module: GraphModule) -> AffineOperator:
    """An operator of the graph as numbers, in float64."""
    arguments = node.normalized_arguments(module, normalize_to_only_use_kwargs=True)
    assert arguments is not None
    values = {name: _value(value, module) for name, value in arguments.kwargs.items()}
    if node.target == _aten.batch_norm.default:
        return _batch_norm(values, _axes(node) or 0)
    weight = values["weight"]
    bias = weight.new_zeros(weight.shape[0]) if values["bias"] is None else values["bias"]
    if node.target == _aten.linear.default:
        return AffineOperator(weight, bias)
    axes = _CONVOLUTIONS[node.target]
    stride, padding, dilation = (
        tuple(values[name]) * (axes // len(values[name])) for name in ("stride", "padding", "dilation")
    )
    return AffineOperator(weight, bias, stride, padding, dilation, values["groups"])


def _batch_norm(values: Mapping[str, Any], axes: int) -> AffineOperator:
    """Batch norm in eval mode, y = (x − mean) / sqrt(var + eps) · weight + bias (Ioffe and Szegedy, arXiv 1502.03167)."""
    mean, variance = values["running_mean"], values["running_var"]
    scale = torch.rsqrt(variance + values["eps"])
    if values["weight"] is not None:
        scale = scale * values["weight"]
    shift = -mean * scale
    if values["bias"] is not None:
        shift = shift + values["bias"]
    channels = mean.shape[0]
    return AffineOperator(
        scale.reshape(channels, 1, *(1,) * axes), shift, (1,) * axes, (0,) * axes, (1,) * axes, groups=channels
    )


def _value(argument: Any, module: GraphModule) -> Any:
    if not (isinstance(argument, Node) and argument.op == "get_attr"):
        return argument
    value: Any = module
    for name in str(argument.target).split("."):
        value = getattr(value, name)
    return value.detach().to(torch.float64) if isinstance(value, Tensor) else value
