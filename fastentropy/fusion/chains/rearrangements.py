"""Recognise selections that a model writes as views: channel shuffles, and pixel shuffles and unshuffles.

A reshape, a permutation and a second reshape compute them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fastentropy.fusion.chains.layouts import Layout, Part, natural_layout, permuted, reshaped, same_layout
from fastentropy.fusion.chains.nodes import Size, product, quotient
from fastentropy.fusion.chains.selections import Selection, pixel_shuffle, pixel_unshuffle, selected_channels

#: Pixel shuffles are recognised up to this size of a block.
_MOST_PIXELS = 8


class Rearrangement(NamedTuple):
    """A selection, and how its output lies in the value that the views compute.

    Attributes:
        build: returns the selection, given the device of the value.
        shape: the shape of its output.
        layout: where the axes of its output lie in the value.
    """

    build: Callable[[torch.device], Selection]
    shape: tuple[Size, ...]
    layout: Layout


def rearrangement(layout: Layout, shape: tuple[Size, ...], axes: int) -> Rearrangement | None:
    """Return the selection that makes a value of a given layout from its natural value.

    Args:
        layout: where the axes of the natural value lie in the value.
        shape: the shape of the natural value.
        axes: number of spatial axes of the natural value, which follow its channels.

    Returns:
        The selection, or None if there is none, or if it would change nothing.
    """
    permutation = _permuted_channels(layout, shape, axes)
    if permutation or axes != 2 or len(shape) != 4 or len(layout) != 4:
        return permutation
    candidates = [*_pixel_shuffles(shape), *_pixel_unshuffles(shape)]
    found = next((each for each in candidates if same_layout(each.layout, layout)), None)
    return found and found._replace(layout=natural_layout(found.shape))


def _permuted_channels(layout: Layout, shape: tuple[Size, ...], axes: int) -> Rearrangement | None:
    """Return the permutation of channels whose output lies in one axis of the value, or None if there is none."""
    at = len(shape) - axes - 1
    groups = [axis for axis, group in enumerate(layout) if any(part.axis == at for part in group)]
    channels = shape[at]
    if len(groups) != 1 or not isinstance(channels, int):
        return None
    parts = [(part.size, part.step) for part in layout[groups[0]] if part.axis == at]
    numbers = [(size, step) for size, step in parts if isinstance(size, int) and isinstance(step, int)]
    if not len(layout[groups[0]]) == len(parts) == len(numbers) > 1:
        return None
    index = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, step in numbers:
        index = (index[:, None] + step * torch.arange(size, device="cpu")).flatten()
    if index.sort().values.tolist() != list(range(channels)):
        return None

    def build(device: torch.device) -> Selection:
        return selected_channels(index.to(device), channels, axes, has_batch=len(shape) == axes + 2)

    whole = tuple((Part(at, channels),) if axis == groups[0] else group for axis, group in enumerate(layout))
    return Rearrangement(build, shape, whole)


def _pixel_shuffles(shape: tuple[Size, ...]) -> Iterator[Rearrangement]:
    """Yield the pixel shuffles of a value; the layout of each is that of views which compute it."""
    batch, channels, height, width = shape
    for factor in range(2, _MOST_PIXELS + 1):
        if isinstance(channels, int) and channels % factor**2 == 0:
            fewer = channels // factor**2
            after = (batch, fewer, product((height, factor)), product((width, factor)))
            layout = _viewed(shape, (batch, fewer, factor, factor, height, width), (0, 1, 4, 2, 5, 3), after)
            if layout is not None:
                yield Rearrangement(_shuffle(fewer, factor), after, layout)


def _pixel_unshuffles(shape: tuple[Size, ...]) -> Iterator[Rearrangement]:
    """Yield the pixel unshuffles of a value; the layout of each is that of views which compute it."""
    batch, channels, height, width = shape
    for factor in range(2, _MOST_PIXELS + 1):
        rows, columns = quotient(height, factor), quotient(width, factor)
        if isinstance(channels, int) and rows is not None and columns is not None:
            after = (batch, channels * factor**2, rows, columns)
            layout = _viewed(shape, (batch, channels, rows, factor, columns, factor), (0, 1, 3, 5, 2, 4), after)
            if layout is not None:
                yield Rearrangement(_unshuffle(channels, factor), after, layout)


def _viewed(shape: tuple[Size, ...], parts: tuple[Size, ...], order: tuple[int, ...], after: tuple[Size, ...]) -> Layout | None:
    """Return the layout of a natural value behind a reshape, a permutation and a reshape."""
    split = reshaped(natural_layout(shape), parts)
    return None if split is None else reshaped(permuted(split, order), after)


def _shuffle(channels: int, factor: int) -> Callable[[torch.device], Selection]:
    """Return a function that builds a pixel shuffle on a device."""
    return lambda device: pixel_shuffle(channels, factor, device)


def _unshuffle(channels: int, factor: int) -> Callable[[torch.device], Selection]:
    """Return a function that builds a pixel unshuffle on a device."""
    return lambda device: pixel_unshuffle(channels, factor, device)
