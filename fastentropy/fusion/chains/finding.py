"""Find the chains of a traced model: the longest stretches of linear operators with one input and one output.

A segment is a chain that is still being built. The search visits the nodes in call order, and computes for each node the
segment that ends with it.
"""

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
from fastentropy.fusion.chains.aten import AffineNode, read_node
from fastentropy.fusion.chains.elements import Activation, Chain, Element, Flatten, Sum, operators
from fastentropy.fusion.chains.nodes import module_path, shape_of
from fastentropy.fusion.chains.passes import fold

_aten = torch.ops.aten

#: Additions. They belong to a chain if they add two branches of the same value.
_ADDITIONS = {_aten.add.Tensor, _aten.add_.Tensor}

#: Views. They may belong to a chain if they keep all values of a channel together, or flatten channels and positions.
_VIEWS = {_aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.permute.default}


@dataclass(frozen=True, eq=False)
class FoundChain:
    """A chain in a graph. No node outside of the chain reads its intermediate values.

    Attributes:
        source: the node whose value is the input of the chain.
        end: the node whose value is the output of the chain.
        members: the nodes of the chain in call order, without the source and with the end.
        elements: the function of the chain, with float64 weights, except for `views`.
        names: paths of the modules of its convolutions, linear layers and activations, in call order.
        views: nodes to apply to the output of `elements`, in this order: a reshape of all axes but the last, and a
            permutation that moves the last axis to axis 1. Either may be missing. The reshape must get the number of
            features of the output as its last size.
    """

    source: Node
    end: Node
    members: tuple[Node, ...]
    elements: Chain
    names: tuple[str, ...]
    views: tuple[Node, ...] = ()

    @cached_property
    def folded(self) -> Chain:
        """Return the elements with batch norm folded into its neighbours; see `fold`."""
        return fold(self.elements)

    @property
    def has_fixed_size(self) -> bool:
        """Return whether the trace fixed the spatial sizes of the source."""
        axes = len(operators(self.elements)[0].axes)
        shape = shape_of(self.source) or ()
        return all(isinstance(size, int) for size in shape[len(shape) - axes :])


@dataclass(frozen=True, eq=False)
class _Step:
    """An element of a segment. It is built later, when the number of spatial axes is known.

    Attributes:
        build: returns the element for a number of spatial axes.
        name: path of the convolution, linear layer or activation, or empty for any other operator. A segment is a chain only
            if one of its steps has a name.
    """

    build: Callable[[int], Element]
    name: str


#: The steps of a segment in order. A tuple in place of a step is a sum: it holds the steps of each branch.
_Steps = tuple["_Step | tuple[_Steps, ...]", ...]


@dataclass(frozen=True, eq=False)
class _Segment:
    """A chain that may still grow.

    Attributes:
        source: the node whose value is the input.
        steps: the elements so far.
        axes: number of spatial axes, None until an operator fixes it.
        members: the nodes so far, without the source.
        views: as in `FoundChain`.
        flat: the spatial size that the value had before it was flattened, or None if it was not flattened. A linear layer
            after the flattening becomes a convolution whose kernel has this size.
    """

    source: Node
    steps: _Steps
    axes: int | None
    members: frozenset[Node]
    views: tuple[Node, ...] = ()
    flat: tuple[int, ...] | None = None

    @property
    def is_permuted(self) -> bool:
        """Return whether the last view moves the channels from the last axis to axis 1."""
        return bool(self.views) and self.views[-1].target is _aten.permute.default


def find_chains(module: GraphModule, activations: Mapping[str, nn.Module] | None = None) -> list[FoundChain]:
    """Find the longest chains of a graph of ATen operators as `torch.export` makes it.

    Args:
        module: the graph of a model in eval mode.
        activations: activations through which chains may continue, by the path of their module. The graph must have an
            `aten.alias` node in the place of each.

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
    """Return the names of the constants (buffers, for example) that a graph overwrites when it runs."""
    constants = module.graph.find_nodes(op="get_attr")
    return [str(node.target) for node in constants if any(_overwrites(user, node) for user in node.users)]


def _found_chain(end: Node, segment: _Segment, module: GraphModule) -> FoundChain:
    """Return the chain of a segment that grows no further and ends with the node `end`."""
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
    """Return the segment that ends with a node, or None if the node belongs to no segment.

    Args:
        node: the node.
        segments: the segments that end with earlier nodes, by that node.
        module: the traced model.
        activations: as in `find_chains`.
    """
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
    """Append an operator to a segment.

    Args:
        before: the segment.
        node: the node of the operator.
        affine: that node, read as an affine operator.

    Returns:
        The longer segment, or None if the operator acts on another axis than the channels of the segment.
    """
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
    """Return a `build` function whose operators also carry the path of the module that calls the node."""
    path = module_path(node)
    return lambda axes: replace(build(axes), names=(path,))


def _extend_channelwise(before: _Segment, affine: AffineNode, dimensions: int, members: frozenset[Node]) -> _Segment | None:
    """Append an operator that scales and shifts channels to a segment whose last view moved the channels to axis 1.

    Args:
        before: the segment.
        affine: the operator.
        dimensions: number of axes of its input.
        members: the nodes of the longer segment.

    Returns:
        The longer segment, or None if the operator does more than scale and shift channels. The operator is applied before
        the view, to the last axis.
    """
    build, spatial = affine.build, dimensions - 2
    if affine.name or build is None or affine.axes not in (None, spatial) or not build(spatial).is_channelwise:
        return None

    def build_last(_: int) -> AffineOperator:
        operator = build(spatial)
        return AffineOperator(operator.weight.flatten(1), operator.bias, groups=operator.groups)

    return replace(before, steps=(*before.steps, _Step(build_last, "")), members=members)


def _extend_flat(before: _Segment, affine: AffineNode, members: frozenset[Node]) -> _Segment | None:
    """Append a layer to a segment whose value was flattened, as a convolution whose kernel covers the whole image.

    Returns None if the operator is not such a layer. A scale of single features is one only if the image is one position.
    """
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
    """Return the segment that ends with a view, or None if the view belongs to no segment.

    Three views belong to segments: a reshape of all axes but the last, a flattening of channels and positions, and a
    permutation that moves the last axis to axis 1.
    """
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
    """Append a flattening of `[batch, channels, *spatial]` to a segment, or return None if the view is another one.

    `shape` and `result` are the shapes before and after the view.
    """
    spatial = tuple(shape[2:])
    if len(shape) != (before.axes or 0) + 2 or not all(isinstance(size, int) for size in spatial):
        return None
    if node.target is _aten.permute.default or tuple(result) != (shape[0], shape[1] * math.prod(spatial)):
        return None
    return replace(before, members=before.members | {node}, flat=spatial)


def _segment_to_sum(node: Node, segments: Mapping[Node, _Segment]) -> _Segment | None:
    """Return the segment that ends with an addition of two branches of the same value, or None if there are no such branches.

    The segment continues the one that computes this value, unless a node outside of the branches reads the value too.
    """
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
    """Return the segment that ends with an operand of an addition. It is empty if other nodes read the operand too."""
    if operand in segments and len(operand.users) == 1:
        return segments[operand]
    return _Segment(operand, (), None, frozenset())


def _keeps_shape(branch: _Segment, operand: Node) -> bool:
    """Return whether a branch, with its views applied, has the shape of its source in all axes but the channels."""
    if branch.flat is not None or branch.is_permuted:
        return False
    return not branch.views or (shape_of(operand) or ())[:-1] == (shape_of(branch.source) or ())[:-1]


def _is_overwritten(node: Node) -> bool:
    """Return whether an in-place operator overwrites the value of a node, and further nodes read the value.

    The chain must not change the order of these reads and writes.
    """
    base = _base(node)
    return len(base.users) > 1 and any(_overwrites(user, base) for user in base.users)


def _base(node: Node) -> Node:
    """Return the node whose memory a view shares, or the node itself if it is not a view."""
    while node.args and isinstance(node.args[0], Node) and _is_view(node):
        node = node.args[0]
    return node


def _overwrites(user: Node, node: Node) -> bool:
    """Return whether `user` overwrites the value of `node`, directly or through a view."""
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
    """Build the elements of steps for a number of spatial axes."""
    return tuple(
        step.build(axes) if isinstance(step, _Step) else Sum(tuple(_elements(branch, axes) for branch in step))
        for step in steps
    )
