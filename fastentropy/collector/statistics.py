"""Hold the statistics of all sites (calls of activations) of a model: entropies, tables and files."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastentropy._utils.errors import reason
from fastentropy._utils.files import save_tensors
from fastentropy._utils.optional import install_command
from fastentropy._utils.text import WIDTH, format_count, format_integer, format_share, format_table, plural, shorten_names
from fastentropy.collector.site_statistics import Average, SiteStatistics, Zero, site_from_state_dict
from fastentropy.sites.inputs import described

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

#: The columns of `Statistics.to_dict` and `Statistics.to_pandas`.
_FIGURES = ["activation", "neurons", "observations", "nan", "entropy", "dead", "always_on", "off", "zero", "on"]
#: The values of a site in `Statistics.state_dict` that are no tensors.
_VALUES = ("activation", "nan", "batches", "axis_is_inferred", "channel_axis")
#: The keys in the metadata of a file under which the sites and the notes are stored, as JSON.
_SITES, _NOTES = "fastentropy_sites", "fastentropy_notes"
#: The line below a table in which names have an asterisk.
_INFERRED = "* its channel axis is a default, for lack of evidence; give it as channel_axis="


class Statistics(Mapping[str, SiteStatistics]):
    """Map the name of each site (call of an activation) to its statistics, in call order.

    `a + b` combines the statistics of two runs of one model. `print` shows a table.

    Args:
        sites: the statistics of each site, by name, in call order.
        notes: sentences about what could not be counted, and why.

    Attributes:
        notes: the notes, each once.

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

    def __init__(self, sites: Mapping[str, SiteStatistics], notes: Iterable[str] = ()) -> None:
        """Hold the statistics of `sites`, and the notes."""
        self._sites = dict(sites)
        self.notes = tuple(dict.fromkeys(notes))

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
            zero: "discard" leaves out values that are exactly 0; "on" counts them as on.
            average: "dataset" computes each entropy from all counts; "batch" takes the mean of the entropies of the batches.

        Returns:
            The layer entropies in bits, by name of the site, in call order.

        Raises:
            ValueError: `zero` or `average` has another value, or `average` is "batch" and there are no entropies per batch.
        """
        return {name: float(site.entropy(zero, average).mean()) for name, site in self.items()}

    def to_dict(self, zero: Zero = "discard", average: Average = "dataset") -> dict[str, dict[str, Any]]:
        """Return a row of figures for each site, with values of JSON types.

        Args:
            zero: "discard" leaves out values that are exactly 0; "on" counts them as on.
            average: "dataset" computes each entropy from all counts; "batch" takes the mean of the entropies of the batches.

        Returns:
            For each site, by name, a dict with these keys:

            - `activation`: the name of the activation;
            - `neurons`, `observations`, `nan`: numbers, as in `SiteStatistics`;
            - `entropy`: the layer entropy in bits;
            - `dead`, `always_on`: the fractions of dead and of always-on neurons among the observed neurons;
            - `off`, `zero`, `on`: the fractions of the observations in each state.

            A fraction is 0 if its denominator is 0.

        Raises:
            ValueError: `zero` or `average` has another value, or `average` is "batch" and there are no entropies per batch.

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
            zero: "discard" leaves out values that are exactly 0; "on" counts them as on.
            average: "dataset" computes each entropy from all counts; "batch" takes the mean of the entropies of the batches.

        Returns:
            A data frame that is indexed by the name of the site.

        Raises:
            ImportError: pandas is not installed.
            ValueError: `zero` or `average` has another value, or `average` is "batch" and there are no entropies per batch.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("stats.to_pandas() needs pandas: pip install pandas") from error
        sites = self.to_dict(zero, average)
        return pandas.DataFrame(list(sites.values()), pandas.Index(list(sites), name="site"), _FIGURES)

    def plot(self, path: str | PathLike[str] | None = None, *, zero: Zero = "discard", average: Average = "dataset") -> Figure:
        """Draw the layer entropy of each site as a bar, and beside it the distribution of the neuron entropies of the site.

        Args:
            path: a .png, .svg or .pdf file to write the figure to. None writes no file.
            zero: "discard" leaves out values that are exactly 0; "on" counts them as on.
            average: "dataset" computes each entropy from all counts; "batch" takes the mean of the entropies of the batches.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: `path` has another suffix, there are no sites, `zero` or `average` has another value, or `average` is
                "batch" and there are no entropies per batch.
        """
        try:
            from fastentropy.reporting.plots import plot_entropies
        except ImportError as error:
            raise ImportError(f"stats.plot() needs matplotlib: {install_command('cli')}") from error
        return plot_entropies({name: site.entropy(zero, average) for name, site in self.items()}, path)

    def __str__(self) -> str:
        """Return a table of at most 80 columns with a row for each site, a line that sums up all sites, and the notes."""
        notes = "".join(f"\n{line}" for note in self.notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="  "))
        if not self:
            return f"no sites: nothing was counted{notes}"
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
        marks = ["*" if site.axis_is_inferred else "" for site in self.values()]
        table = format_table(head, rows, left=2, marks=marks)
        legend = f"\n{_INFERRED}" if any(marks) else ""
        return f"{table}\n\n{self._size()}, mean layer entropy {mean:.3f} bits{legend}{notes}"

    def __repr__(self) -> str:
        """Return the numbers of sites and neurons in angle brackets."""
        return f"<Statistics: {self._size()}>"

    def _size(self) -> str:
        """Return the numbers of sites and neurons as text."""
        return f"{plural(len(self), 'site')}, {plural(sum(site.neurons for site in self.values()), 'neuron')}"

    def __add__(self, other: Statistics) -> Statistics:
        """Return the combined statistics of two runs of one model. Raises ValueError if the sites differ."""
        if list(self) != list(other):
            different = sorted(set(self) ^ set(other)) or list(self)
            raise ValueError(f"statistics of different sites cannot be added; they differ in {', '.join(different)}")
        return Statistics({name: site + other[name] for name, site in self.items()}, (*self.notes, *other.notes))

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as tensors and plain values.

        Returns:
            A dict. `SITE/counts` and, if there are any, `SITE/batch_entropies` and `SITE/neuron_batches` hold the tensors of
            the site with the name SITE.
            `sites` is a list of dicts in call order, with the name and the other values of each site. `notes` is the list of
            the notes, if there are any.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> statistics = fe.Statistics({"relu": fe.SiteStatistics("relu", torch.tensor([[2, 0, 2]]))})
            >>> sorted(statistics.state_dict())
            ['relu/counts', 'sites']
        """
        tensors = {f"{name}/counts": site.counts for name, site in self.items()}
        for name, site in self.items():
            for key in ("batch_entropies", "neuron_batches"):
                if (tensor := getattr(site, key)) is not None:
                    tensors[f"{name}/{key}"] = tensor
        sites = [{"name": name, **{key: getattr(site, key) for key in _VALUES}} for name, site in self.items()]
        return {"sites": sites, **({"notes": list(self.notes)} if self.notes else {}), **tensors}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Statistics:
        """Return the statistics that a state holds.

        Args:
            state: a state that `Statistics.state_dict` or `EntropyCollector.state_dict` returned.

        Returns:
            The statistics in the state.

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
            sites, notes = state["sites"], [str(note) for note in state.get("notes", ())]
            return cls({site["name"]: site_from_state_dict(site, state) for site in sites}, notes)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of statistics (make one with stats.state_dict()): {reason(error)}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the statistics to a safetensors file. An existing file is replaced only when the new one is complete.

        Args:
            path: the path of the file.

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
        tensors, metadata = file_content(self)
        save_tensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read a file that `save` wrote.

        Args:
            path: the path of the file.

        Returns:
            The statistics in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or it was not written by `save`.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                state = {"sites": json.loads(metadata[_SITES]), "notes": json.loads(metadata.get(_NOTES, "[]"))}
                return cls.from_state_dict({**state, **{key: file.get_tensor(key) for key in file.keys()}})  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a statistics file (write one with stats.save(path)): {reason(error)}"
            ) from error


def file_content(statistics: Statistics) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file from which `Statistics.load` reads the statistics."""
    tensors = statistics.state_dict()
    metadata = {_SITES: json.dumps(tensors.pop("sites"))}
    if notes := tensors.pop("notes", None):
        metadata[_NOTES] = json.dumps(notes)
    return tensors, metadata


def _figures(site: SiteStatistics, entropy: float) -> dict[str, Any]:
    """Return the row of `to_dict` for a site with the given layer entropy in bits."""
    observed, observations = int(site.observed.sum()), site.observations
    neurons = [int(site.dead.sum()) / max(observed, 1), int(site.always_on.sum()) / max(observed, 1)]
    states = [count / max(observations, 1) for count in site.counts.sum(0).tolist()]
    figures = (site.activation, site.neurons, observations, site.nan, entropy, *neurons, *states)
    return dict(zip(_FIGURES, figures, strict=True))


def check_statistics(statistics: object) -> None:
    """Raise TypeError if an argument of a user is no `Statistics`."""
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"statistics: got {described(statistics)}, expected Statistics: fe.Statistics.load(path) or collector.compute()"
        )
