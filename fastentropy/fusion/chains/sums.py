"""Join two segments that begin at the same value, where a sum or a difference adds their values."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten import channelwise, read_weighted_sum
from fastentropy.fusion.chains.nodes import device_of, is_overwritten, overwrites, shape_of
from fastentropy.fusion.chains.segments import Segment, Step, Steps


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
    if not (isinstance(left, Node) and isinstance(right, Node)) or shape_of(left) != shape_of(right):
        return None
    branches = [_branch_to(*each, segments) for each in zip(weighted.operands, weighted.weights, strict=True)]
    source, members = branches[0].source, branches[0].members | branches[1].members | {node}
    axes = {branch.axes for branch in branches if branch.steps} - {None}
    if branches[1].source is not source or len(axes) != 1 or overwrites(node, source) or is_overwritten(source):
        return None
    if not all(_keeps_shape(branch, operand) for branch, operand in zip(branches, (left, right), strict=True)):
        return None
    steps: Steps = (tuple(each for branch in branches for each in _branches_of(branch.steps)),)
    before = segments.get(source)
    continues = before and members.issuperset(source.users) and before.axes in (None, *axes)
    if before and continues and before.flat is None and not before.views:
        return Segment(before.source, before.steps + steps, axes.pop(), before.members | members)
    return Segment(source, steps, axes.pop(), members)


def _branch_to(operand: Node, weight: float, segments: Mapping[Node, Segment]) -> Segment:
    """Return the segment that ends with an operand of a sum, multiplied by its weight.

    It begins at the operand if other nodes read the operand too.
    """
    empty = Segment(operand, (), None, frozenset())
    branch = segments.get(operand, empty) if len(operand.users) == 1 else empty
    if weight == 1:
        return branch
    shape = shape_of(operand) or ()

    def build(axes: int) -> AffineOperator:
        channels = shape[-axes - 1]
        assert isinstance(channels, int), "the operators of a chain fix the number of channels"
        scale = torch.full((channels,), weight, dtype=torch.float64, device=device_of(operand))
        return channelwise(scale, torch.zeros_like(scale), axes)

    return replace(branch, steps=(*branch.steps, Step(build, "")))


def _branches_of(steps: Steps) -> tuple[Steps, ...]:
    """Return the branches of steps that are nothing but a sum, and otherwise the steps as the only branch."""
    only = steps[0] if len(steps) == 1 else None
    return only if isinstance(only, tuple) else (steps,)


def _keeps_shape(branch: Segment, operand: Node) -> bool:
    """Return whether a branch, with its views applied, has the shape of its source in all axes but the channels."""
    if branch.flat is not None or branch.is_permuted:
        return False
    return not branch.views or (shape_of(operand) or ())[:-1] == (shape_of(branch.source) or ())[:-1]
