"""Find the chains of a traced model: the longest stretches of linear operators with one input and one output.

A segment is a chain that is still being built. The search visits the nodes in call order, and computes for each node the
segment that ends with it.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import cast

from torch import nn
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten import read_node, read_reduction, read_view
from fastentropy.fusion.chains.elements import Activation, Chain, Flatten, operators
from fastentropy.fusion.chains.layouts import View, view_to
from fastentropy.fusion.chains.nodes import (
    FREE_SIZE_ERRORS,
    SPLITS,
    Size,
    is_overwritten,
    module_path,
    overwrites,
    readers_of,
    shape_of,
    used_parts,
)
from fastentropy.fusion.chains.passes import fold
from fastentropy.fusion.chains.segments import (
    Segment,
    Step,
    append_step,
    append_view,
    build_elements,
    empty_segment,
    extend,
    extend_reduction,
    rearranged,
    step_names,
)
from fastentropy.fusion.chains.sums import segment_to_concatenation, segment_to_sum

#: Reads a segment and appends a node to it, or returns None if the node cannot be appended.
_Append = Callable[[Segment], "Segment | None"]


@dataclass(frozen=True, eq=False)
class FoundChain:
    """A chain in a graph. No node outside of the chain reads its intermediate values.

    Attributes:
        source: the node whose value is the input of the chain.
        end: the node whose value is the output of the chain.
        members: the nodes of the chain in call order, without the source and with the end.
        axes: the number of spatial axes.
        build: builds `elements`.
        names: paths of the modules of its convolutions, linear layers and activations, in call order.
        shape: the shape of the output of `elements` in the trace.
        view: the view of this output that is the output of the chain, or None if the two are the same.
        ended_by: the operators that read the output of the chain and do not belong to it, with the path of their module; ""
            if it is an output of the model.
    """

    source: Node
    end: Node
    members: tuple[Node, ...]
    axes: int
    build: Callable[[], Chain]
    names: tuple[str, ...]
    shape: tuple[Size, ...] = ()
    view: View | None = None
    ended_by: str = ""

    @property
    def elements(self) -> Chain:
        """Return the function of the chain, except for `view`. They are built anew, to save memory."""
        return self.build()

    @property
    def folded(self) -> Chain:
        """Return the elements with batch norm folded into its neighbours; see `fold`. They are built anew, too."""
        return fold(self.elements)

    @cached_property
    def has_folds(self) -> bool:
        """Return whether there is batch norm, or padding, to be folded into its neighbours."""
        return len(operators(self.folded)) < len(operators(self.elements))

    @property
    def has_fixed_size(self) -> bool:
        """Return whether the trace fixed the spatial sizes of the source."""
        shape = shape_of(self.source) or ()
        return all(isinstance(size, int) for size in shape[len(shape) - self.axes :])


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
    read = functools.partial(_read, module=module, activations=activations or {})
    for node in module.graph.nodes:
        with contextlib.suppress(*FREE_SIZE_ERRORS):
            segment = _segment_to(node, segments, read(node))
            if segment is not None:
                segments[node] = segment
    inner = {member for end, segment in segments.items() for member in segment.members if member is not end}
    ends = [end for end, segment in segments.items() if end not in inner and step_names(segment.steps)]
    found = [_found_chain(end, segments, read) for end in ends]
    return [chain for chain in found if chain is not None]


def overwritten_constants(module: GraphModule) -> list[str]:
    """Return the names of the constants (buffers, for example) that a graph overwrites when it runs."""
    constants = module.graph.find_nodes(op="get_attr")
    return [str(node.target) for node in constants if any(overwrites(user, node) for user in node.users)]


def _found_chain(
    last: Node, segments: Mapping[Node, Segment], read: Callable[[Node], tuple[Node, _Append] | None]
) -> FoundChain | None:
    """Return the chain of a segment that grows no further and ends with the node `last`.

    Views at its end only belong to the chain if they give back the natural value, or are a selection. Returns None if an
    operator needs a size that is free, or a graph cannot compute the shape of the output.
    """
    end, segment = last, rearranged(segments[last])
    while not segment.is_natural and read_view(end) and end.args[0] in segments[last].members:
        end = cast(Node, end.args[0])
    segment = segment if end is last else segments[end]
    members = tuple(node for node in end.graph.nodes if node in segment.members or _only_splits(node, segment.members))
    if not segment.is_natural:
        segment, members = _from_first_operator(segment, members, read)
    shape = shape_of(end) or ()
    axes = segment.axes or 0
    build = functools.partial(build_elements, segment.steps, axes)
    try:
        build()
        view = view_to(segment.layout, segment.natural_shape, shape)
    except (ValueError, *FREE_SIZE_ERRORS):
        return None
    if view and segment.axes and view.order is None and len(segment.shape) == segment.axes + 2 and len(shape) == 2:
        build, view = functools.partial(build_elements, segment.steps, axes, (Flatten(),)), None
    ended_by = ", ".join(described(user) for user in last.users if user.op != "output")
    return FoundChain(
        segment.source, end, members, axes, build, step_names(segment.steps), segment.natural_shape, view, ended_by
    )


def _from_first_operator(
    segment: Segment, members: tuple[Node, ...], read: Callable[[Node], tuple[Node, _Append] | None]
) -> tuple[Segment, tuple[Node, ...]]:
    """Return a segment without the views at its beginning, and its members, if its last value is then its natural value.

    A layer on tokens that are a view of an image then stays a linear layer. Otherwise, the segment is returned as it is.
    """
    views = tuple(itertools.takewhile(read_view, members))
    if not views or not all(isinstance(step, Step) for step in segment.steps):
        return segment, members
    shorter: Segment | None = empty_segment(views[-1])
    for node in members[len(views) :]:
        reading = read(node)
        shorter = reading[1](shorter) if reading and shorter else None
    return (shorter, members[len(views) :]) if shorter and shorter.is_natural else (segment, members)


def _read(node: Node, module: GraphModule, activations: Mapping[str, nn.Module]) -> tuple[Node, _Append] | None:
    """Read a node as a view, a mean or sum over positions, an activation or an operator.

    Args:
        node: the node.
        module: the traced model.
        activations: as in `find_chains`.

    Returns:
        The node of the operand, and a function that appends the node to the segment that ends with the operand. None if the
        node is of no such kind.
    """
    if view := read_view(node):
        return cast(Node, node.args[0]), functools.partial(append_view, node=node, view=view)
    affine, reduction = read_node(node, module), read_reduction(node)
    if not affine:
        return reduction and (reduction.operand, functools.partial(extend_reduction, node=node, reduction=reduction))
    operand = affine[0].operand
    if (path := module_path(node)) in activations:
        step = Step(lambda _: Activation(path, activations[path]), path)
        return operand, functools.partial(append_step, node=node, step=step)

    def append_any(before: Segment) -> Segment | None:
        longer = next(filter(None, (extend(before, node, each) for each in affine)), None)
        return extend_reduction(before, node, reduction) if reduction and longer is None else longer

    return operand, append_any


def _segment_to(node: Node, segments: Mapping[Node, Segment], reading: tuple[Node, _Append] | None) -> Segment | None:
    """Return the segment that ends with a node, or None if the node belongs to no segment.

    Args:
        node: the node.
        segments: the segments that end with earlier nodes, by that node.
        reading: what `_read` returns for the node.
    """
    if reading is None:
        return segment_to_sum(node, segments) or segment_to_concatenation(node, segments)
    operand, append = reading
    before = segments.get(operand) if len(readers_of(operand)) == 1 else None
    writes = overwrites(node, operand)
    if before and (before.has_own_memory or not writes) and (longer := append(before)):
        return longer
    return None if writes or is_overwritten(operand) else append(empty_segment(operand))


def _only_splits(node: Node, members: frozenset[Node]) -> bool:
    """Return whether a node only serves to split a value into members of a chain, or is a part of it that no node reads."""
    if node.target is getitem and not node.users:
        return _only_splits(cast(Node, node.args[0]), members)
    return node.target in SPLITS and not members.isdisjoint(node.users) and members.issuperset(used_parts(node))


def described(node: Node) -> str:
    """Return the operator of a node and the path of its module, such as "aten.relu in features.0.2"."""
    name, path = str(node.target).rpartition(".")[0] or str(node.target), module_path(node)
    return f"{name} in {path}" if path else name
