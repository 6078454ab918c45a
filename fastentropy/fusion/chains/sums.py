"""Join segments that begin at the same value, where a sum adds their values or a concatenation puts them in a row."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from fastentropy.fusion.chains.aten import read_concatenation, read_weighted_sum
from fastentropy.fusion.chains.layouts import natural_layout, reshaped, same_layout
from fastentropy.fusion.chains.nodes import device_of, is_overwritten, overwrites, readers_of, same_sizes, shape_of
from fastentropy.fusion.chains.segments import (
    Segment,
    Stacked,
    Steps,
    empty_segment,
    rearranged,
    scaled,
    with_axes,
    with_channels,
)


def segment_to_sum(node: Node, segments: Mapping[Node, Segment]) -> Segment | None:
    """Return the segment that ends with a weighted sum of two branches of the same value.

    The segment continues the one that computes this value, unless a node outside of the branches reads the value too.

    Args:
        node: the node.
        segments: the segments that end with earlier nodes, by that node.

    Returns:
        The segment, or None if the node is not such a sum.
    """
    weighted = read_weighted_sum(node)
    if weighted is None:
        return None
    left, right = weighted.operands
    if not (isinstance(left, Node) and isinstance(right, Node)) or not same_sizes(shape_of(left) or (), shape_of(right) or ()):
        return None
    first, second = (_branch_to(*each, node, segments) for each in zip(weighted.operands, weighted.weights, strict=True))
    source, members = first.source, first.members | second.members | {node}
    if second.source is not source or overwrites(node, source) or is_overwritten(source):
        return None
    if not (pair := _with_equal_axes(first, second)):
        return None
    first, second = map(rearranged, pair)
    if not same_sizes(first.shape, second.shape) or not same_layout(first.layout, second.layout):
        return None
    steps: Steps = (_branches_of(first.steps) + _branches_of(second.steps),)
    joined = replace(first, steps=steps, members=members)
    before = segments.get(source)
    return _behind(before, joined) if before and members.issuperset(readers_of(source)) else joined


def segment_to_concatenation(node: Node, segments: Mapping[Node, Segment]) -> Segment | None:
    """Return the segment that ends with a concatenation, along the channels, of branches of the same value.

    The arguments and the result are as for `segment_to_sum`.
    """
    concatenation = read_concatenation(node)
    if concatenation is None:
        return None
    operands, dim = concatenation
    branches = [
        _branch_to(operand, 1, node, segments) if operands.count(operand) == 1 else empty_segment(operand)
        for operand in operands
    ]
    source, members = branches[0].source, frozenset({node}).union(*(branch.members for branch in branches))
    if any(branch.source is not source for branch in branches) or is_overwritten(source):
        return None
    axes = next((branch.axes for branch in branches if branch.axes is not None), None)
    axes = with_channels(branches[0], dim).axes if axes is None else axes
    branches = [rearranged(with_axes(branch, axes) if branch.axes is None else branch) for branch in branches]
    value = shape_of(node) or ()
    if axes is None or axes != len(value) - dim - 1 or not all(each.axes == axes and each.is_natural for each in branches):
        return None
    first = branches[0]
    shape = (*first.shape[: first.channel_axis], value[dim], *first.shape[first.channel_axis + 1 :])
    layout = reshaped(natural_layout(shape), value)
    if layout is None or not isinstance(value[dim], int):
        return None
    steps: Steps = (Stacked(tuple(branch.steps for branch in branches)),)
    joined = replace(first, steps=steps, members=members, shape=shape, layout=layout)
    before = segments.get(source)
    return _behind(before, joined) if before and members.issuperset(readers_of(source)) else joined


def _behind(before: Segment, joined: Segment) -> Segment:
    """Append the steps of a segment to the one that computes its source, or return it alone if their axes differ."""
    pair = _with_equal_axes(before, joined)
    before, joined = (rearranged(pair[0]), pair[1]) if pair else (before, joined)
    if pair is None or not before.is_natural:
        return joined
    steps, members = before.steps + joined.steps, before.members | joined.members
    return replace(joined, source=before.source, steps=steps, members=members)


def _with_equal_axes(first: Segment, second: Segment) -> tuple[Segment, Segment] | None:
    """Return two segments with the number of spatial axes of either, or None if they have different numbers."""
    if first.axes is None or second.axes is None:
        return with_axes(first, second.axes), with_axes(second, first.axes)
    return (first, second) if first.axes == second.axes else None


def _branch_to(operand: Node, weight: float, node: Node, segments: Mapping[Node, Segment]) -> Segment:
    """Return the segment that ends with an operand of the sum `node`, multiplied by its weight.

    It begins at the operand if other nodes read the operand too.
    """
    branch = segments.get(operand) if len(readers_of(operand)) == 1 else None
    branch = branch or empty_segment(operand)
    if weight == 1:
        return branch
    scale, shift = (torch.tensor(value, dtype=torch.float64, device=device_of(operand)) for value in (weight, 0))
    return scaled(branch, node, scale, shift)


def _branches_of(steps: Steps) -> tuple[Steps, ...]:
    """Return the branches of steps that are nothing but a sum, and otherwise the steps as the only branch."""
    only = steps[0] if len(steps) == 1 else None
    return only if isinstance(only, tuple) else (steps,)
