"""Baselines: ways to count states without our kernels.

The state of a value is off (below zero), zero, or on (above zero). The counts of a tensor are an int64 tensor
`[channels, 3]`: the numbers of off, zero and on values of each channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def count_in_pytorch(x: Tensor, counts: Tensor, channel_axis: int = 1) -> None:
    """Add the counts of `x` to `counts` in plain PyTorch, with three comparisons and three sums.

    Args:
        x: the values, of any shape.
        counts: int64 `[channels, 3]`, to which the counts are added in place.
        channel_axis: the axis of `x` that holds the channels.
    """
    dims = [axis for axis in range(x.ndim) if axis != channel_axis % x.ndim]
    counts += torch.stack([(x < 0).sum(dims), (x == 0).sum(dims), (x > 0).sum(dims)], 1)


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    """Compile a function with torch.compile, as a single graph.

    A call raises if the function cannot be compiled as one graph, or if it was recompiled too often. It never falls back to
    eager execution.

    Args:
        function: the function.
        dynamic: whether to make one program for all shapes instead of one program per shape.

    Returns:
        The compiled function, which is the same object for the same arguments.
    """
    return torch.compile(function, dynamic=dynamic, fullgraph=True)


def activate_and_count(activation: Callable[[Tensor], Tensor], x: Tensor, counts: Tensor, channel_axis: int) -> Tensor:
    """Add the counts of `x` to `counts`, and return the activation of `x`. torch.compile is meant to fuse both.

    Args:
        activation: the activation function.
        x: the values, of any shape.
        counts: int64 `[channels, 3]`, to which the counts are added in place.
        channel_axis: the axis of `x` that holds the channels.
    """
    count_in_pytorch(x, counts, channel_axis)
    return activation(x)


def published_entropy(x: Tensor, *, neurons_last: bool = False) -> float:
    """Return the mean neuron entropy of a layer over one mini-batch, in bits, computed as the published code of EASIER does.

    That code (VGCQ/EASIER, utils.py) works in three steps. At every position it takes the share of the batch that is at or
    above zero, and the share below zero. Then it averages each share over the positions of a neuron. Last, it takes the entropy
    of the two means. The function synchronises with the GPU, because it returns a Python float.

    Args:
        x: the input of the activation, with the batch on axis 0.
        neurons_last: whether the neurons are on the last axis, as in that code for Swin, instead of on axis 1.
    """
    entropy = torch.zeros((), device=x.device)
    for state in (x >= 0, x < 0):
        share = state.sum(0) / x.shape[0]
        while share.ndim > 1:
            share = share.mean(0 if neurons_last else 1)
        entropy = entropy - share * torch.log2(share.clamp(min=1e-10))
    return entropy.mean().item()


def histogram_observer(device: torch.device) -> Callable[[Tensor], object]:
    """Return a function that passes a tensor to a new `HistogramObserver`, which PyTorch uses for quantisation.

    The observer keeps one float32 histogram with 2,048 bins for all values together, without a distinction of neurons.

    Args:
        device: the device of the tensors.
    """
    from torch.ao.quantization.observer import HistogramObserver

    observer = HistogramObserver().to(device)
    return lambda x: observer(x.float())
