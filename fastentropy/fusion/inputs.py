"""The inputs of a model as nested tuples, lists and dicts: their batch, and others like them."""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastentropy._compat import tree_leaves, tree_map

Inputs: TypeAlias = "tuple[Any, ...]"


def batch_size(inputs: Inputs) -> int | None:
    """The first size of the first tensor."""
    tensors = (value for value in tree_leaves(inputs) if isinstance(value, Tensor) and value.ndim)
    return next((tensor.shape[0] for tensor in tensors), None)


def has_batch(value: Any, batch: int | None) -> bool:
    """Whether a value is a tensor with that batch."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def with_batch_size(inputs: Inputs, size: int) -> Inputs:
    """The inputs with their batch repeated, and cut to another size."""
    batch = batch_size(inputs)

    def resize(value: Any) -> Any:
        if not has_batch(value, batch):
            return value
        return value.repeat(-(-size // value.shape[0]), *(1,) * (value.ndim - 1))[:size].contiguous()

    return tuple(tree_map(resize, inputs))


def with_longer_axes(inputs: Inputs) -> Inputs:
    """The inputs with each axis behind the batch longer by one, if it has more than one position: the first comes again.

    An axis of an image's channels is left as it is: nothing takes another number of them.
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
    """The inputs with normal random values in place of every floating tensor."""
    generator = torch.Generator().manual_seed(seed)

    def randomize(value: Any) -> Any:
        if not is_float(value):
            return value
        return torch.randn(value.shape, generator=generator).to(value)

    return tuple(tree_map(randomize, inputs))


def clone(inputs: Inputs) -> Inputs:
    """Inputs of their own for a model that may write over them."""
    return tuple(tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs))


def to_double(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""
    return tuple(tree_map(lambda value: value.double() if is_float(value) else value, inputs))


def is_float(value: Any) -> bool:
    """Whether a value is a tensor of real floating numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()
