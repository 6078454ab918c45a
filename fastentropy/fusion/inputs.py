"""Handle the inputs of a model: find their batch size, and make inputs of other sizes and values from them."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastentropy._compat import tree_leaves, tree_map

#: The positional inputs of one call. Each is a tensor, another value, or a nested tuple, list or dict of these.
Inputs: TypeAlias = "tuple[Any, ...]"


def batch_size(inputs: Inputs) -> int | None:
    """Return the batch size: the size of axis 0 of the first tensor that has axes, or None if there is no such tensor."""
    tensors = (value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.ndim)
    return next((tensor.shape[0] for tensor in tensors), None)


def has_batch(value: Any, batch: int | None) -> bool:
    """Return whether a value is a tensor whose axis 0 has the size `batch`."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def with_batch_size(inputs: Inputs, size: int) -> Inputs:
    """Return the inputs with another batch size, by repeating samples or leaving out the last ones.

    Tensors whose axis 0 does not have the present batch size stay as they are.
    """
    batch = batch_size(inputs)

    def resize(value: Any) -> Any:
        if not has_batch(value, batch):
            return value
        return value.repeat(-(-size // value.shape[0]), *(1,) * (value.ndim - 1))[:size].contiguous()

    return tuple(tree_map(resize, inputs))


def with_longer_axes(inputs: Inputs) -> Inputs:
    """Return the inputs with every axis after the batch axis longer by one: its first position is repeated at the end.

    Axes of size one keep their size. Axis 1 of tensors with three or more axes keeps its size too, because it may hold the
    channels, and no model takes another number of channels.
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
    """Return the inputs with every floating-point tensor replaced by standard normal values drawn with a seed."""
    generator = torch.Generator().manual_seed(seed)

    def randomize(value: Any) -> Any:
        if not is_float(value):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return tuple(tree_map(randomize, inputs))


def clone(inputs: Inputs) -> Inputs:
    """Return a copy of the inputs, because a model may overwrite its inputs."""
    return tuple(tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs))


def to_double(inputs: Inputs) -> Inputs:
    """Return the inputs with every floating-point tensor converted to float64."""
    return tuple(tree_map(lambda value: value.double() if is_float(value) else value, inputs))


def is_float(value: Any) -> bool:
    """Return whether a value is a real floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()
