"""Append operators to a segment, which is a chain that is still being built, and build the elements of its steps.

A segment knows where its channels lie so far. An operator that acts on another axis cannot be appended.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten import AffineNode, Reduction, average, channelwise
from fastentropy.fusion.chains.elements import Chain, Concatenation, Element, Sum
from fastentropy.fusion.chains.layouts import Layout, Part, joined, natural_layout, reshaped, same_layout
from fastentropy.fusion.chains.nodes import Size, device_of, known, module_path, product, same_size, shape_of
from fastentropy.fusion.chains.rearrangements import rearrangement
from fastentropy.fusion.chains.selections import Selection, selected_channels, summed_positions

#: Convolutions take images with at most this many axes before the channels: the batch.
_AXES_BEFORE_CHANNELS = 1


@dataclass(frozen=True, eq=False)
class Step:
    """An element of a segment. It is built later, when the number of spatial axes is known.

    Attributes:
        build: returns the element for a number of spatial axes.
        name: path of the convolution, linear layer or activation, or empty for any other operator. A segment is a chain only
            if one of its steps has a name.
        is_view: whether the output of the element shares memory with its input.
    """

    build: Callable[[int], Element]
    name: str
    is_view: bool = False


@dataclass(frozen=True, eq=False)
class Stacked:
    """The steps of each branch of a concatenation along the channels."""

    branches: tuple["Steps", ...]


#: The steps of a segment in order. A tuple in place of a step is a sum: it holds the steps of each branch.
Steps = tuple["Step | Stacked | tuple[Steps, ...]", ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A chain that may still grow.

    The steps compute the natural value from that of the source. In both, `axes` spatial axes follow the channels. The value of
    the last node is a view of the natural value. If there are no spatial axes, all axes before the channels count as one.

    Attributes:
        source: the node whose value is the input.
        steps: the elements so far.
        axes: number of spatial axes, None until an operator fixes it.
        members: the nodes so far, without the source.
        shape: the shape of the natural value. If `axes` is 0, this is the number of rows and that of channels.
        layout: where the axes of the natural value lie in the value of the last node.
    """

    source: Node
    steps: Steps
    axes: int | None
    members: frozenset[Node]
    shape: tuple[Size, ...]
    layout: Layout

    @property
    def is_natural(self) -> bool:
        """Return whether the value of the last node is the natural value itself."""
        layout = reshaped(natural_layout(self.shape), self.natural_shape)
        return layout is not None and same_layout(self.layout, layout)

    @property
    def has_own_memory(self) -> bool:
        """Return whether the value of the last node shares no memory with the source."""
        return not all(isinstance(step, Step) and step.is_view for step in self.steps)

    @property
    def natural_shape(self) -> tuple[Size, ...]:
        """Return the shape of the natural value, with the axes before the channels as the source has them."""
        leading = (shape_of(self.source) or ())[:-1] if self.axes == 0 else self.shape[:-1]
        return (*leading, *self.shape[-1:])

    @property
    def channel_axis(self) -> int:
        """Return the axis of the natural value that holds the channels; `axes` must be known."""
        assert self.axes is not None
        return len(self.shape) - self.axes - 1


def empty_segment(source: Node) -> Segment:
    """Return the segment that begins at a node and has no operators yet."""
    shape = shape_of(source) or ()
    return Segment(source, (), None, frozenset(), shape, natural_layout(shape))


def append_step(before: Segment, node: Node, step: Step) -> Segment:
    """Append an element that keeps the shape to a segment; `node` computes it."""
    return replace(before, steps=(*before.steps, step), members=before.members | {node})


def append_view(before: Segment, node: Node, view: Callable[[Layout], Layout | None]) -> Segment | None:
    """Append a view to a segment; `view` is what `read_view` returns for its node.

    Returns None if the view splits an axis in such a way that the layout cannot follow it.
    """
    layout = view(before.layout)
    return None if layout is None else replace(before, members=before.members | {node}, layout=layout)


def extend(before: Segment, node: Node, affine: AffineNode) -> Segment | None:
    """Append an operator to a segment.

    Args:
        before: the segment.
        node: the node of the operator.
        affine: that node, read as an affine operator.

    Returns:
        The longer segment, or None if the operator acts on another axis than the channels of the segment.
    """
    build = affine.build
    if build is None:  # a mean of single positions may leave out their axes
        value = shape_of(node) or ()
        return append_view(before, node, lambda layout: layout if len(layout) == len(value) else reshaped(layout, value))
    if affine.number is not None:
        return scaled(before, node, *affine.number)
    assert affine.axes is not None
    before = rearranged(before if before.axes is not None else _with_axes_of(before, affine.axes))
    if before.axes is None:
        return None
    if not before.is_natural or affine.axes != before.axes:
        return _extend_view(before, node, affine)
    value = shape_of(node) or ()
    behind = (1,) * before.axes if affine.flattens else value[len(value) - before.axes :]
    channels = value[len(value) - (0 if affine.flattens else before.axes) - 1]
    shape = (*before.shape[: before.channel_axis], channels, *behind)
    layout = reshaped(natural_layout(shape), value)
    step = Step(_with_path(build, node), affine.name, affine.is_view)
    return None if layout is None else replace(append_step(before, node, step), shape=shape, layout=layout)


def extend_reduction(before: Segment, node: Node, reduction: Reduction) -> Segment | None:
    """Append a mean or a sum over positions to a segment, as average pooling over whole spatial axes of the natural value.

    Returns None if the node reduces other axes, or parts of an axis, or if the number of channels or of positions is free.
    """
    if before.axes is None and reduction.axes[0] > 0:
        before = with_channels(before, reduction.axes[0] - 1)
    parts = [part for axis in reduction.axes for part in before.layout[axis]]
    if before.axes is None or not all(_is_whole(part, before.shape) and part.axis > before.channel_axis for part in parts):
        return None
    reduced = [part.axis for part in parts]
    channels, *spatial = before.shape[before.channel_axis :]
    kernel = [size if before.channel_axis + axis in reduced else 1 for axis, size in enumerate(spatial, 1)]
    fixed = [size for size in kernel if isinstance(size, int)]
    layout = tuple(() if axis in reduction.axes else group for axis, group in enumerate(before.layout))
    squeezed = reshaped(layout, shape_of(node) or ())
    if squeezed is None or not isinstance(channels, int) or len(fixed) < len(kernel):
        return None
    after = replace(
        before,
        members=before.members | {node},
        shape=tuple(1 if axis in reduced else size for axis, size in enumerate(before.shape)),
        layout=squeezed,
    )
    if math.prod(fixed) == 1:
        return after
    device = device_of(node)
    mean = functools.partial(average, channels, fixed, fixed, (0,) * len(fixed), device)
    total = functools.partial(summed_positions, channels, fixed, device)
    return append_step(after, node, Step(_with_path(lambda _: mean() if reduction.is_mean else total(), node), ""))


def scaled(before: Segment, node: Node, scale: Tensor, shift: Tensor) -> Segment:
    """Append a multiplication of all values by a number, and an addition of a number, to a segment; `node` computes both."""
    shape, path = before.shape, (module_path(node),)

    def build(axes: int) -> AffineOperator:
        channels = known(shape[-axes - 1])
        return replace(channelwise(scale.expand(channels), shift.expand(channels), axes), names=path)

    return append_step(before, node, Step(build, ""))


def rearranged(segment: Segment) -> Segment:
    """Return a segment in which views that permute channels, or (un)shuffle pixels, are a step; any other one as it is."""
    if segment.axes is None or segment.is_natural:
        return segment
    found = rearrangement(segment.layout, segment.shape, segment.axes)
    if found is None:
        return segment
    device = device_of(segment.source)
    steps = (*segment.steps, Step(lambda _: found.build(device), ""))
    return replace(segment, steps=steps, shape=found.shape, layout=found.layout)


def _with_axes_of(segment: Segment, axes: int) -> Segment:
    """Return a segment, whose number of spatial axes was not known, with the number that an operator behind it needs.

    It stays None as in `with_channels`, but not where the views of the segment are a selection.
    """
    channels = len(segment.layout) - axes - 1
    found = with_channels(segment, channels)
    if found.axes is None and len(segment.layout) == len(segment.shape) and channels <= _AXES_BEFORE_CHANNELS and axes <= 3:
        selected = rearranged(with_axes(segment, axes))
        return selected if selected.is_natural else segment
    return found


def with_channels(segment: Segment, axis: int) -> Segment:
    """Return a segment with the number of spatial axes that it has if its channels are an axis of its last node's value.

    That number stays None if this axis is not one whole axis of the source, or if convolutions take no such value.
    """
    if segment.is_natural:
        channels = axis
    elif len(segment.layout[axis]) == 1 and _is_whole(segment.layout[axis][0], segment.shape):
        channels = segment.layout[axis][0].axis
    else:
        return segment
    axes = len(segment.shape) - channels - 1
    return with_axes(segment, axes) if axes == 0 or (channels <= _AXES_BEFORE_CHANNELS and axes <= 3) else segment


def with_axes(segment: Segment, axes: int | None) -> Segment:
    """Return a segment whose number of spatial axes was not known with this number. None leaves the segment as it is."""
    if axes != 0 or segment.axes == 0:
        return segment if axes is None else replace(segment, axes=axes)
    *leading, channels = segment.shape
    rows = product(leading)
    steps = [product(leading[axis + 1 :]) for axis in range(len(leading))]
    last = len(segment.shape) - 1
    at = 1 if leading else 0

    def in_rows(part: Part) -> Part:
        return part._replace(axis=at) if part.axis == last else Part(0, part.size, product((part.step, steps[part.axis])))

    layout = tuple(joined(map(in_rows, group)) for group in segment.layout)
    return replace(segment, axes=0, shape=(rows, channels) if leading else (channels,), layout=layout)


def _is_whole(part: Part, shape: tuple[Size, ...]) -> bool:
    """Return whether a factor of an axis of a natural value is the whole axis."""
    return same_size(part.size, shape[part.axis])


def _with_path(build: Callable[[int], AffineOperator], node: Node) -> Callable[[int], AffineOperator]:
    """Return a `build` function whose operators also carry the path of the module that calls the node."""
    path = module_path(node)
    return lambda axes: replace(build(axes), names=(path,))


def _extend_view(before: Segment, node: Node, affine: AffineNode) -> Segment | None:
    """Append an operator to a segment whose last value is a view of its natural value.

    The operator must act on the channels alone, at each position alike. A linear layer may also act on channels that were
    flattened together with spatial axes: it is a convolution whose kernel covers these axes.

    Returns:
        The longer segment, or None if the operator is of another kind, or acts on other axes.
    """
    assert affine.axes is not None
    assert affine.build is not None
    axis, channels, shape = len(before.layout) - affine.axes - 1, before.channel_axis, before.shape
    held = [part.axis for part in before.layout[axis]]
    operator = affine.build(affine.axes)
    if not operator.is_pointwise or not all(part.axis >= channels and _is_whole(part, shape) for part in before.layout[axis]):
        return None
    if not same_size(operator.in_channels, product(shape[each] for each in {channels, *held})):
        return None
    if (operator.groups > 1 or isinstance(operator, Selection)) and held != [channels]:
        return None
    after = [1 if each in held else size for each, size in enumerate(shape)]
    after[channels] = operator.out_channels
    layout = list(before.layout)
    layout[axis] = natural_layout(after)[channels]
    step = Step(_with_path(lambda _: _on_natural_axes(operator, held, shape[channels:], channels), node), affine.name)
    return replace(append_step(before, node, step), shape=tuple(after), layout=tuple(layout))


def _on_natural_axes(operator: AffineOperator, held: Sequence[int], shape: tuple[Size, ...], channels: int) -> AffineOperator:
    """Return a pointwise operator on an axis that holds several axes of the natural value as an operator on that value.

    Args:
        operator: the operator.
        held: the axes of the natural value that its channels hold, the slowest first.
        shape: the sizes of the natural value from the channels on.
        channels: the axis of the natural value that holds the channels.
    """
    kernel, ones = [size if channels + axis in held else 1 for axis, size in enumerate(shape)][1:], (1,) * (len(shape) - 1)
    weight = operator.weight.flatten(1)
    if isinstance(operator, Selection):
        return selected_channels(weight.argmax(1), operator.in_channels, len(ones))
    if operator.groups == 1 and held:
        order = sorted(range(len(held)), key=lambda index: held[index])
        split = weight.reshape(len(weight), *(shape[axis - channels] for axis in held))
        weight = split.permute(0, *(1 + index for index in order)).flatten(1)
    weight = weight.reshape(len(weight), -1, *kernel)
    return AffineOperator(weight, operator.bias, ones, (0,) * len(ones), ones, operator.groups)


def step_names(steps: Steps) -> tuple[str, ...]:
    """Return the paths of the convolutions, linear layers and activations among the steps."""
    names: list[str] = []
    for step in steps:
        if isinstance(step, Step):
            names += [step.name] * bool(step.name)
        else:
            branches = step.branches if isinstance(step, Stacked) else step
            names += [name for branch in branches for name in step_names(branch)]
    return tuple(names)


def build_elements(steps: Steps, axes: int, last: Chain = ()) -> Chain:
    """Build the elements of steps for a number of spatial axes, and append further elements."""

    def built(step: "Step | Stacked | tuple[Steps, ...]") -> Element:
        if isinstance(step, Step):
            return step.build(axes)
        if isinstance(step, Stacked):
            return Concatenation(tuple(build_elements(branch, axes) for branch in step.branches), axes)
        return Sum(tuple(build_elements(branch, axes) for branch in step))

    return (*map(built, steps), *last)
