"""The oracle: states and activations in plain PyTorch, for any floating dtype and any strides, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "identity": torch.clone,
        "relu": F.relu,
        "relu6": F.relu6,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "hardswish": F.hardswish,
        "mish": F.mish,
        "softplus": F.softplus,
        "selu": F.selu,
    }
)
"""Name -> function of one tensor; none of them takes a parameter, none returns its argument."""


def count_states(x: Tensor, counts: Tensor, channel_axis: int, mask: Tensor | None = None) -> None:
    """Add the number of values below, equal to and above zero to `counts` [neurons, 3], in place.

    NaN is in none of the three. `mask` (bool, the shape of `x` without the channel axis) says which positions count.
    The sums are integers: exact for any number of values.
    """
    by_position = x.detach().movedim(channel_axis, -1).unsqueeze(0)
    by_position = by_position.flatten(0, -2) if mask is None else by_position[mask.unsqueeze(0)]
    off, zero, on = (by_position < 0).sum(0), (by_position == 0).sum(0), (by_position > 0).sum(0)
    counts += torch.stack([off, zero, on], dim=1)


def activation_states(x: Tensor, counts: Tensor, activation: str, channel_axis: int, mask: Tensor | None = None) -> Tensor:
    """Return the activation of `x` as a new tensor and add the states of `x` to `counts`; see `count_states`."""
    y = ACTIVATIONS[activation](x)
    count_states(x, counts, channel_axis, mask)
    return y
