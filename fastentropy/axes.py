"""Which axis of a tensor holds the channels: followed from operator to operator while a model runs."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class AxisTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows, while active, which axis of every tensor holds the channels of the operator that produced it.

    A convolution or a batch norm makes axis 1. A matrix product makes the axis that its weight brings, else the last one, and
    a layer norm keeps the axis or makes the last one. Reshapes, permutations and reductions move it, and other operators keep
    it where they keep the number of axes.
    """

    # Operators that exist only above the level that is watched (flex attention) are let through.
    supports_higher_order_operators = True

    # ATen operators by name: some exist only in some releases of PyTorch.
    _FIRST = frozenset({
        "convolution", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
        "_batch_norm_with_update", "cudnn_batch_norm", "miopen_batch_norm", "native_group_norm",
    })  # fmt: skip
    _PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear"})
    _LAST_UNLESS_KNOWN = frozenset({"native_layer_norm", "_fused_rms_norm", "rms_norm"})
    _RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"})

    def __init__(self, weights: Iterable[Tensor] = ()) -> None:
        """Know the weights of the model, and nothing of its activations yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes: dict[tuple[Any, ...], int] = {}
        self._weights = {_storage(weight) for weight in weights}

    def axis_of(self, x: Tensor) -> int:
        """The channel axis of x; where its origin is unknown, axis 1 of images (4 axes and more), else the last."""
        return self._axes.get(_place(x), 1 if x.ndim >= 4 else x.ndim - 1)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and note the channel axis of its outputs."""
        if hasattr(func, "name") and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            # In inference mode operators arrive that elsewhere are broken down to those below before they come here.
            with self:
                return func._op_dk(_COMPOSITE, *args, **(kwargs or {}))
        inputs = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = [(x, self._axes[_place(x)]) for x in inputs if _place(x) in self._axes]
        from_weights = bool(inputs) and all(self._is_weight(x) for x in inputs)
        outputs = func(*args, **(kwargs or {}))
        for y in pytree.tree_leaves(outputs):
            if isinstance(y, Tensor):
                self._note(y, self._output_axis(func, args, kwargs or {}, y, known), from_weights)
        return outputs

    def _note(self, y: Tensor, axis: int | None, from_weights: bool) -> None:
        if axis is None:
            self._axes.pop(_place(y), None)
        else:
            self._axes[_place(y)] = axis
        if from_weights:
            self._weights.add(_storage(y))
        else:
            self._weights.discard(_storage(y))

    def _is_weight(self, x: Tensor) -> bool:
        return (storage := _storage(x)) is not None and storage in self._weights

    def _output_axis(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], y: Tensor, known: list[tuple[Tensor, int]]
    ) -> int | None:
        operator = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        if operator in self._FIRST:
            return 1 if y.ndim > 1 else None
        if operator in self._PRODUCTS:
            left, right = args[1:3] if operator in ("addmm", "baddbmm") else args[:2]
            weight_first = operator != "linear" and self._is_weight(left) and not self._is_weight(right)
            return y.ndim - 2 if weight_first else y.ndim - 1
        if not known:
            scaled = any(self._is_weight(x) and x.shape == y.shape[-1:] for x in args if isinstance(x, Tensor))
            return y.ndim - 1 if operator in self._LAST_UNLESS_KNOWN or (scaled and y.ndim > 1) else None
        x, axis = known[0]
        if operator == "permute":
            return next(place for place, dim in enumerate(args[1]) if dim % x.ndim == axis)
        if operator in ("transpose", "t"):
            first, second = (dim % x.ndim for dim in args[1:3]) if len(args) > 1 else (0, 1)
            return {first: second, second: first}.get(axis, axis)
        if operator in self._RESHAPES:
            return reshaped_axis(x.shape, axis, y.shape)
        dim = _argument(func, args, kwargs, "dim")
        if operator == "stack":
            return axis + int(dim % y.ndim <= axis)
        if y.ndim < x.ndim and dim is not None:
            return _reduced_axis(x.ndim, axis, dim)
        return next((axis for x, axis in known if x.ndim == y.ndim), None)


def reshaped_axis(shape: Sequence[int], axis: int, new_shape: Sequence[int]) -> int | None:
    """The axis of new_shape that holds the entries of an axis of shape.

    Where the axis is split, as into the heads of an attention, it is the last of its parts. Where it is merged with axes after
    it, as by flatten, it is what it was merged to. None where it is mixed with axes before it.
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


def _argument(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """What an operator was called with under a name of its schema, or the default; None where it has none."""
    for place, argument in enumerate(func._schema.arguments if hasattr(func, "_schema") else ()):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def _reduced_axis(ndim: int, axis: int, dims: int | Sequence[int]) -> int | None:
    """Where an axis goes when others are taken away; None where it is taken away itself."""
    gone = {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    return None if axis in gone or not gone else axis - sum(dim < axis for dim in gone)


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory: views of one place are one value, whatever Python object holds them.

    Tensors without a place (sparse, nested, not yet initialised) have none in common with any other.
    """
    storage = _storage(x)
    return (id(x),) if storage is None else (storage, x.storage_offset(), *x.shape, *x.stride())


def _storage(x: Tensor) -> int | None:
    if x.layout != torch.strided or is_lazy(x):
        return None
    return int(x.untyped_storage()._cdata)
