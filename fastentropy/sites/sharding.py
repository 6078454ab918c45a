"""Find out which part of a tensor this rank of torch.distributed holds.

A DTensor knows how it is divided among ranks. For plain tensors that come from DTensors, the division is followed from operator
to operator.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

from torch import Tensor

from fastentropy._compat import local_part, local_shape_and_offset, without_waiting

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

T = TypeVar("T", Tensor, Tensor | None)
#: A function that is called with a DTensor and the plain tensor that was taken out of it.
Show = Callable[["DTensor", Tensor], None]
#: An entry of `Sharding.axes`: the ranks hold different values, but it is not known how these make up the whole tensor.
UNKNOWN = -1
_NOT_FOLLOWED = "its division among ranks could not be followed; make its input a DTensor, as with use_local_output=False"


class RankShare(NamedTuple):
    """Where this rank's counts of a site (call of an activation) belong in the counts of all ranks."""

    start: int  # index of this rank's first neuron among the neurons of all ranks
    neurons: int  # the number of neurons of all ranks
    is_counted: bool = True  # False if another rank counts the same values
    is_first: bool = True  # False if another rank counts the first neurons of the same batches
    has_whole_batches: bool = True  # False if other ranks count other tokens of the same batches
    trouble: str = ""  # the reason if these counts cannot be added to those of other ranks


class AxisShard(NamedTuple):
    """The part of a divided axis that a rank holds: `size` entries, beginning at index `start`, of `total`."""

    start: int
    size: int
    total: int

    def resized(self, size: int) -> AxisShard | None:
        """Return the part after a reshape that splits each entry of the axis into several, or joins several into one.

        Args:
            size: the number of entries on this rank after the reshape.

        Returns:
            The part of the new axis, or None if the reshape neither splits nor joins the entries evenly.
        """
        if self.size == size:
            return self
        if not self.size or not size:
            return None
        if size % self.size == 0:
            factor = size // self.size
            return AxisShard(self.start * factor, size, self.total * factor)
        if self.size % size == 0:
            factor = self.size // size
            if self.start % factor == self.total % factor == 0:
                return AxisShard(self.start // factor, size, self.total // factor)
        return None


@dataclass(frozen=True)
class Sharding:
    """Where the tensor on this rank lies in the whole tensor, which is divided among the ranks of a device mesh.

    Attributes:
        mesh: the device mesh.
        axes: for each axis of the mesh, the axis of the tensor that is divided along it. None if the ranks along it hold the
            same values; UNKNOWN if they hold different values in an unknown way.
        shards: this rank's part of each divided axis, by axis of the tensor. Axes of which the part is not known are left out.
    """

    mesh: DeviceMesh
    axes: tuple[int | None, ...]
    shards: Mapping[int, AxisShard]

    @classmethod
    def of(cls, x: DTensor) -> Sharding:
        """Return the sharding of the DTensor `x`."""
        sizes, starts = local_shape_and_offset(x)
        axes = tuple(_divided_axis(placement, x.ndim) for placement in x.placements)
        if tuple(sizes) != tuple(local_part(x).shape):  # from_local() was not given the shape of the whole
            axes = tuple(axis if axis is None else UNKNOWN for axis in axes)
        divided = list(filter(_is_divided, axes))
        return cls(x.device_mesh, axes, {axis: AxisShard(starts[axis], sizes[axis], x.shape[axis]) for axis in divided})

    @property
    def is_divided(self) -> bool:
        """Return whether the ranks hold different values."""
        return any(axis is not None for axis in self.axes)

    def moved(self, where: Callable[[int], int | None], shape: Sequence[int]) -> Sharding:
        """Return the sharding of an operator's output, for an input with this sharding.

        Args:
            where: a function that returns the axis of the output to which an axis of the input goes, or None if it is removed.
            shape: the shape of the output on this rank. If a divided axis has another size there, its division becomes UNKNOWN.
        """
        moved: dict[int, tuple[int, AxisShard | None]] = {}
        for axis in filter(_is_divided, self.axes):
            new, part = where(axis), self.shards.get(axis)
            if new is not None and (part is None or part.size == shape[new]):
                moved[axis] = new, part
        return self._with(moved)

    def reshaped(self, shape: Sequence[int], new_shape: Sequence[int]) -> Sharding:
        """Return the sharding after a reshape of this rank's tensor from `shape` to `new_shape`.

        If a divided axis is mixed with axes before it, this rank's part of the resulting axis is not known.
        """
        moved: dict[int, tuple[int, AxisShard | None]] = {}
        for axis in filter(_is_divided, self.axes):
            new, part = first_reshaped_axis(shape, axis, new_shape), self.shards.get(axis)
            if new is not None:
                begins = part is not None and prod(new_shape[:new]) == prod(shape[:axis])
                moved[axis] = new, part.resized(new_shape[new]) if part is not None and begins else None
        return self._with(moved)

    def _with(self, moved: Mapping[int, tuple[int, AxisShard | None]]) -> Sharding:
        """Return the sharding after the divided axes have moved.

        Args:
            moved: for each axis of the old tensor, the axis of the new tensor and this rank's part of it (None if it is not
                known). The division of an axis that is not in `moved` becomes UNKNOWN.
        """
        axes = tuple(moved.get(axis, (UNKNOWN, None))[0] if _is_divided(axis) else axis for axis in self.axes)
        return Sharding(self.mesh, axes, {axis: part for axis, part in moved.values() if part is not None})

    def reduced(self) -> Sharding:
        """Return the sharding after the ranks have added up or gathered the tensor, so that all hold the same values.

        On a mesh with several axes, it is not known along which of them this happened.
        """
        return Sharding(self.mesh, (None if len(self.axes) == 1 else UNKNOWN,) * len(self.axes), {})

    def divides(self, other_than: int) -> bool:
        """Return whether any axis of the tensor except `other_than` is divided among ranks."""
        return any(axis not in (None, other_than) for axis in self.axes)

    def share(self, channel_axis: int, neurons: int) -> RankShare:
        """Return where this rank's counts of a site belong, if the site's input has this sharding.

        Args:
            channel_axis: the axis of the neurons in the input.
            neurons: the number of neurons on this rank.
        """
        part = self.shards.get(channel_axis, AxisShard(0, neurons, neurons))
        is_known = channel_axis not in self.axes or (channel_axis in self.shards and part.size == neurons)
        if UNKNOWN in self.axes or not is_known:
            return RankShare(0, neurons, trouble=_NOT_FOLLOWED)
        at = [(axis, self.mesh.get_local_rank(mesh_axis)) for mesh_axis, axis in enumerate(self.axes)]
        return RankShare(
            part.start,
            part.total,
            is_counted=not any(coordinate for axis, coordinate in at if axis is None),
            is_first=not any(coordinate for axis, coordinate in at if axis == channel_axis),
            has_whole_batches=not self.divides(channel_axis),
        )

    def tokens(self, is_token: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Return the part of a padding mask that belongs to this rank's input of a site.

        Args:
            is_token: bool [batch, tokens]. If it has the size of the input already, it is returned whole.
            shape: the shape of the input on this rank, [batch, tokens, neurons] or [batch * tokens, neurons].

        Returns:
            bool, with the shape of the input without its last axis; None if the part is not known.
        """
        positions = is_token if len(shape) == 3 else is_token.flatten()
        for mesh_axis, axis in enumerate(self.axes):
            if not _is_divided(axis) or axis not in self.shards or axis >= positions.ndim:
                continue
            if positions.shape[axis] != shape[axis]:
                chunks = positions.chunk(self.mesh.size(mesh_axis), axis)  # in the same way as a DTensor
                coordinate = self.mesh.get_local_rank(mesh_axis)
                positions = chunks[coordinate] if coordinate < len(chunks) else positions.narrow(axis, 0, 0)
        return positions if positions.shape == tuple(shape[:-1]) else None


def first_reshaped_axis(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """Return the first axis of `new_shape` over which an axis of `shape` extends after a reshape, or None if there is none.

    The entries of the axis are furthest apart in memory along this new axis. It may also hold entries of axes before it.
    """
    outer = prod(shape[:axis])
    same = (new for new, size in enumerate(new_shape) if size == shape[axis] and prod(new_shape[:new]) == outer)
    return next(same, next((new for new in range(len(new_shape)) if prod(new_shape[: new + 1]) > outer), None))


def joined(shardings: Iterable[Sharding]) -> Sharding | None:
    """Combine the shardings that the inputs of an operator give to its output. Return None if there are none.

    An axis of the mesh along which any of them is UNKNOWN becomes UNKNOWN. Shardings on another mesh than the first are
    ignored.
    """
    known = list(shardings)
    if len(known) < 2:
        return known[0] if known else None
    mesh, axes, shards = known[0].mesh, known[0].axes, dict[int, AxisShard]()
    for other in known:
        if other.mesh == mesh:
            pairs = zip(axes, other.axes, strict=True)
            axes = tuple(UNKNOWN if UNKNOWN in pair else pair[1] if pair[0] is None else pair[0] for pair in pairs)
            shards = {**other.shards, **shards}
    return Sharding(mesh, axes, {axis: part for axis, part in shards.items() if axis in axes})


def is_dtensor(x: object) -> TypeGuard[DTensor]:
    """Return whether `x` is a DTensor.

    The module of DTensor is slow to import, so it is not imported here. Until somebody has imported it, there are no DTensors.
    """
    return type(x) is not Tensor and (kind := _dtensor()) is not None and isinstance(x, kind)


def local_tensor(x: T) -> T:
    """Return this rank's part of `x` if it is a DTensor; otherwise `x` itself. No operator runs that a mode would see."""
    return local_part(x) if is_dtensor(x) else x


def stored(x: Tensor) -> Tensor:
    """Return the plain tensor that has the memory of `x`.

    `x` may be a DTensor, or the pending result of a collective. This function does not wait for the result.
    """
    return without_waiting(local_tensor(x))


@contextlib.contextmanager
def shown_local_tensors(show: Show) -> Iterator[None]:
    """Call `show` inside the block for every tensor that `DTensor.to_local` returns in this thread.

    `to_local` is not an operator, so a TorchDispatchMode does not see it.
    """
    if _dtensor() is None:
        yield
        return
    _TO_LOCAL.enter(show)
    try:
        yield
    finally:
        _TO_LOCAL.leave(show)


class _ToLocal:
    """Replace `DTensor.to_local`, while any thread is inside, by a function that also shows its result.

    The result is shown to the `show` functions with which the calling thread has entered.
    """

    def __init__(self) -> None:
        """Begin with no thread that has entered."""
        self._lock = threading.Lock()
        self._inside: list[tuple[int, Show]] = []
        self._original: Any = None

    def enter(self, show: Show) -> None:
        """Show the results of `DTensor.to_local` in this thread to `show` from now on."""
        with self._lock:
            if not self._inside:
                self._replace()
            self._inside.append((threading.get_ident(), show))

    def leave(self, show: Show) -> None:
        """Stop showing results to `show`. If no thread is left inside, restore `DTensor.to_local`."""
        with self._lock:
            self._inside.remove((threading.get_ident(), show))
            if not self._inside:
                _dtensor().to_local = self._original

    def _replace(self) -> None:
        """Replace `DTensor.to_local` by a function that shows its result."""
        original = self._original = _dtensor().to_local

        @functools.wraps(original)
        def to_local(x: DTensor, **kwargs: Any) -> Tensor:
            """Return the local tensor of `x`, and show both to the functions that this thread has entered with."""
            local: Tensor = original(x, **kwargs)
            for thread, show in list(self._inside):
                if thread == threading.get_ident():
                    show(x, local)
            return local

        _dtensor().to_local = to_local


_TO_LOCAL = _ToLocal()


def _dtensor() -> Any:
    """Return the class DTensor, or None if nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def _divided_axis(placement: Placement, ndim: int) -> int | None:
    """Return the axis of a tensor with `ndim` axes that a placement divides.

    It is None if the ranks hold the same values, and UNKNOWN for any placement other than a plain Shard.
    """
    from torch.distributed.tensor import Shard

    if placement.is_replicate():
        return None
    return placement.dim % ndim if type(placement) is Shard else UNKNOWN


def _is_divided(axis: int | None) -> TypeGuard[int]:
    """Return whether an entry of `Sharding.axes` is a known axis."""
    return axis is not None and axis != UNKNOWN
