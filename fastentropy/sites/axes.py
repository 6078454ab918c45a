"""Describe what the axes of a tensor hold, and follow this when axes are moved, merged, split, cut and extended.

An axis is a sequence of factors, outermost first. A reshape that merges axes joins their factors, and one that splits an axis
divides them, so that a later reshape back finds every part again. Nothing here needs a tensor.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

#: The channel axis of a tensor whose channel axis had size 1 and was squeezed away.
NO_AXIS = -1

#: What a factor holds: OTHER (unknown), CHANNEL, or a position in the batch or among the tokens of a set of token sequences.
#: The set with number n = 1, 2, … has the labels 2n (batch) and 2n + 1 (tokens).
Label = int
OTHER, CHANNEL = -1, 0

#: Where the axes of an operator's input go. For each of them, the axis of the output; None if it is removed; ~axis if its
#: entries change: if it is cut or extended, or if its entries change places.
Where = Sequence[int | None]


class Factor(NamedTuple):
    """A part of an axis: `size` entries, which count in steps of `step` through what they hold."""

    label: Label
    size: int
    step: int = 1


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]


class Note(NamedTuple):
    """What is known about a tensor."""

    axes: Axes  # what each axis holds
    lost: frozenset[int] = frozenset()  # the sets of token sequences that the values come from, and that were lost on the way


def unlabelled(shape: Sequence[int]) -> Axes:
    """Return the axes of a tensor about which nothing is known."""
    return tuple([(Factor(OTHER, size),) for size in shape])


@lru_cache(4096)
def channel_axis_of(axes: Axes) -> int | None:
    """Return the axis of the channels: NO_AXIS if it had size 1 and was squeezed away, None if there is none.

    If the channels were split, as into the heads of an attention, this is the axis of the innermost part. If they were merged
    with axes after them, as by flatten, it is the merged axis. An axis that merges them with axes before them does not count.
    """
    found: tuple[int, int] | None = None
    single = None
    for place, axis in enumerate(axes):
        steps = [step for label, size, step in axis if label == CHANNEL and size != 1]
        leading = next((factor.label for factor in axis if factor.size != 1), OTHER)
        if steps and leading == CHANNEL and (found is None or min(steps) <= found[0]):
            found = min(steps), place
        if single is None and (CHANNEL, 1) in [factor[:2] for factor in axis]:
            single = place if prod(factor.size for factor in axis) == 1 else NO_AXIS
    has_more = any(factor.label == CHANNEL and factor.size != 1 for axis in axes for factor in axis)
    return found[1] if found is not None else None if has_more else single


@lru_cache(4096)
def token_axes_of(axes: Axes, tokens_set: int, sizes: tuple[int, int]) -> tuple[int, int] | None:
    """Return the axes of the batch and of the tokens of a set of token sequences; None if the tensor has no such axes.

    Args:
        axes: what the axes of the tensor hold.
        tokens_set: the number of the set.
        sizes: the number of sequences, and of tokens in each.
    """
    wanted = [Factor(2 * tokens_set, sizes[0]), Factor(2 * tokens_set + 1, sizes[1])]
    merged, batch, tokens = (_axis_with(axes, factors) for factors in (wanted, wanted[:1], wanted[1:]))
    if merged is not None:
        return merged, merged
    if batch is not None and tokens is not None:
        return batch, tokens
    if tokens is not None and sizes[0] == 1 and any(wanted[0] in axis for axis in axes):
        return tokens, tokens  # the batch of one was squeezed away
    if batch is not None and sizes[1] == 1 and any(wanted[1] in axis for axis in axes):
        return batch, batch
    return None


def _axis_with(axes: Axes, factors: Sequence[Factor]) -> int | None:
    """Return the first axis that holds exactly these factors, in this order, apart from factors of size 1."""
    long = [factor for factor in factors if factor.size != 1]
    for place, axis in enumerate(axes):
        if all(factor in axis for factor in factors) and [factor for factor in axis if factor.size != 1] == long:
            return place
    return None


@lru_cache(4096)
def with_channel(axes: Axes, axis: int, size: int) -> Axes:
    """Return the axes with `axis`, of the given size, as the channel axis in place of any other."""
    cleared = without_channel(axes)
    return (*cleared[:axis], (Factor(CHANNEL, size),), *cleared[axis + 1 :])


def with_squeezed_channel(axes: Axes) -> Axes:
    """Return the axes of a tensor that is one channel, whose axis was squeezed away behind the last one."""
    cleared = without_channel(axes)
    return (*cleared[:-1], (*cleared[-1], Factor(CHANNEL, 1))) if cleared else cleared


def without_channel(axes: Axes) -> Axes:
    """Return the axes with the factors of the channel axis marked as unknown."""
    if not any(factor.label == CHANNEL for axis in axes for factor in axis):
        return axes
    return tuple([tuple([Factor(OTHER, f.size) if f.label == CHANNEL else f for f in axis]) for axis in axes])


def token_sets(factors: Iterable[Factor]) -> frozenset[int]:
    """Return the numbers of the sets of token sequences whose positions some factors hold."""
    return frozenset(factor.label >> 1 for factor in factors if factor.label > CHANNEL)


def moved(note: Note, where: Where, shape: Sequence[int], new_shape: Sequence[int]) -> Note:
    """Return the note about the output of an operator that moves the axes of an input.

    An axis of size 1 that is broadcast tells nothing about the axis of the output.

    Args:
        note: what is known about the input.
        where: where its axes go.
        shape: the shape of the input.
        new_shape: the shape of the output.
    """
    axes: list[Axis] = [()] * len(new_shape)
    lost = note.lost
    squeezed: list[tuple[int, Axis]] = []
    broadcast = False
    for place, new in enumerate(where):
        axis = note.axes[place]
        if new is None:
            if shape[place] == 1:
                squeezed.append((place, tuple([factor for factor in axis if factor.label != OTHER])))
            continue
        target = new if new >= 0 else ~new
        if new >= 0 and shape[place] == new_shape[target]:
            axes[target] = axes[target] or axis
        elif new >= 0 and shape[place] == 1:
            broadcast = True
        else:
            axes[target] = _resized(axis, new_shape[target])
            if new_shape[target] != 1:
                lost |= token_sets(axis)
    _attach(axes, squeezed, where)
    if broadcast or any(size != 1 and not axis for axis, size in zip(axes, new_shape, strict=True)):
        axes = [_without_squeezed_channel(axis) for axis in axes]
    return Note(tuple([axis or (Factor(OTHER, size),) for axis, size in zip(axes, new_shape, strict=True)]), lost)


def _attach(axes: list[Axis], squeezed: Sequence[tuple[int, Axis]], where: Where) -> None:
    """Attach what was on axes of size 1 that are removed to the axis before, or to the axis after if there is none."""
    for place, factors in squeezed:
        before = [new for new in where[:place] if new is not None and new >= 0 and axes[new]]
        after = [new for new in where[place:] if new is not None and new >= 0 and axes[new]]
        if factors and before:
            axes[before[-1]] += factors
        elif factors and after:
            axes[after[0]] = factors + axes[after[0]]


def _without_squeezed_channel(axis: Axis) -> Axis:
    """Return an axis without the channel of size 1 that was squeezed into it: broadcast values are not one neuron's alone."""
    if prod(factor.size for factor in axis) == 1:
        return axis
    return tuple([factor for factor in axis if factor[:2] != (CHANNEL, 1)])


def _resized(axis: Axis, size: int) -> Axis:
    """Return an axis after it was cut or extended to `size` entries. It still holds channels if it did."""
    leading = next((factor.label for factor in axis if factor.size != 1), None)
    if leading is None:
        leading = CHANNEL if any(factor.label == CHANNEL for factor in axis) else OTHER
    if leading == CHANNEL:
        return (Factor(CHANNEL, size),)
    return (Factor(OTHER, size), *[factor for factor in axis if factor[:2] == (CHANNEL, 1)])  # one squeezed channel stays one


def unsqueezed(note: Note, axis: int) -> Note:
    """Return the note after an axis of size 1 was inserted at `axis`. What was squeezed away there before gets it back."""
    axes = list(note.axes)
    new: Axis = (Factor(OTHER, 1),)
    before = axes[axis - 1] if axis else ()
    if len(before) > 1 and before[-1].size == 1 and before[-1].label != OTHER:
        axes[axis - 1], new = before[:-1], before[-1:]
    return Note((*axes[:axis], new, *axes[axis:]), note.lost)


def reshaped(note: Note, new_shape: Sequence[int]) -> Note:
    """Return the note after a reshape."""
    axes = _regrouped(note.axes, tuple(new_shape))
    if axes is None:
        sets = token_sets(factor for axis in note.axes for factor in axis)
        return Note(unlabelled(new_shape), note.lost | sets)
    return Note(axes, note.lost)


_EMPTY = 1_000_003  # stands for a size of 0; a prime, so that no axis is a part of it


@lru_cache(4096)
def _regrouped(axes: Axes, new_shape: tuple[int, ...]) -> Axes | None:
    """Return the axes after a reshape; None if an axis of the result mixes entries in a way that factors cannot describe."""
    factors = [Factor(f.label, f.size or _EMPTY, f.step) for axis in axes for f in axis]
    sizes = [size or _EMPTY for size in new_shape]
    if prod(factor.size for factor in factors) != prod(sizes):
        return None
    groups: list[list[Factor]] = [[] for _ in sizes]
    waiting = deque(_place_singles(factors, sizes, groups))
    for group, size in zip(groups, sizes, strict=True):
        while size > 1:
            factor = waiting.popleft()
            if factor.size > size and factor.size % size == 0:
                rest = factor.size // size
                waiting.appendleft(Factor(factor.label, rest, factor.step))
                factor = Factor(factor.label, size, factor.step * rest)
            if size % factor.size:
                return None
            group.append(factor)
            size //= factor.size
            while size == 1 and waiting and waiting[0].size == 1:
                group.append(waiting.popleft())
    return tuple([_united(group) for group in groups])


def _place_singles(factors: Sequence[Factor], sizes: Sequence[int], groups: Sequence[list[Factor]]) -> list[Factor]:
    """Give factors of size 1 to the new axes of size 1 that lie at the same place among the other axes.

    Args:
        factors: the factors of all axes.
        sizes: the new shape.
        groups: the factors of the new axes, to which those of size 1 are added.

    Returns:
        The factors that are left: all longer ones, and those of size 1 that have no axis of their own.
    """
    free: dict[int, list[list[Factor]]] = {}
    outer = 1
    for group, size in zip(groups, sizes, strict=True):
        outer *= size
        if size == 1:
            free.setdefault(outer, []).append(group)
    singles: dict[int, list[Factor]] = {}
    left = []
    outer = 1
    for factor in factors:
        outer *= factor.size
        if factor.size == 1 and outer in free:
            singles.setdefault(outer, []).append(factor)
        else:
            left.append(factor)
    for outer, found in singles.items():
        axes = free[outer]
        if len(found) > len(axes):
            found = [factor for factor in found if factor.label != OTHER]
        surplus = max(len(found) - len(axes), 0)
        axes[0].extend(found[: surplus + 1])
        for group, factor in zip(axes[1:], found[surplus + 1 :], strict=False):
            group.append(factor)
    return left


def _united(group: Sequence[Factor]) -> Axis:
    """Return an axis with these factors, where adjacent parts of the same are one. Sizes of 0 are restored."""
    axis: list[Factor] = []
    for label, size, step in group:
        size = 0 if size == _EMPTY else size
        last = axis[-1] if axis else None
        if last is not None and last.label == label != OTHER and 1 not in (last.size, size) and last.step == size * step:
            axis[-1] = Factor(label, last.size * size, step)
        else:
            axis.append(Factor(label, size, step))
    return tuple(axis) or (Factor(OTHER, 1),)


def overlaid(notes: Sequence[Note]) -> Note:
    """Combine what several inputs tell about the same output, of which each axis is described by the first that knows it."""
    if len(notes) == 1 or all(note == notes[0] for note in notes[1:]):
        return notes[0]
    axes = list(notes[0].axes)
    for note in notes[1:]:
        for place, axis in enumerate(note.axes):
            if not _is_known(axes[place]) and _is_known(axis):
                axes[place] = axis
    return Note(tuple(axes), frozenset().union(*(note.lost for note in notes)))


def joined_notes(notes: Sequence[Note]) -> Note:
    """Combine the notes about the inputs of an elementwise operator. The channels are those of the first that has any."""
    if len(notes) == 1 or all(note == notes[0] for note in notes[1:]):
        return notes[0]
    found = [channel_axis_of(note.axes) for note in notes]
    first = next((i for i, axis in enumerate(found) if axis is not None and axis >= 0), None)
    if first is None:
        first = next((i for i, axis in enumerate(found) if axis is not None), 0)
    others = [Note(without_channel(note.axes), note.lost) for i, note in enumerate(notes) if i != first]
    return overlaid([notes[first], *others])


def _is_known(axis: Axis) -> bool:
    """Return whether it is known what an axis holds."""
    return any(factor.label != OTHER for factor in axis)
