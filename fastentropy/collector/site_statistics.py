"""Hold the counts of one site (call of an activation), and compute the entropies of its neurons (EASIER, arXiv 2404.18949)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Zero = Literal["discard", "on"]
Average = Literal["dataset", "batch"]
_ZERO = ("discard", "on")
_LN2 = math.log(2)


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Hold the counts of one site (call of an activation).

    Attributes:
        activation: the name of the activation, such as "relu".
        counts: int64 [neurons, 3], how often each neuron's input was off (below 0), zero, and on (above 0).
        nan: the number of values, over all neurons, that were NaN. They are in none of the three states.
        batch_entropies: float64 [neurons, 2], the neuron entropies of each batch, in bits, summed over batches. The first
            column discards zeros, the second counts them as on. None if entropies per batch were not collected.
        batches: the number of batches in which the site had a value that was not NaN.
        axis_is_inferred: whether the axis of the neurons is a default, because nothing told where they lie.
        neuron_batches: int64 [neurons], the number of batches in which the neuron had a value that was not NaN. Its entropies
            per batch are averaged over these batches. None if the number is `batches` for every neuron.
        channel_axis: the axis of the activation's input whose entries are the neurons, counted from the end: -1 after a linear
            layer, -3 after a 2-D convolution. None if it is not known, as for an exported program, or not the same in all
            runs that were added.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> site = fe.SiteStatistics("relu", torch.tensor([[2, 0, 2], [4, 0, 0], [0, 0, 4]]))
        >>> site.neurons, site.observations
        (3, 12)
        >>> site.dead, site.always_on
        (tensor([False,  True, False]), tensor([False, False,  True]))
    """

    activation: str
    counts: Tensor
    nan: int = 0
    batch_entropies: Tensor | None = None
    batches: int = 0
    axis_is_inferred: bool = False
    neuron_batches: Tensor | None = None
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        """Replace `neuron_batches` by None if it tells nothing that `batches` does not."""
        if self.neuron_batches is not None and bool((self.neuron_batches == self.batches).all()):
            object.__setattr__(self, "neuron_batches", None)

    @property
    def neurons(self) -> int:
        """Return the number of neurons of the site."""
        return self.counts.shape[0]

    @property
    def observations(self) -> int:
        """Return the number of values that were off, zero or on, summed over all neurons."""
        return int(self.counts.sum())

    @property
    def observed(self) -> Tensor:
        """Return a bool tensor [neurons]: True if the neuron had any value that was not NaN.

        Neurons that were not observed are neither dead nor always on.
        """
        return (self.counts > 0).any(1)

    @property
    def dead(self) -> Tensor:
        """Return a bool tensor [neurons]: True if the neuron was never on, but had a value that was not NaN.

        Zero counts as off here, because relu returns 0 for both.
        """
        return self.observed & (self.counts[:, 2] == 0)

    @property
    def always_on(self) -> Tensor:
        """Return a bool tensor [neurons]: True if the neuron had a value, and every value except NaN was on.

        For such a neuron relu is the identity.
        """
        return self.observed & (self.counts[:, :2] == 0).all(1)

    def entropy(self, zero: Zero = "discard", average: Average = "dataset") -> Tensor:
        """Return the entropy of each neuron: the binary entropy of its on state (EASIER, arXiv 2404.18949).

        H = −p log2 p − (1 − p) log2 (1 − p) with p = on / (on + off). H is 0 if on + off is 0.

        Args:
            zero: "discard" leaves out values that are exactly 0, as the paper does; "on" counts them as on, as the paper's code
                does.
            average: "dataset" computes one entropy from all counts. "batch" computes an entropy for each batch in which
                the neuron had a value, and returns their mean, with equal weights, as the paper's code does.

        Returns:
            float64 [neurons], in bits.

        Raises:
            ValueError: `zero` or `average` has another value, or `average` is "batch" and there are no entropies per batch.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> site = fe.SiteStatistics("relu", torch.tensor([[1, 2, 1], [3, 0, 1]]))
            >>> site.entropy()
            tensor([1.0000, 0.8113], dtype=torch.float64)
            >>> site.entropy(zero="on")
            tensor([0.8113, 0.8113], dtype=torch.float64)
        """
        if zero not in _ZERO or average not in ("dataset", "batch"):
            raise ValueError(f"zero={zero!r}, average={average!r}: expected 'discard' or 'on', and 'dataset' or 'batch'")
        if average == "dataset":
            return state_entropy(self.counts, zero)
        if self.batch_entropies is None:
            raise ValueError("these statistics do not tell batches apart; collect with fe.collect(model, average='batch')")
        return self.batch_entropies[:, _ZERO.index(zero)] / batches_of_neurons(self).clamp_min(1)

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        """Return the statistics of both data sets together.

        The result has entropies per batch only if both operands have them.
        """
        if (self.activation, self.counts.shape) != (other.activation, other.counts.shape):
            raise ValueError(
                f"{self.activation} with {self.neurons} neurons and {other.activation} with {other.neurons} are not one site"
            )
        both = SiteStatistics(
            self.activation,
            self.counts + other.counts,
            self.nan + other.nan,
            axis_is_inferred=self.axis_is_inferred or other.axis_is_inferred,
            channel_axis=self.channel_axis if self.channel_axis == other.channel_axis else None,
        )
        if self.batch_entropies is None or other.batch_entropies is None:
            return both
        return replace(
            both,
            batch_entropies=self.batch_entropies + other.batch_entropies,
            batches=self.batches + other.batches,
            neuron_batches=batches_of_neurons(self) + batches_of_neurons(other),
        )


def batches_of_neurons(site: SiteStatistics) -> Tensor:
    """Return the number of batches in which each neuron of a site had a value that was not NaN, int64 [neurons]."""
    if site.neuron_batches is not None:
        return site.neuron_batches
    return torch.full((site.neurons,), site.batches, dtype=torch.int64, device=site.counts.device)


def state_entropy(counts: Tensor, zero: Zero = "discard") -> Tensor:
    """Return the binary entropy of the on state of each neuron, in bits (EASIER, arXiv 2404.18949).

    H = −p log2 p − (1 − p) log2 (1 − p) with p = on / (on + off). H is 0 if on + off is 0.

    Args:
        counts: [neurons, 3], how often each neuron was off, zero and on.
        zero: "discard" leaves zeros out; "on" counts them as on.

    Returns:
        float64 [neurons].
    """
    off, zeros, on = counts.double().unbind(1)
    if zero == "on":
        on = on + zeros
    p = on / (on + off).clamp_min(1)
    return torch.where(on + off > 0, -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)), 0) / _LN2


def site_from_state_dict(site: Mapping[str, Any], state: Mapping[str, Any]) -> SiteStatistics:
    """Return the statistics of one site from its entry in `state["sites"]` and the tensors in `state`."""
    name = site["name"]
    counts = state[f"{name}/counts"]
    if counts.dtype != torch.int64 or counts.ndim != 2 or counts.shape[1] != 3:
        raise ValueError(f"counts are {counts.dtype} {list(counts.shape)}, expected torch.int64 [neurons, 3]")
    return SiteStatistics(
        site["activation"],
        counts,
        int(site["nan"]),
        state.get(f"{name}/batch_entropies"),
        int(site["batches"]),
        bool(site.get("axis_is_inferred", False)),
        state.get(f"{name}/neuron_batches"),
        site.get("channel_axis"),
    )
