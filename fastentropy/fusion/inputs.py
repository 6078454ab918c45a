"""The inputs of a model as nested tuples, lists and dicts: their batch size, and other inputs made from them."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastentropy._compat import tree_leaves, tree_map

Inputs: TypeAlias = "tuple[Any, ...]"


def batch_size(inputs: Inputs) -> int | None:
    """Return the first size of the first tensor that has axes; None if there is none."""
    tensors = (value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.ndim)
    return next((tensor.shape[0] for tensor in tensors), None)


def has_batch(value: Any, batch: int | None) -> bool:
    """Return whether a value is a tensor whose first size is `batch`."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def with_batch_size(inputs: Inputs, size: int) -> Inputs:
    """Return the inputs with another batch size: the samples are repeated or cut off."""
    batch = batch_size(inputs)

    def resize(value: Any) -> Any:
        if not has_batch(value, batch):
            return value
        return value.repeat(-(-size // value.shape[0]), *(1,) * (value.ndim - 1))[:size].contiguous()

    return tuple(tree_map(resize, inputs))


def with_longer_axes(inputs: Inputs) -> Inputs:
    """Return the inputs with each axis after the batch longer by one: its first position is repeated at the end.

    Axes of size one stay, and so does axis 1 of tensors with three axes or more: no model takes another number of channels.
    """

    def extend(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for axis in range(2 if value.ndim > 2 else 1, value.ndim):
            if value.shape[axis] > 1:
                value = torch.cat([value, value.narrow(axis, 0, 1)], axis)
        return value

    return tuple(tree_map(extend, inputs))


def random_like(inputs: Inputs, seed: int) -> Inputs:
    """Return the inputs with standard normal values in every floating-point tensor."""
    generator = torch.Generator().manual_seed(seed)

    def randomize(value: Any) -> Any:
        if not is_float(value):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return tuple(tree_map(randomize, inputs))


def clone(inputs: Inputs) -> Inputs:
    """Return copies of the inputs, for a model that may overwrite them."""
    return tuple(tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs))


def to_double(inputs: Inputs) -> Inputs:
    """Return the inputs with every floating-point tensor in float64."""
    return tuple(tree_map(lambda value: value.double() if is_float(value) else value, inputs))


def is_float(value: Any) -> bool:
    """Return whether a value is a real floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
