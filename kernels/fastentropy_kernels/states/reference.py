"""The oracle of the states, in plain PyTorch: any floating dtype, any strides, any device."""

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
    """Add to `counts`, per neuron, how many values are in each state, and to `nan` how many are NaN.

    Without `edges` the states are below, equal to and above zero, and `counts` is [neurons, 3]. With `edges`, state i holds
    `edges[i - 1] <= x < edges[i]`, and `counts` is [neurons, len(edges) + 1]. NaN is in no state. `mask`, a bool tensor with
    the shape of `x` without the channel axis, says which positions count. Sums of integers are exact for any number of values.
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
