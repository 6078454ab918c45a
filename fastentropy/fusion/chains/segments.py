"""Append operators to a segment, which is a chain that is still being built, and build the elements of its steps.

A segment knows what its value looks like so far: whether it was flattened, and whether views moved its channels. An operator
that acts on another axis than the channels cannot be appended.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten import AffineNode
from fastentropy.fusion.chains.elements import Chain, Element, Sum
from fastentropy.fusion.chains.nodes import module_path, shape_of

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Step:
    """An element of a segment. It is built later, when the number of spatial axes is known.

    Attributes:
        build: returns the element for a number of spatial axes.
        name: path of the convolution, linear layer or activation, or empty for any other operator. A segment is a chain only
            if one of its steps has a name.
    """

    build: Callable[[int], Element]
    name: str


#: The steps of a segment in order. A tuple in place of a step is a sum: it holds the steps of each branch.
Steps = tuple["Step | tuple[Steps, ...]", ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A chain that may still grow.

    Attributes:
        source: the node whose value is the input.
        steps: the elements so far.
        axes: number of spatial axes, None until an operator fixes it.
        members: the nodes so far, without the source.
        views: as in `finding.FoundChain`.
        flat: the spatial size that the value had before it was flattened, or None if it was not flattened. A linear layer
            after the flattening becomes a convolution whose kernel has this size.
    """

    source: Node
    steps: Steps
    axes: int | None
    members: frozenset[Node]
    views: tuple[Node, ...] = ()
    flat: tuple[int, ...] | None = None

    @property
    def is_permuted(self) -> bool:
        """Return whether the last view moves the channels from the last axis to axis 1."""
        return bool(self.views) and self.views[-1].target is _aten.permute.default


def extend(before: Segment, node: Node, affine: AffineNode) -> Segment | None:
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
    steps = before.steps if affine.build is None else (*before.steps, Step(_with_path(affine.build, node), affine.name))
    flat = (1,) * (affine.axes or 0) if affine.flattens else None
    return replace(before, steps=steps, axes=axes, members=members, flat=flat)


def _with_path(build: Callable[[int], AffineOperator], node: Node) -> Callable[[int], AffineOperator]:
    """Return a `build` function whose operators also carry the path of the module that calls the node."""
    path = module_path(node)
    return lambda axes: replace(build(axes), names=(path,))


def _extend_channelwise(before: Segment, affine: AffineNode, dimensions: int, members: frozenset[Node]) -> Segment | None:
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

    return replace(before, steps=(*before.steps, Step(build_last, "")), members=members)


def _extend_flat(before: Segment, affine: AffineNode, members: frozenset[Node]) -> Segment | None:
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

    step = Step(build_covering, affine.name)
    return replace(before, steps=(*before.steps, step), members=members, flat=(1,) * len(sizes))


def step_names(steps: Steps) -> tuple[str, ...]:
    """Return the paths of the convolutions, linear layers and activations among the steps."""
    names: list[str] = []
    for step in steps:
        if isinstance(step, Step):
            names += [step.name] * bool(step.name)
        else:
            names += [name for branch in step for name in step_names(branch)]
    return tuple(names)


def build_elements(steps: Steps, axes: int) -> Chain:
    """Build the elements of steps for a number of spatial axes."""
    return tuple(
        step.build(axes) if isinstance(step, Step) else Sum(tuple(build_elements(branch, axes) for branch in step))
        for step in steps
    )
