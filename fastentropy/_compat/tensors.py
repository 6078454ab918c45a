"""What a tensor is, and where its memory is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import _C, Tensor

from fastentropy._compat.lookup import attribute, named, unknown_release


def is_functorch_tensor(x: Tensor) -> bool:
    """Return whether `x` belongs to a transform of torch.func. Such a tensor has no single value that could be counted."""
    try:
        return _C._functorch.is_functorch_wrapped_tensor(x)  # not by `named`, since this runs in each call of an activation
    except AttributeError as error:
        raise unknown_release(f"torch._C._functorch.{error.name}") from error


def has_values(x: Tensor) -> bool:
    """Return whether `x` holds values that can be read, unlike a tensor on the meta device or a tensor of a tracer."""
    if x.is_meta or named("torch", "_is_functional_tensor")(x):
        return False
    if type(x) is Tensor:
        return True
    tracers = (named("torch._subclasses", "FakeTensor"), named("torch._subclasses.functional_tensor", "FunctionalTensor"))
    return not isinstance(x, tracers)


def add_to_each(tensors: Sequence[Tensor], values: Sequence[Tensor | int]) -> None:
    """Add `values[i]` to `tensors[i]` in place for all i, in one launch.

    One launch per tensor would take longer than the counting itself.
    """
    named("torch", "_foreach_add_")(list(tensors), list(values))


def storage_id(x: Tensor) -> int:
    """Return a number that is the same for all tensors in the storage of `x`.

    The address of the data would not do, because it is 0 for every tensor on the meta device.
    """
    try:
        number: int = x.untyped_storage()._cdata  # not by `attribute`, since this runs for each tensor that is followed
    except AttributeError as error:
        raise unknown_release(f"{type(x.untyped_storage()).__name__}._cdata") from error
    return number


def weak_storage(x: Tensor) -> Any:
    """Return a weak reference to the storage of `x`, with a method `expired`.

    As long as the reference exists, no other storage has the same `storage_id`. The memory itself can be freed and used again.
    """
    return named("torch.multiprocessing.reductions", "StorageWeakRef")(x.untyped_storage())


@functools.cache
def handles_operators(kind: type[Tensor]) -> bool:
    """Return whether a class of tensors handles operators itself, so that it may not have memory like a plain tensor."""
    handler = attribute(kind, "__torch_dispatch__")
    return handler is not named("torch._C", "_disabled_torch_dispatch_impl")
