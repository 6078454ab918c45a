"""Find out the memory format of a tensor, and convert tensors and models to channels-last."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import tree_map
from fastentropy.fusion.shared_tensors import SharedTensors

#: The channels-last memory format by the number of axes: 4 for batches of images, 5 for batches of volumes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def with_channels_last_weights(model: nn.Module, known: SharedTensors | None = None) -> nn.Module:
    """Return a copy of a model with its 4-d and 5-d weights in channels-last. Weights that need no other strides are shared.

    Convolutions with such weights also give their outputs in channels-last.

    Args:
        model: the model.
        known: further tensors that the copy shares where it has equal ones.
    """
    known, taken = known or SharedTensors(), set[int]()
    memo: dict[int, Any] = {
        id(value): value
        for value in [*model.parameters(), *model.buffers()]
        if value.ndim not in CHANNELS_LAST or value.is_contiguous(memory_format=CHANNELS_LAST[value.ndim])
    }
    for parameter in model.parameters():
        if id(parameter) not in memo:
            last = parameter.detach().contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
            memo[id(parameter)] = nn.Parameter(known.shared(last, taken), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def like_format(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the memory format of `like`: channels-last if `like` is channels-last and has as many axes.

    In all other cases the result is contiguous.
    """
    last = CHANNELS_LAST.get(like.ndim)
    if last and tensor.ndim == like.ndim and is_channels_last(like):
        return tensor.contiguous(memory_format=last)
    return tensor.contiguous()


def is_matrix(value: Tensor) -> bool:
    """Return whether all axes of a tensor but the last can be viewed as one, without a copy."""
    sizes, strides = value.shape[:-1], value.stride()[:-1]
    return all(strides[axis] == strides[axis + 1] * sizes[axis + 1] for axis in range(len(sizes) - 1))


def is_channels_last(value: Tensor) -> bool:
    """Return whether a batch of images or volumes is in channels-last and not contiguous.

    A tensor can be both, if it has one channel, for example; then this returns False.
    """
    last = CHANNELS_LAST.get(value.ndim)
    return last is not None and value.is_contiguous(memory_format=last) and not value.is_contiguous()


def lost_order(value: Any, wanted: Any) -> list[int] | None:
    """Return the axes of `wanted` by falling stride if `value` has them in another order in memory, and None otherwise.

    Axes of size one, and tensors that repeat their values, have no order. What is not a tensor has none either.
    """
    if not (isinstance(value, Tensor) and isinstance(wanted, Tensor) and value.shape == wanted.shape):
        return None
    long = [axis for axis in range(wanted.ndim) if wanted.shape[axis] > 1]
    if wanted.layout is not torch.strided or any(wanted.stride(axis) == 0 for axis in long):
        return None
    order = _order(wanted)
    return None if [axis for axis in _order(value) if axis in long] == [axis for axis in order if axis in long] else order


def _order(value: Tensor) -> list[int]:
    """Return the axes of a tensor from the largest stride to the smallest."""
    strides = value.stride()
    return sorted(range(value.ndim), key=lambda axis: -strides[axis])


class InOrder(nn.Module):
    """Run a model, and give its outputs the order of axes in memory that the outputs of another model have."""

    def __init__(self, model: nn.Module, actual: Sequence[Any], expected: Sequence[Any]) -> None:
        """Take over a model.

        Args:
            model: the model.
            actual: its outputs for some inputs, in flat order.
            expected: the outputs of the other model.
        """
        super().__init__()
        self.model = model
        self._orders = list(map(lost_order, actual, expected))

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the model."""
        orders = iter(self._orders)
        return tree_map(lambda value: in_order(value, next(orders)), self.model(*inputs, **keywords))


def in_order(value: Any, order: list[int] | None) -> Any:
    """Return a tensor with its axes in an order in memory, or the value itself if the order is None."""
    if order is None:
        return value
    return value.permute(order).contiguous().permute([order.index(axis) for axis in range(len(order))])
