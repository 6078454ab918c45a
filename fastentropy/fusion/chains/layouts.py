"""Say where the axes of a value lie in a view of it.

Operators of a chain compute a value whose channels lie in axis 1 or in the last axis: the natural value. Reshapes and
permutations keep its numbers and move them to other axes. A layout says what each axis of the result holds, so that a chain can
go on through them, and is followed by one view where it ends.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.fx import Graph, Node

from fastentropy.fusion.chains.nodes import Size, product, quotient, same_size, same_sizes

_aten = torch.ops.aten


class Part(NamedTuple):
    """A factor of an axis of the natural value, which a reshape may have split into several.

    Parts are compared by `same_parts`, since a plain comparison of free sizes would fix them in the trace.

    Attributes:
        axis: the index of the axis.
        size: the number of positions of this factor.
        step: the distance between two of its positions along the axis; 1 if the factor is the whole axis.
    """

    axis: int
    size: Size
    step: Size = 1


#: For each axis of a value, the factors of the natural value's axes that it holds, the slowest first. Axes of size 1 hold none.
Layout: TypeAlias = tuple[tuple[Part, ...], ...]


class View(NamedTuple):
    """How a value is made from its natural value: by a reshape, a permutation and a reshape. None leaves one of them out."""

    parts: tuple[Size, ...] | None
    order: tuple[int, ...] | None
    shape: tuple[Size, ...] | None


def natural_layout(shape: Sequence[Size]) -> Layout:
    """Return the layout of a natural value of a given shape: each axis holds itself."""
    return tuple(() if same_size(size, 1) else (Part(axis, size),) for axis, size in enumerate(shape))


def same_layout(left: Layout, right: Layout) -> bool:
    """Return whether two layouts are known to be the same."""
    return len(left) == len(right) and all(map(same_parts, left, right))


def same_parts(left: Sequence[Part], right: Sequence[Part]) -> bool:
    """Return whether two axes are known to hold the same factors."""
    if len(left) != len(right):
        return False
    pairs = zip(left, right, strict=True)
    return all(a.axis == b.axis and same_size(a.size, b.size) and same_size(a.step, b.step) for a, b in pairs)


def permuted(layout: Layout, order: Sequence[int]) -> Layout:
    """Return the layout after a permutation of the axes."""
    return tuple(layout[axis] for axis in order)


def reshaped(layout: Layout, shape: Sequence[Size]) -> Layout | None:
    """Return the layout after a reshape, or None if the sizes do not say which factors the new axes hold."""
    parts = [part for group in layout for part in group]
    groups: list[tuple[Part, ...]] = []
    for size in shape:
        group: list[Part] = []
        while not same_size(size, 1):
            if not parts:
                return None
            part = parts.pop(0)
            if (left := quotient(size, part.size)) is not None:
                group.append(part)
                size = left
            elif (inner := quotient(part.size, size)) is not None:
                group.append(Part(part.axis, size, product((part.step, inner))))
                parts.insert(0, Part(part.axis, inner, part.step))
                break
            else:
                return None
        groups.append(joined(group))
    return None if parts else tuple(groups)


def joined(group: Iterable[Part]) -> tuple[Part, ...]:
    """Return the factors that an axis holds, with neighbours joined that are factors of the same axis."""
    parts: list[Part] = []
    for part in group:
        last = parts[-1] if parts else None
        if last and last.axis == part.axis and same_size(last.step, product((part.size, part.step))):
            parts[-1] = Part(part.axis, product((last.size, part.size)), part.step)
        else:
            parts.append(part)
    return tuple(parts)


def view_to(layout: Layout, natural: Sequence[Size], shape: Sequence[Size]) -> View | None:
    """Return how to make a value of a given layout and shape from its natural value; None if it is the natural value itself.

    Raises ValueError if the sizes cannot be computed from the shape of the natural value.
    """
    parts = [part for group in layout for part in group]
    by_axis = sorted(range(len(parts)), key=lambda index: (parts[index].axis, -_factors_behind(parts[index], parts)))
    order = tuple(by_axis.index(index) for index in range(len(parts)))
    moves = order != tuple(range(len(parts)))
    split, moved = tuple(parts[index].size for index in by_axis), tuple(part.size for part in parts)
    view = View(
        split if moves and not same_sizes(split, natural) else None,
        order if moves else None,
        None if same_sizes(moved if moves else natural, shape) else tuple(shape),
    )
    for sizes in (view.parts or (), view.shape or ()):
        if sum(_axis_of(size, natural) is None for size in sizes if not isinstance(size, int)) > 1:
            raise ValueError(
                "a view of the chain's output has more than one size that is neither fixed nor a size of this output"
            )
    return None if view == View(None, None, None) else view


def append_view(graph: Graph, view: View, value: Node, natural: Sequence[Size]) -> Node:
    """Append a view to a graph and return its node.

    Args:
        graph: the graph, at whose insertion point nodes are added.
        view: the view.
        value: the node of the natural value.
        natural: the shape of that value in the trace.
    """
    result = value
    if view.parts is not None:
        result = graph.call_function(_aten.reshape.default, (result, _sizes(graph, view.parts, value, natural)))
    if view.order is not None:
        result = graph.call_function(_aten.permute.default, (result, list(view.order)))
    if view.shape is not None:
        result = graph.call_function(_aten.reshape.default, (result, _sizes(graph, view.shape, value, natural)))
    return result


def _sizes(graph: Graph, shape: Sequence[Size], value: Node, natural: Sequence[Size]) -> list[Any]:
    """Return the sizes of a reshape: numbers, one −1 if a size must be computed, and nodes that read the sizes of `value`."""
    free = [size for size in shape if not isinstance(size, int)]

    def size_of(size: Size) -> Any:
        if isinstance(size, int):
            return size
        axis = None if len(free) == 1 else _axis_of(size, natural)
        return -1 if axis is None else graph.call_function(_aten.sym_size.int, (value, axis))

    return list(map(size_of, shape))


def _axis_of(size: Size, natural: Sequence[Size]) -> int | None:
    """Return the first axis of a shape that has a given size, or None."""
    return next((axis for axis, own in enumerate(natural) if same_size(own, size)), None)


def _factors_behind(part: Part, parts: Sequence[Part]) -> int:
    """Return how many of the factors of the same axis are faster than a factor, or are the factor itself."""
    return sum(other.axis == part.axis and quotient(part.step, other.step) is not None for other in parts)
