"""The reference for counting states, in plain PyTorch. The tests compare the kernels with it.

It takes any floating-point dtype, any strides and any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_states(
    x: Tensor,
    counts: Tensor,
    channel_axis: int,
    *,
    edges: Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
) -> None:
    """Count the states of `x` for each neuron, and add the counts to `counts` in place.

    NaN has no state. The counts are sums of integers, and so exact for any number of values.

    Args:
        x: a floating-point tensor of any strides.
        counts: int64 `[neurons, 3]`, with columns for the values below, equal to and above zero. With `edges` the shape is
            `[neurons, len(edges) + 1]`.
        channel_axis: the axis of `x` that runs over the neurons.
        edges: numbers in rising order. Column i then counts the values with `edges[i - 1] <= x < edges[i]`.
        mask: bool, with the shape of `x` without the channel axis. Positions at which it is False are not counted.
        nan: int64 `[neurons]`. The number of NaN values of each neuron is added to it.
    """
    by_position = x.detach().movedim(channel_axis, -1).unsqueeze(0)
    by_position = by_position.flatten(0, -2) if mask is None else by_position[mask.unsqueeze(0)]
    if edges is None:
        states = [by_position < 0, by_position == 0, by_position > 0]
    else:
        wide, borders = by_position.double(), [-torch.inf, *edges]
        at_least = [wide >= border for border in borders] + [torch.zeros_like(wide, dtype=torch.bool)]
        states = [at_least[i] & ~at_least[i + 1] for i in range(len(borders))]
    counts += torch.stack([state.sum(0) for state in states], dim=1)
    if nan is not None:
        nan += by_position.isnan().sum(0)
