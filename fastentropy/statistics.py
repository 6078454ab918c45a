"""What was counted, and the entropies that follow from it (EASIER, arXiv 2404.18949)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastentropy.files import save_tensors

Zero = Literal["discard", "on"]
Average = Literal["dataset", "batch"]
_ZERO = ("discard", "on")
_LN2 = math.log(2)


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """The statistics of one site.

    counts: int64 [neurons, 3], how often each neuron's input was off (below 0), zero and on (above 0). nan: how many values
    were NaN, in none of the three. batch_entropies: float64 [neurons, 2], the neuron entropies of single batches summed, with
    zero discarded and with zero as on; `batches` is how many. None where batches were not told apart.
    """

    activation: str
    counts: Tensor
    nan: int = 0
    batch_entropies: Tensor | None = None
    batches: int = 0

    @property
    def neurons(self) -> int:
        """How many neurons the site has."""
        return self.counts.shape[0]

    def entropy(self, zero: Zero = "discard", average: Average = "dataset") -> Tensor:
        """The entropy of each neuron in bits, float64 [neurons].

        zero: leave values that are exactly 0 out (as the paper says) or count them as on (as its code does).
        average: one entropy from all counts, or the mean over batches with equal weight (as the paper's code does).
        """
        if zero not in _ZERO or average not in ("dataset", "batch"):
            raise ValueError(f"zero={zero!r}, average={average!r}: expected 'discard' or 'on', and 'dataset' or 'batch'")
        if average == "dataset":
            return state_entropy(self.counts, zero)
        if self.batch_entropies is None:
            raise ValueError("these statistics do not tell batches apart; collect with fe.collect(model, average='batch')")
        return self.batch_entropies[:, _ZERO.index(zero)] / max(self.batches, 1)

    def __add__(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of both data sets together; batches stay apart only where both kept them apart."""
        if (self.activation, self.counts.shape) != (other.activation, other.counts.shape):
            raise ValueError(
                f"{self.activation} with {self.neurons} neurons and {other.activation} with {other.neurons} are not one site"
            )
        counts, nan = self.counts + other.counts, self.nan + other.nan
        if self.batch_entropies is None or other.batch_entropies is None:
            return SiteStatistics(self.activation, counts, nan)
        batch_entropies, batches = self.batch_entropies + other.batch_entropies, self.batches + other.batches
        return SiteStatistics(self.activation, counts, nan, batch_entropies, batches)


class Statistics(Mapping[str, SiteStatistics]):
    """The statistics of every site by its name, in call order."""

    def __init__(self, sites: Mapping[str, SiteStatistics]) -> None:
        """Hold the statistics of some sites."""
        self._sites = dict(sites)

    def __getitem__(self, name: str) -> SiteStatistics:
        """The statistics of one site."""
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        """The sites' names in call order."""
        return iter(self._sites)

    def __len__(self) -> int:
        """How many sites there are."""
        return len(self._sites)

    def layer_entropy(self, zero: Zero = "discard", average: Average = "dataset") -> dict[str, float]:
        """The entropy of each site in bits: the mean over its neurons (see `SiteStatistics.entropy`)."""
        return {name: float(site.entropy(zero, average).mean()) for name, site in self.items()}

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of two runs of one model together. Raises ValueError where the sites are not the same."""
        if list(self) != list(other):
            different = sorted(set(self) ^ set(other)) or list(self)
            raise ValueError(f"statistics of different sites cannot be added; they differ in {', '.join(different)}")
        return Statistics({name: site + other[name] for name, site in self.items()})

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; a file of that name is replaced only when the new one is complete."""
        tensors = {f"{name}/counts": site.counts for name, site in self.items()}
        for name, site in self.items():
            if site.batch_entropies is not None:
                tensors[f"{name}/batch_entropies"] = site.batch_entropies
        sites = [
            {"name": name, "activation": site.activation, "nan": site.nan, "batches": site.batches}
            for name, site in self.items()
        ]
        save_tensors(tensors, path, {"fastentropy_sites": json.dumps(sites)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read a file that `save` wrote. Raises ValueError where it is damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                sites = json.loads((file.metadata() or {})["fastentropy_sites"])
                names = set(file.keys())
                return cls(
                    {
                        site["name"]: SiteStatistics(
                            site["activation"],
                            _counts(file.get_tensor(f"{site['name']}/counts")),
                            int(site["nan"]),
                            file.get_tensor(batch) if (batch := f"{site['name']}/batch_entropies") in names else None,
                            int(site["batches"]),
                        )
                        for site in sites
                    }
                )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a statistics file (write one with stats.save(path)): {error}"
            ) from error


def state_entropy(counts: Tensor, zero: Zero = "discard") -> Tensor:
    """The binary entropy of the on state in bits, float64 [neurons], for counts [neurons, 3]; 0 where nothing was counted.

    H = −p log2 p − (1 − p) log2 (1 − p) with p = on / (on + off).
    """
    off, zeros, on = counts.double().unbind(1)
    if zero == "on":
        on = on + zeros
    p = on / (on + off).clamp_min(1)
    return torch.where(on + off > 0, -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)), 0) / _LN2


def _counts(counts: Tensor) -> Tensor:
    if counts.dtype != torch.int64 or counts.ndim != 2 or counts.shape[1] != 3:
        raise ValueError(f"counts are {counts.dtype} {list(counts.shape)}, expected torch.int64 [neurons, 3]")
    return counts
