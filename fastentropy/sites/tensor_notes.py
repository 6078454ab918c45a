"""Remember something about tensors, by the memory that they occupy, for as long as this memory exists."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastentropy._compat import handles_operators, is_functorch_tensor, storage_id, weak_storage
from fastentropy.sites.axes import CHANNEL, Axis, Factor, Note, moved, unlabelled
from fastentropy.sites.sharding import Sharding, is_dtensor, stored

#: Where a tensor lies in its storage: offset, shape and strides. Different Python objects can hold the same value.
Place = tuple[int, Sequence[int], Sequence[int]]

_MAX_VIEWS = 256  # how many views of a storage are remembered; a model may make a new one in every step


class Storage:
    """What is known about the tensors in one storage."""

    __slots__ = ("is_kept", "is_weight", "notes", "shapes", "shardings", "weak")

    def __init__(self, weak: Any) -> None:
        """Begin without notes about the storage to which `weak` is a weak reference."""
        self.weak = weak
        self.is_weight = self.is_kept = False
        self.notes: dict[Place, Note] = {}
        self.shapes: dict[Place, tuple[int, ...]] = {}  # of DTensors, whose notes are about the whole tensor
        self.shardings: dict[Place, Sharding] = {}


class TensorNotes:
    """Hold a note, a sharding and a mark for weights of tensors.

    A note stays valid only while the storage of its tensor exists. When the memory is freed and used again, the new tensor has
    no note. Tensors without a strided storage (sparse, nested, lazy), and those of classes that handle operators themselves
    (fake, functional, quantised), have no notes.
    """

    def __init__(self) -> None:
        """Begin without notes."""
        self.storages: dict[int, Storage] = {}
        self._limit = 1024

    def storage(self, x: Tensor) -> Storage | None:
        """Return what is known about the storage of `x`; None if nothing is."""
        number = storage_number(x)
        return None if number is None else self.storages.get(number)

    def note(self, x: Tensor) -> Note | None:
        """Return the note about `x`, or about the part of a noted tensor that `x` views; None if there is none."""
        storage = self.storage(x)
        return None if storage is None else note_in(storage, x)

    def sharding(self, x: Tensor) -> Sharding | None:
        """Return how the plain tensor `x` is divided among ranks."""
        storage = self.storage(x)
        return None if storage is None or not storage.shardings else storage.shardings.get(place_of(x))

    def is_weight(self, x: Tensor) -> bool:
        """Return whether `x` is a weight of the model, or computed from weights only.

        Every nn.Parameter counts as a weight, because FSDP replaces the parameters of the model.
        """
        if type(x) is not Tensor and isinstance(x, nn.Parameter):
            return True
        storage = self.storage(x)
        return storage is not None and storage.is_weight

    def set_note(self, x: Tensor, note: Note, is_written: bool = False) -> None:
        """Set the note about `x`.

        Args:
            x: the tensor.
            note: the note.
            is_written: whether an operator has written into `x`. Then the note also holds for what other tensors view of `x`.
        """
        storage = self._storage(x)
        if storage is None:
            return
        place = place_of(x)
        if is_written and storage.notes and storage.notes.get(place) != note:
            storage.notes.clear()
        if len(storage.notes) >= _MAX_VIEWS:
            del storage.notes[next(iter(storage.notes))]
        storage.notes[place] = note
        if type(x) is not Tensor and is_dtensor(x):
            storage.shapes[place] = tuple(x.shape)
        elif storage.shapes:
            storage.shapes.pop(place, None)

    def set_sharding(self, x: Tensor, sharding: Sharding | None) -> None:
        """Set how the plain tensor `x` is divided among ranks; None if it is not known to be divided."""
        storage = self.storage(x) if sharding is None else self._storage(x)
        if storage is not None and sharding is not None:
            storage.shardings[place_of(x)] = sharding
        elif storage is not None:
            storage.shardings.pop(place_of(x), None)

    def mark_weight(self, x: Tensor, is_weight: bool = True) -> None:
        """Mark the storage of `x` as one of weights, or as none."""
        storage = self._storage(x) if is_weight else self.storage(x)
        if storage is not None:
            storage.is_weight = is_weight

    def keep(self, tensors: Sequence[Tensor]) -> None:
        """Forget everything but weights, and the notes of these tensors and of those that were kept before."""
        for x in tensors:
            storage = self.storage(x)
            if storage is not None:
                note, place = note_in(storage, x), place_of(x)
                if not storage.is_kept:
                    storage.notes.clear()
                storage.is_kept = True
                if note is not None:
                    storage.notes[place] = note
        self._sweep(only_kept=True)

    def clear(self) -> None:
        """Forget the notes of all tensors."""
        for storage in self.storages.values():
            storage.notes.clear()
            storage.shardings.clear()

    def _storage(self, x: Tensor) -> Storage | None:
        """Return what is known about the storage of `x`, to which something is about to be added; None if `x` has none."""
        number = storage_number(x)
        if number is None:
            return None
        storage = self.storages.get(number)
        if storage is None:
            if len(self.storages) >= self._limit:
                self._sweep()
            storage = self.storages[number] = Storage(weak_storage(x if type(x) is Tensor else stored(x)))
        return storage

    def _sweep(self, only_kept: bool = False) -> None:
        """Forget the storages that exist no longer; if `only_kept`, those of other tensors than weights and kept ones, too."""
        self.storages = {
            number: storage
            for number, storage in self.storages.items()
            if not storage.weak.expired() and (not only_kept or storage.is_weight or storage.is_kept)
        }
        self._limit = 1024 + 2 * len(self.storages)


def place_of(x: Tensor) -> Place:
    """Return where a tensor lies in its storage. A DTensor has the place of its local tensor."""
    if type(x) is not Tensor:
        x = stored(x)
    return int(x.storage_offset()), x.shape, x.stride()


def has_notes(x: Tensor) -> bool:
    """Return whether something can be noted about a tensor."""
    return storage_number(x) is not None


def storage_number(x: Tensor) -> int | None:
    """Return the number of the storage of a tensor; None if it has no strided storage of its own."""
    kind = type(x)
    if kind is not Tensor and kind is not nn.Parameter:
        x = stored(x)
        if handles_operators(type(x)) or is_lazy(x):
            return None
    return storage_id(x) if x.layout is torch.strided and not x.is_nested and not is_functorch_tensor(x) else None


def note_in(storage: Storage, x: Tensor) -> Note | None:
    """Return the note about a tensor in a storage."""
    if not storage.notes:
        return None
    place = place_of(x)
    note = storage.notes.get(place)
    if note is None:
        known = next(reversed(storage.notes))
        return _note_of_view(storage.notes[known], known, place)
    shape = storage.shapes.get(place) if storage.shapes else None
    if shape is not None and shape != tuple(x.shape):  # of the DTensor; `x` is its local tensor
        return moved(note, range(len(shape)), shape, x.shape)
    return note


def _note_of_view(note: Note, known: Place, place: Place) -> Note:
    """Return the note about a tensor, from the note about another one in the same storage.

    An axis holds what the axis with the same stride holds there. Token positions are the same only if both tensors begin at the
    same entry.

    Args:
        note: the note about the other tensor.
        known: the place of the other tensor.
        place: the place of the tensor.
    """
    strides: list[tuple[int, Factor]] = []
    for axis, stride in zip(note.axes, known[2], strict=True):
        for factor in reversed(axis):
            if factor.size > 1 and stride > 0:
                strides.append((stride, factor))
                stride *= factor.size
    axes: list[Axis] = list(unlabelled(place[1]))
    seen = set()
    for new, (size, stride) in enumerate(zip(place[1], place[2], strict=True)):
        for begin, factor in strides:
            fits = factor.size == size and begin == stride
            if fits and factor.label > CHANNEL and known[0] == place[0]:
                axes[new] = (factor,)
                seen.add(factor)
            elif factor.label == CHANNEL and size > 1 and begin <= stride < begin * factor.size and stride % begin == 0:
                outer = min((other for other, _ in strides if other > begin), default=stride * size)
                is_whole = stride == begin and outer >= stride * size
                if fits or is_whole or stride > begin or size < factor.size:
                    axes[new] = (Factor(CHANNEL, size, factor.step * (stride // begin)),)
    tokens = {factor for axis in note.axes for factor in axis if factor.label > CHANNEL}
    return Note(tuple(axes), note.lost | {factor.label >> 1 for factor in tokens - seen})


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
