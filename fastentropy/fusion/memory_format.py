"""Memory formats: channels-last weights and values."""

import copy

import torch
from torch import Tensor, nn


def with_channels_last_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights for images and volumes are in channels-last, which the outputs follow."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
    return copied


#: The memory format of images and of volumes whose channels lie next to each other, by their number of axes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def like_format(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of a value, where it has as many axes."""
    last = CHANNELS_LAST.get(like.ndim)
    if last and tensor.ndim == like.ndim and is_channels_last(like):
        return tensor.contiguous(memory_format=last)
    return tensor.contiguous()


def is_channels_last(value: Tensor) -> bool:
    """Whether the channels of images are what lies next to each other, and not their positions."""
    last = CHANNELS_LAST.get(value.ndim)
    return last is not None and value.is_contiguous(memory_format=last) and not value.is_contiguous()
