"""What fusion tried, measured and chose, for people and for JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form of a chain, for one call on the example inputs.

    Attributes:
        milliseconds: None where nothing was measured.
        operators: how many operators run.
        multiplications: counted for the whole batch.
        bytes: read and written, counted for the whole batch.
        relative_error: the largest difference to the chain run in float64, over the chain's largest value.
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
        names: the paths of its operators.
        candidates: its forms by their names.
        choice: the name of the form that is used.
        note: why another form was not possible.
    """

    names: tuple[str, ...]
    candidates: dict[str, Candidate]
    choice: str
    note: str = ""

    def __str__(self) -> str:
        """The chain on a line, then a line for each candidate."""
        lines = [
            f"  {'*' if name == self.choice else ' '} {name:<7} {_milliseconds(candidate.milliseconds):>12}"
            f"{candidate.operators:>4} operators{candidate.multiplications / 1e6:>10.2f} M multiplications"
            f"{candidate.bytes / 1e6:>9.2f} MB   error {candidate.relative_error:.0e}"
            for name, candidate in self.candidates.items()
        ]
        title = self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"
        note = textwrap.wrap(self.note, 100, initial_indent="    ", subsequent_indent="    ")
        return "\n".join([title, *lines, *note])


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `fuse` did.

    Attributes:
        chains: what was tried for each.
        milliseconds: the time of one call on the example inputs of the model as given (`original`), with only batch norm folded
            (`folded`) and with every chain in its fastest form (`fused`), measured side by side; empty where nothing was
            measured.
        memory_formats: the memory format of each of the three in which it is fastest.
        choice: which of the three was kept.
        max_relative_error: that of the kept one over all inputs that it was compared on. Where it is above the tolerance
            against the model, the model in float64 is what it is compared with, if that runs.
    """

    chains: tuple[ChainReport, ...]
    milliseconds: dict[str, float]
    memory_formats: dict[str, str]
    choice: str
    max_relative_error: float

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the model as given the kept one is; None where nothing was measured."""
        return self.milliseconds["original"] / self.milliseconds[self.choice] if self.milliseconds else None

    def to_dict(self) -> dict[str, Any]:
        """The report in the types of JSON."""
        return {**dataclasses.asdict(self), "speedup": self.speedup}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusionReport:
        """The report that `to_dict` gave."""
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
        """Each chain with its candidates, and the times of the whole model."""
        chains = [str(chain) for chain in self.chains]
        times = ", ".join(f"{name} {value:.3f} ms ({self.memory_formats[name]})" for name, value in self.milliseconds.items())
        gain = f", {self.speedup:.2f}× as fast as the original" if self.speedup else ""
        kept = f"kept: {self.choice}{gain}, relative error {self.max_relative_error:.0e}"
        slower = "\nthe fused form was slower or not proven equal, and is not used" if self.choice != "fused" else ""
        return "\n".join([*chains, f"model: {times or 'not measured'}", kept + slower])


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"
