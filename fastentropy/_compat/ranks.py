"""Tensors that are divided among ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from fastentropy._compat.lookup import attribute, named

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor


def _is_pending(x: Tensor) -> TypeGuard[AsyncCollectiveTensor]:
    """Return whether `x` is the result of a collective operation that may not have finished."""
    if type(x) is Tensor or not torch.distributed.is_available():
        return False
    return isinstance(x, named("torch.distributed._functional_collectives", "AsyncCollectiveTensor"))


def wait_tensor(x: Tensor) -> Tensor:
    """Return `x` when its values can be read. If `x` is the result of a collective operation, wait until it has finished."""
    return x.wait() if _is_pending(x) else x


def without_waiting(x: Tensor) -> Tensor:
    """Return the plain tensor that has the memory of `x`.

    If `x` is the result of a collective operation, this function does not wait until the operation has finished.
    """
    return x.elem if _is_pending(x) else x


def local_part(x: DTensor) -> Tensor:
    """Return the tensor that this rank holds of the DTensor `x`. No operator runs that a mode or autograd would see."""
    local: Tensor = attribute(x, "_local_tensor")
    return local


def local_shape_and_offset(x: DTensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of this rank's part of the DTensor `x`, and the index on each axis at which the part begins."""
    compute = named("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset")
    shape, offset = compute(x.shape, x.device_mesh, x.placements)
    return shape, offset
