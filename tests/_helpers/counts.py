"""The counts of off (below zero), zero and on (above zero) values, computed without any code of fastentropy."""

import torch
from torch import Tensor


def plain_counts(x: Tensor, axis: int) -> Tensor:
    """Return how many values of each neuron are off, zero and on: int64 `[neurons, 3]`. The neurons are on `axis` of `x`."""
    values = x.movedim(axis, 0).flatten(1)
    return torch.stack([(values < 0).sum(1), (values == 0).sum(1), (values > 0).sum(1)], 1)
