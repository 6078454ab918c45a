"""Find the chains of a traced model: the longest stretches of linear operators with one input and one output."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fastentropy._compat import operator_schema
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten import AffineNode, read_node, shape_of
from fastentropy.fusion.chains.elements import Activation, Chain, Element, Flatten, Sum, operators
from fastentropy.fusion.chains.passes import fold

_aten = torch.ops.aten

#: Additions, of which those of two branches may belong to a chain.
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}

#: Views, of which those that keep the channels together may belong to a chain.
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.permute.default}


@dataclass(frozen=True, eq=False)
class FoundChain:
    """A chain in a graph, whose inner values nothing else reads.

    Attributes:
        source: the node whose value the chain takes.
        end: the node whose value the chain computes.
        members: all nodes behind the source, up to and including the end, in call order.
        elements: what the chain computes, with float64 weights.
        names: paths of the modules of its convolutions, linear layers and activations, in call order.
        views: nodes that are still to be applied to the output of the elements: a reshape of all axes but the last, whose
            last size is to be replaced, and a permutation of the axes.
    """

    source: Node
    end: Node
    members: tuple[Node, ...]
    elements: Chain
    names: tuple[str, ...]
    views: tuple[Node, ...] = ()

    @cached_property
    def folded(self) -> Chain:
        """Return the elements with batch norm folded."""
        return fold(self.elements)

    @property
    def has_fixed_size(self) -> bool:
        """Return whether the trace fixed the spatial sizes of the source."""
        axes = len(operators(self.elements)[0].axes)
        shape = shape_of(self.source) or ()
        return all(isinstance(size, int) for size in shape[len(shape) - axes :])


@dataclass(frozen=True, eq=False)
class _Step:
    """An element that is built once the number of spatial axes is known.

    name is the path of a convolution, a linear layer or an activation; steps without a name are no chain by themselves.
    """

    build: Callable[[int], Element]
    name: str


_Steps = tuple["_Step | tuple[_Steps, ...]", ...]


@dataclass(frozen=True, eq=False)
class _Segment:
    """A chain that may still grow.

    `axes` is the number of spatial axes, None until an operator fixes it. `flat` is the spatial size that the value had before
    it was flattened, None if it was not; the layers behind a flattening are convolutions that cover this whole size.
    """

    source: Node
    steps: _Steps
    axes: int | None
    members: frozenset[Node]
    views: tuple[Node, ...] = ()
    flat: tuple[int, ...] | None = None

    @property
    def is_permuted(self) -> bool:
        return bool(self.views) and self.views[-1].target is _aten.permute.default


def find_chains(module: GraphModule, activations: Mapping[str, nn.Module] | None = None) -> list[FoundChain]:
    """Find the longest chains of a graph of ATen operators as `torch.export` makes it.

    Args:
        module: the graph of a model in eval mode.
        activations: activations by the path of their module, where the graph has `aten.alias` in their place. Chains
            continue through these activations.

    Returns:
        The chains in call order. No chain is a part of another one.

    Examples:
        >>> import torch
        >>> from fastentropy.fusion.chains import find_chains
        >>> layers = [torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)]
        >>> model = torch.nn.Sequential(*layers).eval()
        >>> program = torch.export.export(model, (torch.randn(1, 3, 6, 6),))
        >>> [chain.names for chain in find_chains(program.module())]
        [('0', '1'), ('3',)]
    """
    segments: dict[Node, _Segment] = {}
    for node in module.graph.nodes:
        segment = _segment_to(node, segments, module, activations or {})
        if segment is not None:
            segments[node] = segment
    inner = {member for end, segment in segments.items() for member in segment.members if member is not end}
    ends = [end for end, segment in segments.items() if end not in inner and _names(segment.steps)]
    return [_found_chain(end, segments[end], module) for end in ends]


def overwritten_constants(module: GraphModule) -> list[str]:
    """Return the names of the buffers that a graph overwrites."""
    constants = module.graph.find_nodes(op="get_attr")
    return [str(node.target) for node in constants if any(_overwrites(user, node) for user in node.users)]


def _found_chain(end: Node, segment: _Segment, module: GraphModule) -> FoundChain:
    members = tuple(node for node in module.graph.nodes if node in segment.members)
    elements = _elements(segment.steps, segment.axes or 0)
    if segment.flat is not None:
        elements += (Flatten(),)
    return FoundChain(segment.source, end, members, elements, _names(segment.steps), segment.views)


def _segment_to(
    node: Node,
    segments: Mapping[Node, _Segment],
    module: GraphModule,
    activations: Mapping[str, nn.Module],
) -> _Segment | None:
    """Return the segment that ends with a node, if there is one."""
    if node.target in _VIEWS:
        return _segment_to_view(node, segments)
    affine = read_node(node, module)
    if affine is None:
        return _segment_to_sum(node, segments) if node.target in _ADDITIONS else None
    start = _Segment(affine.operand, (), None, frozenset())
    before = segments.get(affine.operand) if len(affine.operand.users) == 1 else None
    if (path := module_path(node)) in activations:
        activation, before = Activation(path, activations[path]), before or start
        return replace(before, steps=(*before.steps, _Step(lambda _: activation, path)), members=before.members | {node})
    overwrites = _overwrites(node, affine.operand)
    if before and (before.steps or not overwrites) and (extended := _extend(before, node, affine)):
        return extended
    if overwrites or _is_overwritten(affine.operand):
        return None
    return _extend(start, node, affine)


def _extend(before: _Segment, node: Node, affine: AffineNode) -> _Segment | None:
    """Return a segment with one more operator, or None if the operator does not act on the channels of the segment."""
    members, shape = before.members | {node}, shape_of(affine.operand) or ()
    if affine.build is None and affine.axes is None:
        return replace(before, members=members)
    if before.is_permuted:
        return _extend_channelwise(before, affine, len(shape), members)
    if before.flat is not None:
        return _extend_flat(before, affine, members)
    if None not in (affine.axes, before.axes) and affine.axes != before.axes:
        return None
    axes = before.axes if affine.axes is None else affine.axes
    steps = before.steps if affine.build is None else (*before.steps, _Step(_with_path(affine.build, node), affine.name))
    flat = (1,) * (affine.axes or 0) if affine.flattens else None
    return replace(before, steps=steps, axes=axes, members=members, flat=flat)


def _with_path(build: Callable[[int], AffineOperator], node: Node) -> Callable[[int], AffineOperator]:
    path = module_path(node)
    return lambda axes: replace(build(axes), names=(path,))


def module_path(node: Node) -> str:
    """Return the path of the module, in the traced model, whose forward calls the operator of a node."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _extend_channelwise(before: _Segment, affine: AffineNode, dimensions: int, members: frozenset[Node]) -> _Segment | None:
    """Append a scale of the channels, which a permutation moved from the last axis to the second."""
    build, spatial = affine.build, dimensions - 2
    if affine.name or build is None or affine.axes not in (None, spatial) or not build(spatial).is_channelwise:
        return None

    def build_last(_: int) -> AffineOperator:
        operator = build(spatial)
        return AffineOperator(operator.weight.flatten(1), operator.bias, groups=operator.groups)

    return replace(before, steps=(*before.steps, _Step(build_last, "")), members=members)


def _extend_flat(before: _Segment, affine: AffineNode, members: frozenset[Node]) -> _Segment | None:
    """Append a layer of flattened features, as a convolution whose kernel covers its input."""
    sizes, build = before.flat or (), affine.build
    is_dense = bool(affine.name)
    if affine.axes not in (None, 0) or build is None or not (is_dense or math.prod(sizes) == 1):
        return None

    def build_covering(axes: int) -> AffineOperator:
        operator, ones = build(0), (1,) * axes
        weight = operator.weight.reshape(operator.weight.shape[0], -1, *sizes)
        return AffineOperator(weight, operator.bias, ones, (0,) * axes, ones, operator.groups)

    step = _Step(build_covering, affine.name)
    return replace(before, steps=(*before.steps, step), members=members, flat=(1,) * len(sizes))


def _segment_to_view(node: Node, segments: Mapping[Node, _Segment]) -> _Segment | None:
    """Return the segment that ends with a reshape of all axes but the last, a flattening, or a move of channels to axis 1."""
    operand = node.args[0]
    assert isinstance(operand, Node)
    shape, result = shape_of(operand) or (), shape_of(node) or ()
    before = segments.get(operand) if len(operand.users) == 1 else None
    if before and before.axes and before.flat is None and not before.views:
        return _flatten(before, node, shape, result)
    if node.target is _aten.permute.default:
        channels_first = [0, len(shape) - 1, *range(1, len(shape) - 1)]
        # The second argument of permute is a list.
        if before and before.axes == 0 and not before.is_permuted and list(node.args[1]) == channels_first:  # type: ignore[arg-type]
            return replace(before, members=before.members | {node}, views=(*before.views, node))
        return None
    if node.target is _aten.flatten.using_ints or not shape or not result or shape[-1] != result[-1]:
        return None
    if before and before.axes in (None, 0) and before.flat is None and not before.is_permuted:
        return replace(before, axes=0, members=before.members | {node}, views=(node,))
    return None if _is_overwritten(operand) else _Segment(operand, (), 0, frozenset({node}), (node,))


def _flatten(before: _Segment, node: Node, shape: tuple[Any, ...], result: tuple[Any, ...]) -> _Segment | None:
    spatial = tuple(shape[2:])
    if len(shape) != (before.axes or 0) + 2 or not all(isinstance(size, int) for size in spatial):
        return None
    if node.target is _aten.permute.default or tuple(result) != (shape[0], shape[1] * math.prod(spatial)):
        return None
    return replace(before, members=before.members | {node}, flat=spatial)


def _segment_to_sum(node: Node, segments: Mapping[Node, _Segment]) -> _Segment | None:
    """Return the segment that ends with the sum of two branches of one value, with the segment before unless others read it."""
    left, right = node.args[:2]
    if not (isinstance(left, Node) and isinstance(right, Node)) or node.kwargs or shape_of(left) != shape_of(right):
        return None
    branches = [_branch_to(operand, segments) for operand in (left, right)]
    source, members = branches[0].source, branches[0].members | branches[1].members | {node}
    axes = {branch.axes for branch in branches if branch.steps} - {None}
    overwrites_source = node.target == _aten.add_.Tensor and left is source
    if branches[1].source is not source or len(axes) != 1 or overwrites_source or _is_overwritten(source):
        return None
    if not all(_keeps_shape(branch, operand) for branch, operand in zip(branches, (left, right), strict=True)):
        return None
    steps: _Steps = (tuple(branch.steps for branch in branches),)
    before = segments.get(source)
    continues = before and members.issuperset(source.users) and before.axes in (None, *axes)
    if before and continues and before.flat is None and not before.views:
        return _Segment(before.source, before.steps + steps, axes.pop(), before.members | members)
    return _Segment(source, steps, axes.pop(), members)


def _branch_to(operand: Node, segments: Mapping[Node, _Segment]) -> _Segment:
    if operand in segments and len(operand.users) == 1:
        return segments[operand]
    return _Segment(operand, (), None, frozenset())


def _keeps_shape(branch: _Segment, operand: Node) -> bool:
    """Return whether the views of a branch leave its value in the shape of its source, except for the channels."""
    if branch.flat is not None or branch.is_permuted:
        return False
    return not branch.views or (shape_of(operand) or ())[:-1] == (shape_of(branch.source) or ())[:-1]


def _is_overwritten(node: Node) -> bool:
    """Return whether an in-place operator overwrites a value that others read, so that the order of the two matters."""
    base = _base(node)
    return len(base.users) > 1 and any(_overwrites(user, base) for user in base.users)


def _base(node: Node) -> Node:
    """Return the value that a node is a view of, or the node itself."""
    while node.args and isinstance(node.args[0], Node) and _is_view(node):
        node = node.args[0]
    return node


def _overwrites(user: Node, node: Node) -> bool:
    """Return whether a user of a node overwrites it, directly or through a view."""
    schema = operator_schema(user.target)
    if schema is not None and schema.is_mutable:
        return user.args[0] is node
    return _is_view(user) and any(_overwrites(other, user) for other in user.users)


def _is_view(node: Node) -> bool:
    """Return whether the output of a node may share memory with its first argument."""
    schema = operator_schema(node.target)
    if schema is not None:
        return not schema.is_mutable and any(returned.alias_info for returned in schema.returns)
    return node.target is getitem  # one of the views that split or chunk returns


def _names(steps: _Steps) -> tuple[str, ...]:
    """Return the paths of the convolutions, linear layers and activations among the steps."""
    names: list[str] = []
    for step in steps:
        if isinstance(step, _Step):
            names += [step.name] * bool(step.name)
        else:
            names += [name for branch in step for name in _names(branch)]
    return tuple(names)


def _elements(steps: _Steps, axes: int) -> Chain:
    return tuple(
        step.build(axes) if isinstance(step, _Step) else Sum(tuple(_elements(branch, axes) for branch in step))
        for step in steps
    )
