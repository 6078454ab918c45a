"""Ways of counting states that need no kernel of ours: what people would use instead."""

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
    """The function through torch.compile; dynamic: one program for all shapes instead of one for each.

    What it cannot compile as a whole raises, also where there are too many programs of it, instead of running uncompiled.
    """
    return torch.compile(function, dynamic=dynamic, fullgraph=True)


def activate_and_count(activation: Callable[[Tensor], Tensor], x: Tensor, counts: Tensor, channel_axis: int) -> Tensor:
    """The activation and the counts, for a compiler to fuse."""
    count_in_pytorch(x, counts, channel_axis)
    return activation(x)


def published_entropy(x: Tensor, *, neurons_last: bool = False) -> float:
    """The steps of EASIER's code (VGCQ/EASIER, utils.py) for one layer and one mini-batch, in bits.

    Shares of the batch at or above zero, and below, at every position; their means per neuron, which are on axis 1 or, as
    that code has it for Swin, on the last axis; the entropy of the two; its mean as a number.
    """
    entropy = torch.zeros((), device=x.device)
    for state in (x >= 0, x < 0):
        share = state.sum(0) / x.shape[0]
        while share.ndim > 1:
            share = share.mean(0 if neurons_last else 1)
        entropy = entropy - share * torch.log2(share.clamp(min=1e-10))
    return entropy.mean().item()


def histogram_observer(device: torch.device) -> Callable[[Tensor], object]:
    """PyTorch's observer for quantisation: a histogram of 2,048 bins of a whole tensor, in float32, not of each neuron."""
    from torch.ao.quantization.observer import HistogramObserver

    observer = HistogramObserver().to(device)
    return lambda x: observer(x.float())
