"""What was counted, and the entropies that follow from it (EASIER, arXiv 2404.18949)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastentropy._utils.files import save_tensors
from fastentropy._utils.text import format_count, format_integer, format_share, format_table, plural, shorten_names

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Zero = Literal["discard", "on"]
Average = Literal["dataset", "batch"]
_ZERO = ("discard", "on")
_LN2 = math.log(2)
#: The columns of `Statistics.to_dict` and `Statistics.to_pandas`.
_FIGURES = ["activation", "neurons", "observations", "nan", "entropy", "dead", "always_on", "off", "zero", "on"]


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """The statistics of one site.

    Attributes:
        activation: its name.
        counts: int64 [neurons, 3], how often each neuron's input was off (below 0), zero and on (above 0).
        nan: how many values were NaN, in none of the three.
        batch_entropies: float64 [neurons, 2], the neuron entropies of single batches summed, with zero discarded and with zero
            as on. None where batches were not told apart.
        batches: how many batches these are.
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

    @property
    def observations(self) -> int:
        """How many values were off, zero or on, over all neurons."""
        return int(self.counts.sum())

    @property
    def observed(self) -> Tensor:
        """Which neurons had a value in any of the three states, bool [neurons]. One that had none is neither dead nor on."""
        return (self.counts > 0).any(1)

    @property
    def dead(self) -> Tensor:
        """Which neurons were observed and never on, bool [neurons]: zero is as good as off, since relu gives 0 for both."""
        return self.observed & (self.counts[:, 2] == 0)

    @property
    def always_on(self) -> Tensor:
        """Which neurons were observed and never off nor zero, bool [neurons]: relu gave every value back as it came."""
        return self.observed & (self.counts[:, :2] == 0).all(1)

    def entropy(self, zero: Zero = "discard", average: Average = "dataset") -> Tensor:
        """The entropy of each neuron in bits, float64 [neurons].

        Args:
            zero: leave values that are exactly 0 out (as the paper says) or count them as on (as its code does).
            average: one entropy from all counts, or the mean over batches with equal weight (as the paper's code does).

        Raises:
            ValueError: an option is something else, or batches are asked for and were not told apart.
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

    def to_dict(self, zero: Zero = "discard", average: Average = "dataset") -> dict[str, dict[str, Any]]:
        """A row of figures for each site, in the types of JSON.

        `activation` is its name; `neurons`, `observations` and `nan` are counts; `entropy` is that of the layer, in bits;
        `dead` and `always_on` are the shares of such neurons among those that were observed; `off`, `zero` and `on` are the
        shares of the observations in each state. Shares of nothing are 0. The terms are those of `SiteStatistics`, the options
        those of `SiteStatistics.entropy`.
        """
        entropies = self.layer_entropy(zero, average)
        return {name: _figures(site, entropies[name]) for name, site in self.items()}

    def to_pandas(self, zero: Zero = "discard", average: Average = "dataset") -> pandas.DataFrame:
        """The figures of `to_dict` as a data frame with a row for each site. Raises ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("stats.to_pandas() needs pandas: pip install pandas") from error
        sites = self.to_dict(zero, average)
        return pandas.DataFrame(list(sites.values()), pandas.Index(list(sites), name="site"), _FIGURES)

    def plot(self, path: str | PathLike[str] | None = None, *, zero: Zero = "discard", average: Average = "dataset") -> Figure:
        """The layer entropies as bars, and beside each the distribution of its neurons' entropies.

        Also written to `path` (.png, .svg or .pdf), where one is given. Raises ImportError without matplotlib, and ValueError
        where path ends otherwise or there are no sites.
        """
        try:
            from fastentropy.reporting.plots import plot_entropies
        except ImportError as error:
            raise ImportError('stats.plot() needs matplotlib: pip install "fastentropy[cli]"') from error
        return plot_entropies({name: site.entropy(zero, average) for name, site in self.items()}, path)

    def __str__(self) -> str:
        """A table of at most 80 columns with a row for each site (see `to_dict`), and a line about all of them."""
        if not self:
            return "no sites: nothing was counted"
        sites = self.to_dict()
        activations = shorten_names([site["activation"] for site in sites.values()], 12)
        head = ["site", "activation", "neurons", "values", "bits", "dead", "always on"]
        rows = [
            [
                name,
                activation,
                format_integer(site["neurons"]),
                format_count(site["observations"]),
                f"{site['entropy']:.3f}",
                format_share(site["dead"]),
                format_share(site["always_on"]),
            ]
            for (name, site), activation in zip(sites.items(), activations, strict=True)
        ]
        if any(site["nan"] for site in sites.values()):
            head.append("NaN")
            for row, site in zip(rows, sites.values(), strict=True):
                row.append(format_count(site["nan"]))
        mean = sum(site["entropy"] for site in sites.values()) / len(sites)
        return f"{format_table(head, rows, left=2)}\n\n{self._size()}, mean layer entropy {mean:.3f} bits"

    def __repr__(self) -> str:
        """How much there is."""
        return f"<Statistics: {self._size()}>"

    def _size(self) -> str:
        return f"{plural(len(self), 'site')}, {plural(sum(site.neurons for site in self.values()), 'neuron')}"

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of two runs of one model together. Raises ValueError where the sites are not the same."""
        if list(self) != list(other):
            different = sorted(set(self) ^ set(other)) or list(self)
            raise ValueError(f"statistics of different sites cannot be added; they differ in {', '.join(different)}")
        return Statistics({name: site + other[name] for name, site in self.items()})

    def state_dict(self) -> dict[str, Any]:
        """Everything as tensors by `site/counts` and `site/batch_entropies`, and the sites in call order under `sites`."""
        tensors = {f"{name}/counts": site.counts for name, site in self.items()}
        for name, site in self.items():
            if site.batch_entropies is not None:
                tensors[f"{name}/batch_entropies"] = site.batch_entropies
        sites = [
            {"name": name, "activation": site.activation, "nan": site.nan, "batches": site.batches}
            for name, site in self.items()
        ]
        return {"sites": sites, **tensors}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Statistics:
        """The statistics that `state_dict` was called on. Raises ValueError where state is something else."""
        try:
            sites = state["sites"]
            return cls({site["name"]: _site_from_state_dict(site, state) for site in sites})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of statistics (make one with stats.state_dict()): {error!r}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file; a file of that name is replaced only when the new one is complete."""
        tensors = self.state_dict()
        save_tensors(tensors, path, {"fastentropy_sites": json.dumps(tensors.pop("sites"))})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read a file that `save` wrote. Raises ValueError where it is damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                sites = json.loads((file.metadata() or {})["fastentropy_sites"])
                return cls.from_state_dict({"sites": sites, **{key: file.get_tensor(key) for key in file.keys()}})  # noqa: SIM118
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


def _figures(site: SiteStatistics, entropy: float) -> dict[str, Any]:
    observed, observations = int(site.observed.sum()), site.observations
    neurons = [int(site.dead.sum()) / max(observed, 1), int(site.always_on.sum()) / max(observed, 1)]
    states = [count / max(observations, 1) for count in site.counts.sum(0).tolist()]
    figures = (site.activation, site.neurons, observations, site.nan, entropy, *neurons, *states)
    return dict(zip(_FIGURES, figures, strict=True))


def _site_from_state_dict(site: Mapping[str, Any], state: Mapping[str, Any]) -> SiteStatistics:
    counts, batch_entropies = state[f"{site['name']}/counts"], state.get(f"{site['name']}/batch_entropies")
    if counts.dtype != torch.int64 or counts.ndim != 2 or counts.shape[1] != 3:
        raise ValueError(f"counts are {counts.dtype} {list(counts.shape)}, expected torch.int64 [neurons, 3]")
    return SiteStatistics(site["activation"], counts, int(site["nan"]), batch_entropies, int(site["batches"]))
