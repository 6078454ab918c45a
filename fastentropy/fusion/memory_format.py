"""Memory formats: which format a tensor is in, and tensors and models in channels-last."""

import copy

import torch
from torch import Tensor, nn

#: The channels-last memory format by the number of axes: of images and of volumes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def with_channels_last_weights(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose weights for images and volumes are in channels-last, as its outputs then are too."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        if parameter.ndim in CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=CHANNELS_LAST[parameter.ndim])
    return copied


def like_format(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in channels-last if `like` is and has as many axes, and contiguous otherwise."""
    last = CHANNELS_LAST.get(like.ndim)
    if last and tensor.ndim == like.ndim and is_channels_last(like):
        return tensor.contiguous(memory_format=last)
    return tensor.contiguous()


def is_channels_last(value: Tensor) -> bool:
    """Return whether an image or a volume is in channels-last and not contiguous as well."""
    last = CHANNELS_LAST.get(value.ndim)
    return last is not None and value.is_contiguous(memory_format=last) and not value.is_contiguous()
