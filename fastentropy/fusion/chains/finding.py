"""Find the chains of a traced model: the longest stretches of linear operators with one input and one output.

A segment is a chain that is still being built. The search visits the nodes in call order, and computes for each node the
segment that ends with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten import read_node
from fastentropy.fusion.chains.elements import Activation, Chain, Flatten, operators
from fastentropy.fusion.chains.nodes import is_overwritten, module_path, overwrites, shape_of
from fastentropy.fusion.chains.passes import fold
from fastentropy.fusion.chains.segments import Segment, Step, build_elements, extend, step_names
from fastentropy.fusion.chains.sums import segment_to_sum

_aten = torch.ops.aten

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
    def ended_by(self) -> str:
        """Return the operators behind the end of the chain, with the path of their module; "" behind the model's outputs."""
        return ", ".join(_described(user) for user in self.end.users if user.op != "output")

    @property
    def has_fixed_size(self) -> bool:
        """Return whether the trace fixed the spatial sizes of the source."""
        axes = len(operators(self.elements)[0].axes)
        shape = shape_of(self.source) or ()
        return all(isinstance(size, int) for size in shape[len(shape) - axes :])


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
    segments: dict[Node, Segment] = {}
    for node in module.graph.nodes:
        segment = _segment_to(node, segments, module, activations or {})
        if segment is not None:
            segments[node] = segment
    inner = {member for end, segment in segments.items() for member in segment.members if member is not end}
    ends = [end for end, segment in segments.items() if end not in inner and step_names(segment.steps)]
    return [_found_chain(end, segments[end], module) for end in ends]


def overwritten_constants(module: GraphModule) -> list[str]:
    """Return the names of the constants (buffers, for example) that a graph overwrites when it runs."""
    constants = module.graph.find_nodes(op="get_attr")
    return [str(node.target) for node in constants if any(overwrites(user, node) for user in node.users)]


def _found_chain(end: Node, segment: Segment, module: GraphModule) -> FoundChain:
    """Return the chain of a segment that grows no further and ends with the node `end`."""
    members = tuple(node for node in module.graph.nodes if node in segment.members)
    elements = build_elements(segment.steps, segment.axes or 0)
    if segment.flat is not None:
        elements += (Flatten(),)
    return FoundChain(segment.source, end, members, elements, step_names(segment.steps), segment.views)


def _segment_to(
    node: Node,
    segments: Mapping[Node, Segment],
    module: GraphModule,
    activations: Mapping[str, nn.Module],
) -> Segment | None:
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
        return segment_to_sum(node, segments)
    start = Segment(affine.operand, (), None, frozenset())
    before = segments.get(affine.operand) if len(affine.operand.users) == 1 else None
    if (path := module_path(node)) in activations:
        activation, before = Activation(path, activations[path]), before or start
        return replace(before, steps=(*before.steps, Step(lambda _: activation, path)), members=before.members | {node})
    writes = overwrites(node, affine.operand)
    if before and (before.steps or not writes) and (extended := extend(before, node, affine)):
        return extended
    if writes or is_overwritten(affine.operand):
        return None
    return extend(start, node, affine)


def _segment_to_view(node: Node, segments: Mapping[Node, Segment]) -> Segment | None:
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
    return None if is_overwritten(operand) else Segment(operand, (), 0, frozenset({node}), (node,))


def _flatten(before: Segment, node: Node, shape: tuple[Any, ...], result: tuple[Any, ...]) -> Segment | None:
    """Append a flattening of `[batch, channels, *spatial]` to a segment, or return None if the view is another one.

    `shape` and `result` are the shapes before and after the view.
    """
    spatial = tuple(shape[2:])
    if len(shape) != (before.axes or 0) + 2 or not all(isinstance(size, int) for size in spatial):
        return None
    if node.target is _aten.permute.default or tuple(result) != (shape[0], shape[1] * math.prod(spatial)):
        return None
    return replace(before, members=before.members | {node}, flat=spatial)


def _described(node: Node) -> str:
    """Return the operator of a node and the path of its module, such as "aten.relu in features.0.2"."""
    name, path = str(node.target).rpartition(".")[0] or str(node.target), module_path(node)
    return f"{name} in {path}" if path else name
