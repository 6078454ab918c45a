"""Find out the memory format of a tensor, and convert tensors and models to channels-last."""

import copy

import torch
from torch import Tensor, nn

#: The channels-last memory format by the number of axes: 4 for batches of images, 5 for batches of volumes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def with_channels_last_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its 4-d and 5-d weights in channels-last.

    Convolutions with such weights also give their outputs in channels-last.
    """
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
    return copied


def like_format(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the memory format of `like`: channels-last if `like` is channels-last and has as many axes.

    In all other cases the result is contiguous.
    """
    last = CHANNELS_LAST.get(like.ndim)
    if last and tensor.ndim == like.ndim and is_channels_last(like):
        return tensor.contiguous(memory_format=last)
    return tensor.contiguous()


def is_channels_last(value: Tensor) -> bool:
    """Return whether a batch of images or volumes is in channels-last and not contiguous.

    A tensor can be both, if it has one channel, for example; then this returns False.
    """
    last = CHANNELS_LAST.get(value.ndim)
    return last is not None and value.is_contiguous(memory_format=last) and not value.is_contiguous()
