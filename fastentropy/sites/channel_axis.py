"""Follow, from operator to operator, the channel axis of each tensor and the part of the tensor that this rank holds."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastentropy._compat import TorchDispatchMode, composite_kernel, operator_schema, storage_id, tree_leaves
from fastentropy.sites.padding import BY_SHAPE, TokenAxes
from fastentropy.sites.sharding import Sharding, is_dtensor, joined, shown_local_tensors, stored

Note = TypeVar("Note")

#: The channel axis of a tensor whose channel axis had size 1 and was squeezed away.
NO_AXIS = -1


# TorchDispatchMode and its constructor have no annotations.
class AxisTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follow, while active, the channel axis of every tensor: the axis with the channels of the operator that produced it.

    - After a convolution, a batch norm or a group norm the channel axis is axis 1.
    - After a product of a weight and another matrix it is the axis that comes from the weight. After any other matrix product
      it is the last axis.
    - A layer norm keeps a known channel axis; otherwise the last axis becomes the channel axis. The same holds for an operator
      with a weight of the size of the last axis.
    - Reshapes, permutations and reductions move the channel axis.
    - Any other operator keeps it if the output has as many axes as the input.

    A DTensor knows how it is divided among the ranks of torch.distributed. If a plain tensor was taken out of a DTensor, the
    tracker follows how it is divided, in the same way as the channel axis.

    Attributes:
        meshes: the device meshes of the DTensors that took part in the pass. DTensors that only operators on weights read are
            left out.
    """

    # Higher-order operators, such as flex attention, arrive in `__torch_dispatch__` too. Without this they would raise.
    supports_higher_order_operators = True

    # ATen operators, by name because some exist only in some releases of PyTorch.
    _FIRST = frozenset({
        "convolution", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm", "native_group_norm",
    })  # fmt: skip
    _PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear"})
    _LAST_UNLESS_KNOWN = frozenset({"native_layer_norm", "_fused_rms_norm", "rms_norm"})
    _RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"})
    # After these operators all ranks hold the same values.
    _COLLECTIVES = frozenset({"all_reduce", "all_reduce_", "allreduce_", "all_gather_into_tensor", "_allgather_base_"})

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """Begin with `weights`, the parameters of the model. Nothing is known of other tensors yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.meshes: set[Any] = set()
        self._axes: dict[tuple[Any, ...], int] = {}
        self._shardings: dict[tuple[Any, ...], Sharding] = {}
        self._weights = {_storage(weight) for weight in weights}

    def axis_of(self, x: Tensor) -> int | None:
        """Return the channel axis of `x`: NO_AXIS if it was squeezed away, None if nothing tells where it lies."""
        return self._axes.get(_place(x))

    def follow_tokens(self, tokens: Tensor) -> None:
        """Begin to follow the positions of `tokens`: ids [batch, tokens] or embeddings [batch, tokens, features]."""

    def token_axes(self, x: Tensor) -> TokenAxes | None:
        """Return where the positions of the followed tokens lie in `x`.

        Returns:
            The axes. None if the values of `x` do not belong to token positions, BY_SHAPE if it is not known.
        """
        return BY_SHAPE

    def keep(self, outputs: object) -> None:
        """Forget all notes but those of the tensors in the nested `outputs`, which may be inputs of what is followed next."""
        kept = [(_place(y), self._axes.get(_place(y))) for y in tree_leaves(outputs) if isinstance(y, Tensor)]
        self._axes = {place: axis for place, axis in kept if axis is not None}

    def sharding_of(self, x: Tensor) -> Sharding | None:
        """Return how the plain tensor `x`, which comes from a DTensor, is divided among ranks; None if it comes from none."""
        return self._shardings.get(_place(x))

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the operators, and the tensors that are taken out of DTensors, inside the block."""
        with shown_local_tensors(self._take_out), self:
            yield

    def _take_out(self, x: Any, local: Tensor) -> None:
        """Note how `local` is divided among ranks: it is the plain tensor that was taken out of the DTensor `x`."""
        sharding = self._shardings[_place(local)] = Sharding.of(x)
        if sharding.is_divided or not self._is_weight(x):
            self.meshes.add(sharding.mesh)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note the channel axis and the sharding of its outputs."""
        if composed := composite_kernel(func):
            # In inference mode, an operator that PyTorch composes of others arrives here whole. Otherwise only its parts do.
            with self:
                return composed(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = [(x, self._axes[_place(x)]) for x in inputs if _place(x) in self._axes]
        divided = [(x, sharding) for x in inputs if not is_dtensor(x) and (sharding := self._shardings.get(_place(x)))]
        from_weights = bool(inputs) and all(self._is_weight(x) for x in inputs)
        if not from_weights:  # weights alone tell nothing: FSDP divides them among data-parallel ranks
            self.meshes.update(x.device_mesh for x in inputs if is_dtensor(x))
        outputs = func(*args, **(kwargs or {}))
        for y in tree_leaves(outputs):
            if isinstance(y, Tensor):
                call = _Operator(func, args, kwargs or {}, y)
                _note(self._axes, y, self._output_axis(call, known))
                _note(self._shardings, y, None if is_dtensor(y) else self._output_sharding(call, divided))
                (self._weights.add if from_weights else self._weights.discard)(_storage(y))
        return outputs

    def _is_weight(self, x: Tensor) -> bool:
        """Return whether `x` is a weight of the model, or computed from weights only.

        Every nn.Parameter counts as a weight, because FSDP replaces the parameters of the model.
        """
        storage = _storage(x)
        return storage is not None and (storage in self._weights or isinstance(x, nn.Parameter))

    def _output_axis(self, call: "_Operator", known: list[tuple[Tensor, int]]) -> int | None:
        """Return the channel axis of an operator's output, or None if it is unknown.

        Args:
            call: the operator with this output.
            known: the inputs whose channel axis is known, each with its channel axis.
        """
        operator, y = call.name, call.y
        if operator in self._FIRST:
            return 1 if y.ndim > 1 else None
        if operator in self._PRODUCTS:
            left, right = call.factors
            weight_first = operator != "linear" and self._is_weight(left) and not self._is_weight(right)
            return y.ndim - 2 if weight_first else y.ndim - 1
        if not known:
            scaled = any(self._is_weight(x) and x.shape == y.shape[-1:] for x in call.args if isinstance(x, Tensor))
            return y.ndim - 1 if operator in self._LAST_UNLESS_KNOWN or (scaled and y.ndim > 1) else None
        x, axis = known[0]
        if operator in self._RESHAPES:
            return reshaped_axis(x.shape, axis, y.shape)
        if call.moves(x):
            return call.moved_axis(x, axis)
        return next((axis for x, axis in known if x.ndim == y.ndim), None)

    def _output_sharding(self, call: "_Operator", divided: list[tuple[Tensor, Sharding]]) -> Sharding | None:
        """Return how an operator's output is divided among ranks; None if no input is a tensor that comes from a DTensor.

        Args:
            call: the operator with this output.
            divided: the plain inputs that come from DTensors, each with its sharding.
        """
        operator, y = call.name, call.y
        if not divided:
            return None
        if operator in self._COLLECTIVES:
            return divided[0][1].reduced()
        if operator in self._PRODUCTS or operator == "convolution":
            places = [(factor, places) for factor, places in zip(call.factors, call.kept_axes(), strict=True)]
            return joined(
                sharding.moved(kept.get, y.shape) for factor, kept in places for x, sharding in divided if x is factor
            )
        if operator in self._RESHAPES:
            x, sharding = divided[0]
            return sharding.reshaped(x.shape, y.shape)
        return joined(
            sharding.moved(partial(call.moved_axis, x), y.shape) for x, sharding in divided if call.moves(x) or x.ndim == y.ndim
        )


class _Operator(NamedTuple):
    """One call of an operator, together with one of its outputs, `y`."""

    func: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    y: Tensor

    @property
    def name(self) -> str:
        """Return the name of the operator without its overload, such as "addmm"."""
        return getattr(getattr(self.func, "overloadpacket", self.func), "__name__", "")

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two tensors that a matrix product or a convolution multiplies."""
        left, right = self.args[1:3] if self.name in ("addmm", "baddbmm") else self.args[:2]
        return left, right

    def kept_axes(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return, for each factor of a matrix product or a convolution, where its axes lie in the output.

        Each dict maps an axis of the factor to an axis of the output. Axes that the operator sums over are not in the dict.
        """
        left, right = self.factors
        if self.name == "convolution":
            return {0: 0}, {0: 1}
        columns = 0 if self.name == "linear" else right.ndim - 1
        batches = {axis: axis for axis in range(right.ndim - 2)}
        return {axis: axis for axis in range(left.ndim - 1)}, {**batches, columns: self.y.ndim - 1}

    def moves(self, x: Tensor) -> bool:
        """Return whether the operator moves or removes axes of its input `x`, as `permute` and `sum` do.

        Reshapes do not count here; `reshaped_axis` handles them.
        """
        reduces = self.y.ndim < x.ndim and self.argument("dim") is not None
        return reduces or self.name in ("permute", "transpose", "t", "stack")

    def moved_axis(self, x: Tensor, axis: int) -> int | None:
        """Return the axis of the output that corresponds to an axis of the input `x`; None if the operator removes the axis."""
        if self.name == "permute":
            return next(place for place, dim in enumerate(self.args[1]) if dim % x.ndim == axis)
        if self.name in ("transpose", "t"):
            first, second = (dim % x.ndim for dim in self.args[1:3]) if len(self.args) > 1 else (0, 1)
            return {first: second, second: first}.get(axis, axis)
        if self.name == "stack":
            return axis + int(self.argument("dim") % self.y.ndim <= axis)
        return _reduced_axis(x.ndim, axis, self.argument("dim")) if self.moves(x) else axis

    def argument(self, name: str) -> Any:
        """Return the argument with the given name in the operator's schema; None if there is no such argument.

        If the call does not give the argument, its default is returned.
        """
        schema = operator_schema(self.func)
        for place, argument in enumerate(schema.arguments if schema else ()):
            if argument.name == name:
                return self.args[place] if place < len(self.args) else self.kwargs.get(name, argument.default_value)
        return None


def reshaped_axis(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """Return the axis of `new_shape` that holds the entries of an axis of `shape` after a reshape.

    If the axis is split, as into the heads of an attention, this is the last of its parts. If the axis is merged with axes
    after it, as by flatten, this is the merged axis. If the axis is mixed with axes before it, the result is None.
    """
    size, outer = shape[axis], prod(shape[:axis])
    parts = [new for new in range(len(new_shape)) if prod(new_shape[:new]) >= outer and prod(new_shape[:new]) < outer * size]
    parts = [new for new in parts if new_shape[new] > 1]
    if size == 1 or not parts:
        same = [new for new, new_size in enumerate(new_shape) if new_size == size and prod(new_shape[:new]) == outer]
        return same[0] if same else None
    first, last = parts[0], parts[-1]
    if prod(new_shape[:first]) != outer:
        return None
    return last if prod(new_shape[: last + 1]) % (outer * size) == 0 else None


def _note(notes: dict[tuple[Any, ...], Note], y: Tensor, note: Note | None) -> None:
    """Note something about the tensor `y`, such as its channel axis, or delete the note if `note` is None.

    The note replaces that of any earlier tensor in the same memory.
    """
    if note is None:
        notes.pop(_place(y), None)
    else:
        notes[_place(y)] = note


def _reduced_axis(ndim: int, axis: int, dims: int | Sequence[int]) -> int | None:
    """Return the index of an axis after the axes `dims` are removed; None if the axis itself is removed.

    If `dims` is empty, all axes are removed.
    """
    gone = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return None if axis in gone or not gone else axis - sum(dim < axis for dim in gone)


def _place(x: Tensor) -> tuple[Any, ...]:
    """Return a key for the memory that a tensor occupies.

    Tensors with the same memory, shape and strides have the same key, because different Python objects can hold the same value.
    A DTensor has the key of its local tensor. A tensor without a strided storage (sparse, nested, not yet initialised) has a
    key of its own.
    """
    x = stored(x)
    storage = _storage(x)
    return (id(x),) if storage is None else (storage, x.storage_offset(), *x.shape, *x.stride())


def _storage(x: Tensor) -> int | None:
    """Return a number that identifies the storage of a tensor; None if the tensor has no strided storage."""
    x = stored(x)
    if x.layout != torch.strided or is_lazy(x):
        return None
    return storage_id(x)
