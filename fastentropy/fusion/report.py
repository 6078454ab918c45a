"""What fusion tried, measured and chose, for people and for JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form of a chain.

    milliseconds is for one call on the example inputs, multiplications for the whole batch; relative_error is the largest
    difference to the chain run in float64, over the chain's largest value.
    """

    milliseconds: float
    operators: int
    multiplications: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ChainReport:
    """What was tried for one chain (named by its operators), what was chosen, and why another form was not possible."""

    names: tuple[str, ...]
    candidates: dict[str, Candidate]
    choice: str
    note: str = ""

    def __str__(self) -> str:
        """The chain on a line, then a line for each candidate."""
        lines = [
            f"  {'*' if name == self.choice else ' '} {name:<6}{candidate.milliseconds:>9.3f} ms"
            f"{candidate.operators:>5} operators{candidate.multiplications / 1e6:>11.2f} M multiplications"
            f"   error {candidate.relative_error:.0e}"
            for name, candidate in self.candidates.items()
        ]
        title = self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"
        note = textwrap.wrap(self.note, 100, initial_indent="    ", subsequent_indent="    ")
        return "\n".join([title, *lines, *note])


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What `fuse` did.

    milliseconds holds the time of one call on the example inputs of the model as given (`original`), with only batch norm
    folded (`folded`) and with every chain in its fastest form (`fused`), measured side by side; `choice` names the one that
    was kept. max_relative_error is that of the kept one against the original over all inputs that it was compared on.
    """

    chains: tuple[ChainReport, ...]
    milliseconds: dict[str, float]
    choice: str
    max_relative_error: float

    @property
    def speedup(self) -> float:
        """How many times as fast as the model as given the kept one is."""
        return self.milliseconds["original"] / self.milliseconds[self.choice]

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
        return cls(chains, values["milliseconds"], values["choice"], values["max_relative_error"])

    def __str__(self) -> str:
        """Each chain with its candidates, and the times of the whole model."""
        chains = [str(chain) for chain in self.chains]
        times = ", ".join(f"{name} {value:.3f} ms" for name, value in self.milliseconds.items())
        kept = f"kept: {self.choice}, {self.speedup:.2f}× as fast as the original"
        return "\n".join([*chains, f"model: {times}", f"{kept}, relative error {self.max_relative_error:.0e}"])
