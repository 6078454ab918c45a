"""The oracle: activations, their gradients and the states, in plain PyTorch: any floating dtype, any strides, any device."""

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
    """Add, per neuron, how many values lie in each state to `counts`, and how many are NaN to `nan`, in place.

    Without `edges` the states are below, equal to and above zero: `counts` is [neurons, 3]. With them, state i holds
    `edges[i - 1] <= x < edges[i]`: `counts` is [neurons, len(edges) + 1]. NaN is in no state. `mask` (bool, the shape
    of `x` without the channel axis) says which positions count. The sums are integers: exact for any number of values.
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
