"""What `fuse` tried, measured and chose, as text and as JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from fastentropy._utils.text import plural


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form of a chain, and what one call on the example inputs costs.

    Attributes:
        milliseconds: the median time of the call; None if nothing was measured.
        operators: the number of operators that run.
        multiplications: the number of multiplications, counted for the whole batch.
        bytes: the number of bytes read and written, counted for the whole batch.
        relative_error: the largest difference from the chain run in float64, divided by the chain's largest absolute value.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)).eval()
        >>> (chain,) = fe.fuse(model, (torch.randn(4, 8),), measure=False).report.chains
        >>> {name: (each.operators, each.multiplications) for name, each in chain.candidates.items()}
        {'keep': (2, 2048), 'merge': (1, 256)}
    """

    milliseconds: float | None
    operators: int
    multiplications: int
    bytes: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ChainReport:
    """What was tried for one chain, and what was chosen.

    Attributes:
        names: the paths of the chain's modules, in call order.
        candidates: the forms by name: `keep`, `merge`, `split`, `reorder`, `kernel` and `masked`, as far as they exist.
        choice: the name of the chosen form.
        note: why another form was not possible; empty if there is nothing to say.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> layers = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)
        >>> (chain,) = fe.fuse(torch.nn.Sequential(*layers).eval(), (torch.randn(4, 8),), measure=False).report.chains
        >>> chain.names, chain.choice, chain.note
        (('0', '1'), 'merge', '')
    """

    names: tuple[str, ...]
    candidates: dict[str, Candidate]
    choice: str
    note: str = ""

    def __str__(self) -> str:
        """Return the names on one line, then a line for each candidate."""
        lines = [
            f"  {'*' if name == self.choice else ' '} {name:<7} {_milliseconds(candidate.milliseconds):>12}"
            f"{plural(candidate.operators, 'operator'):>14}{candidate.multiplications / 1e6:>10.2f} M multiplications"
            f"{candidate.bytes / 1e6:>9.2f} MB   error {candidate.relative_error:.0e}"
            for name, candidate in self.candidates.items()
        ]
        title = self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"
        note = textwrap.wrap(self.note, 100, initial_indent="    ", subsequent_indent="    ")
        return "\n".join([title, *lines, *note])


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `fuse` tried, measured and chose; it prints as a table.

    Attributes:
        chains: the report on each chain.
        milliseconds: the median time of one call on the example inputs, measured side by side, of the model as given
            (`original`), with batch norm folded only (`folded`) and with every chain in its chosen form (`fused`); empty if
            nothing was measured.
        memory_formats: the fastest memory format of each of these three: `contiguous` or `channels_last`.
        choice: which of the three was kept.
        max_relative_error: the largest error of the kept one on any of the inputs that it was compared on, relative to the
            largest absolute value of the output. An error above the tolerance is taken again relative to the model run in
            float64, if that runs.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)).eval()
        >>> report = fe.fuse(model, (torch.randn(4, 8),), measure=False).report
        >>> report.choice, len(report.chains), report.max_relative_error < 1e-5
        ('fused', 1, True)
        >>> fe.FusionReport.from_dict(report.to_dict()) == report
        True
    """

    chains: tuple[ChainReport, ...]
    milliseconds: dict[str, float]
    memory_formats: dict[str, str]
    choice: str
    max_relative_error: float

    @property
    def speedup(self) -> float | None:
        """Return the time of the original divided by that of the kept one; None if nothing was measured."""
        return self.milliseconds["original"] / self.milliseconds[self.choice] if self.milliseconds else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict of types that JSON has.

        Returns:
            The fields, those of chains and candidates included, and `speedup`.
        """
        return {**dataclasses.asdict(self), "speedup": self.speedup}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusionReport:
        """Return the report that `to_dict` turned into a dict.

        Args:
            values: what `to_dict` returned, or what JSON made of it.

        Returns:
            An equal report.

        Raises:
            KeyError: a field is missing.
            TypeError: a candidate has other fields.
        """
        chains = tuple(
            ChainReport(
                tuple(chain["names"]),
                {name: Candidate(**candidate) for name, candidate in chain["candidates"].items()},
                chain["choice"],
                chain["note"],
            )
            for chain in values["chains"]
        )
        names = ("milliseconds", "memory_formats", "choice", "max_relative_error")
        return cls(chains, *(values[name] for name in names))

    def __str__(self) -> str:
        """Return each chain with its candidates, then the times of the whole model and what was kept."""
        chains = [str(chain) for chain in self.chains]
        times = ", ".join(f"{name} {value:.3f} ms ({self.memory_formats[name]})" for name, value in self.milliseconds.items())
        gain = f", {self.speedup:.2f}× as fast as the original" if self.speedup else ""
        kept = f"kept: {self.choice}{gain}, relative error {self.max_relative_error:.0e}"
        slower = "\nthe fused form is not used: it was slower or not verified" if self.choice != "fused" else ""
        return "\n".join([*chains, f"model: {times or 'not measured'}", kept + slower])


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"
