"""Hold the statistics of all sites of a model: their entropies, tables and files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from fastentropy._utils.files import save_tensors
from fastentropy._utils.text import format_count, format_integer, format_share, format_table, plural, shorten_names
from fastentropy.collector.site_statistics import Average, SiteStatistics, Zero

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: The columns of `Statistics.to_dict` and `Statistics.to_pandas`.
_FIGURES = ["activation", "neurons", "observations", "nan", "entropy", "dead", "always_on", "off", "zero", "on"]


class Statistics(Mapping[str, SiteStatistics]):
    """Hold the statistics of every site: a mapping from the site's name, in call order.

    `a + b` holds the statistics of two runs of one model together, and `print` shows a table.

    Args:
        sites: the statistics by site, in call order.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> statistics = fe.Statistics({"relu": fe.SiteStatistics("relu", torch.tensor([[2, 0, 2], [4, 0, 0]]))})
        >>> statistics.layer_entropy()
        {'relu': 0.5}
        >>> (statistics + statistics)["relu"].counts
        tensor([[4, 0, 4],
                [8, 0, 0]])
        >>> print(statistics)
        site  activation  neurons  values   bits   dead  always on
        ----  ----------  -------  ------  -----  -----  ---------
        relu  relu              2       8  0.500  50.0%         0%
        <BLANKLINE>
        1 site, 2 neurons, mean layer entropy 0.500 bits
    """

    def __init__(self, sites: Mapping[str, SiteStatistics]) -> None:
        """Hold the statistics of `sites`."""
        self._sites = dict(sites)

    def __getitem__(self, name: str) -> SiteStatistics:
        """Return the statistics of one site."""
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the sites' names in call order."""
        return iter(self._sites)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self._sites)

    def layer_entropy(self, zero: Zero = "discard", average: Average = "dataset") -> dict[str, float]:
        """Return the layer entropy of each site: the mean of its neuron entropies (arXiv 2404.18949, equation 4).

        Args:
            zero: see `SiteStatistics.entropy`.
            average: see `SiteStatistics.entropy`.

        Returns:
            Bits by name of the site, in call order.

        Raises:
            ValueError: see `SiteStatistics.entropy`.
        """
        return {name: float(site.entropy(zero, average).mean()) for name, site in self.items()}

    def to_dict(self, zero: Zero = "discard", average: Average = "dataset") -> dict[str, dict[str, Any]]:
        """Return a row of figures for each site, in the types of JSON.

        Args:
            zero: see `SiteStatistics.entropy`.
            average: see `SiteStatistics.entropy`.

        Returns:
            By name of the site:

            - `activation`: the name of the activation;
            - `neurons`, `observations`, `nan`: numbers, as in `SiteStatistics`;
            - `entropy`: the layer entropy in bits;
            - `dead`, `always_on`: the fractions of such neurons among those that were observed;
            - `off`, `zero`, `on`: the fractions of the observations in each state.

            A fraction of nothing is 0.

        Raises:
            ValueError: see `SiteStatistics.entropy`.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> statistics = fe.Statistics({"relu": fe.SiteStatistics("relu", torch.tensor([[2, 0, 2], [4, 0, 0]]))})
            >>> row = statistics.to_dict()["relu"]
            >>> row["entropy"], row["dead"], row["off"], row["on"]
            (0.5, 0.5, 0.75, 0.25)
        """
        entropies = self.layer_entropy(zero, average)
        return {name: _figures(site, entropies[name]) for name, site in self.items()}

    def to_pandas(self, zero: Zero = "discard", average: Average = "dataset") -> pandas.DataFrame:
        """Return the figures of `to_dict` as a data frame with a row for each site.

        Args:
            zero: see `SiteStatistics.entropy`.
            average: see `SiteStatistics.entropy`.

        Returns:
            A frame whose index is the name of the site.

        Raises:
            ImportError: pandas is not installed.
            ValueError: see `SiteStatistics.entropy`.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("stats.to_pandas() needs pandas: pip install pandas") from error
        sites = self.to_dict(zero, average)
        return pandas.DataFrame(list(sites.values()), pandas.Index(list(sites), name="site"), _FIGURES)

    def plot(self, path: str | PathLike[str] | None = None, *, zero: Zero = "discard", average: Average = "dataset") -> Figure:
        """Draw the layer entropies as bars, and beside each bar the distribution of its neurons' entropies.

        Args:
            path: a .png, .svg or .pdf file to write the figure to; None writes none.
            zero: see `SiteStatistics.entropy`.
            average: see `SiteStatistics.entropy`.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: `path` has another ending, there are no sites, or as `SiteStatistics.entropy`.
        """
        try:
            from fastentropy.reporting.plots import plot_entropies
        except ImportError as error:
            raise ImportError('stats.plot() needs matplotlib: pip install "fastentropy[cli]"') from error
        return plot_entropies({name: site.entropy(zero, average) for name, site in self.items()}, path)

    def __str__(self) -> str:
        """Return a table of at most 80 columns with a row for each site (see `to_dict`), and a line about all of them."""
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
        """Return the numbers of sites and neurons."""
        return f"<Statistics: {self._size()}>"

    def _size(self) -> str:
        return f"{plural(len(self), 'site')}, {plural(sum(site.neurons for site in self.values()), 'neuron')}"

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of two runs of one model together. Raises ValueError where the sites differ."""
        if list(self) != list(other):
            different = sorted(set(self) ^ set(other)) or list(self)
            raise ValueError(f"statistics of different sites cannot be added; they differ in {', '.join(different)}")
        return Statistics({name: site + other[name] for name, site in self.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as tensors and plain values.

        Returns:
            The tensors under `SITE/counts` and `SITE/batch_entropies`, and a list of the sites in call order under `sites`.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> statistics = fe.Statistics({"relu": fe.SiteStatistics("relu", torch.tensor([[2, 0, 2]]))})
            >>> sorted(statistics.state_dict())
            ['relu/counts', 'sites']
        """
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
        """Return the statistics that a state was made from.

        Args:
            state: what `state_dict` returned, of statistics or of a collector.

        Returns:
            The same statistics.

        Raises:
            ValueError: `state` is something else.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> statistics = fe.Statistics({"relu": fe.SiteStatistics("relu", torch.tensor([[2, 0, 2]]))})
            >>> fe.Statistics.from_state_dict(statistics.state_dict())
            <Statistics: 1 site, 1 neuron>
        """
        try:
            sites = state["sites"]
            return cls({site["name"]: _site_from_state_dict(site, state) for site in sites})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of statistics (make one with stats.state_dict()): {error!r}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file. A file of that name is replaced only when the new one is complete.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be written.

        Examples:
            >>> import tempfile, torch
            >>> import fastentropy as fe
            >>> statistics = fe.Statistics({"relu": fe.SiteStatistics("relu", torch.tensor([[2, 0, 2]]))})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     statistics.save(f"{folder}/statistics.safetensors")
            ...     fe.Statistics.load(f"{folder}/statistics.safetensors")
            <Statistics: 1 site, 1 neuron>
        """
        tensors = self.state_dict()
        save_tensors(tensors, path, {"fastentropy_sites": json.dumps(tensors.pop("sites"))})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read a file that `save` wrote.

        Args:
            path: the file.

        Returns:
            The statistics.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                sites = json.loads((file.metadata() or {})["fastentropy_sites"])
                return cls.from_state_dict({"sites": sites, **{key: file.get_tensor(key) for key in file.keys()}})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a statistics file (write one with stats.save(path)): {error}"
            ) from error


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
