"""Ways of counting states without our kernels: what one would use instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def count_in_pytorch(x: Tensor, counts: Tensor, channel_axis: int = 1) -> None:
    """Add the same counts as `count_states` in plain PyTorch: three comparisons, three sums."""
    dims = [axis for axis in range(x.ndim) if axis != channel_axis % x.ndim]
    counts += torch.stack([(x < 0).sum(dims), (x == 0).sum(dims), (x > 0).sum(dims)], 1)


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """Compile a function with torch.compile, as one graph: what cannot be compiled raises instead of running uncompiled.

    A function that was recompiled too often raises, too. `dynamic` makes one program for all shapes instead of one for each.
    """
    return torch.compile(function, dynamic=dynamic, fullgraph=True)


def activate_and_count(activation: Callable[[Tensor], Tensor], x: Tensor, counts: Tensor, channel_axis: int) -> Tensor:
    """Apply the activation and count, for a compiler to fuse."""
    count_in_pytorch(x, counts, channel_axis)
    return activation(x)


def published_entropy(x: Tensor, *, neurons_last: bool = False) -> float:
    """Return the mean neuron entropy of one layer and one mini-batch in bits, step by step as EASIER's code does.

    The code (VGCQ/EASIER, utils.py) takes the share of the batch at or above zero, and below, at every position; the mean of
    each share per neuron; and the entropy of the two means. Neurons are on axis 1 or, as that code has it for Swin, on the
    last axis. The last step waits for the GPU.
    """
    entropy = torch.zeros((), device=x.device)
    for state in (x >= 0, x < 0):
        share = state.sum(0) / x.shape[0]
        while share.ndim > 1:
            share = share.mean(0 if neurons_last else 1)
        entropy = entropy - share * torch.log2(share.clamp(min=1e-10))
    return entropy.mean().item()


def histogram_observer(device: torch.device) -> Callable[[Tensor], object]:
    """Return PyTorch's observer for quantisation: a float32 histogram of 2,048 bins of the whole tensor, not of each neuron."""
    from torch.ao.quantization.observer import HistogramObserver

    observer = HistogramObserver().to(device)
    return lambda x: observer(x.float())
