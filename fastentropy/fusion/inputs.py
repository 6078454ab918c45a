"""Handle the inputs of a model: find their batch size, and make inputs of other sizes and values from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastentropy._compat import tree_leaves, tree_map


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of one call. Each is a tensor, another value, or a nested tuple, list or dict of these.

    Attributes:
        args: the positional inputs.
        kwargs: the keyword inputs.
        batch_leaf: the index, in flat order, of a tensor whose axis 0 is the batch; None for the first tensor that has axes.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    batch_leaf: int | None = None

    @classmethod
    def of(cls, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Inputs:
        """Return the inputs of a call from a tuple of positional inputs or a mapping of keyword inputs."""
        return cls(kwargs=dict(inputs)) if isinstance(inputs, Mapping) else cls(args=inputs)

    @property
    def leaves(self) -> list[Any]:
        """Return the tensors and other values in flat order: first those of the positional inputs."""
        return tree_leaves((self.args, self.kwargs))

    @property
    def batch(self) -> int | None:
        """Return the batch size, or None if no input is a tensor that has axes."""
        if self.batch_leaf is not None:
            return int(self.leaves[self.batch_leaf].shape[0])
        return next(iter(_sizes(self.leaves).values()), None)

    def map(self, change: Callable[[Any], Any]) -> Inputs:
        """Return the inputs with every tensor and every other value replaced by the result of `change` for it."""
        args, kwargs = tree_map(change, (self.args, self.kwargs))
        return dataclasses.replace(self, args=args, kwargs=kwargs)

    def with_batch_of(self, outputs: Any) -> Inputs:
        """Return the inputs with the batch that the outputs of the model have too.

        An input that comes before the batch, such as a table, may have another size along its axis 0.
        """
        sizes = _sizes(self.leaves)
        for size in _sizes(tree_leaves(outputs)).values():
            if leaf := [index for index, each in sizes.items() if each == size]:
                return dataclasses.replace(self, batch_leaf=leaf[0])
        return self


def _sizes(leaves: list[Any]) -> dict[int, int]:
    """Return the size of axis 0 of each tensor that has axes, by its index among the leaves."""
    return {index: value.shape[0] for index, value in enumerate(leaves) if isinstance(value, Tensor) and value.ndim}


def has_batch(value: Any, batch: int | None) -> bool:
    """Return whether a value is a tensor whose axis 0 has the size `batch`."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def with_batch_size(inputs: Inputs, size: int) -> Inputs:
    """Return the inputs with another batch size, by repeating samples or leaving out the last ones.

    Tensors whose axis 0 does not have the present batch size stay as they are.
    """
    batch = inputs.batch

    def resize(value: Any) -> Any:
        if not has_batch(value, batch):
            return value
        return value.repeat(-(-size // value.shape[0]), *(1,) * (value.ndim - 1))[:size].contiguous()

    return inputs.map(resize)


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

    return inputs.map(extend)


def random_like(inputs: Inputs, seed: int) -> Inputs:
    """Return the inputs with every floating-point tensor replaced by standard normal values drawn with a seed."""
    generator = torch.Generator().manual_seed(seed)

    def randomize(value: Any) -> Any:
        if not is_float(value):
            return value
        return torch.randn(value.shape, generator=generator, dtype=torch.float32, device="cpu").to(value)

    return inputs.map(randomize)


def clone(inputs: Inputs) -> Inputs:
    """Return a copy of the inputs, because a model may overwrite its inputs."""
    return inputs.map(lambda value: value.clone() if isinstance(value, Tensor) else value)


def outputs_of(model: Callable[..., Any], inputs: Inputs) -> list[Any]:
    """Return the outputs of a call on a copy of the inputs, in flat order."""
    given = clone(inputs)
    return tree_leaves(model(*given.args, **given.kwargs))


def to_double(inputs: Inputs) -> Inputs:
    """Return the inputs with every floating-point tensor converted to float64."""
    return inputs.map(lambda value: value.double() if is_float(value) else value)


def is_float(value: Any) -> bool:
    """Return whether a value is a real floating-point tensor."""
    return isinstance(value, Tensor) and value.is_floating_point()


def is_same(value: Any, constant: Any) -> bool:
    """Return whether a value that is not a tensor has the type and the value of a constant."""
    return type(value) is type(constant) and not isinstance(value, Tensor) and bool(value == constant)
