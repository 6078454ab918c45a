"""Report what `fuse` tried, measured and chose, as text and as JSON.

A chain is a stretch of linear operators. A form is one way to compute a chain or the whole network.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from fastentropy._utils.text import plural


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form of a chain, and the cost of one call of it on the example inputs.

    Attributes:
        milliseconds: the median time of the call, or None if nothing was measured.
        operators: the number of operators in the form.
        multiplications: the number of multiplications for the whole batch, counted from the shapes.
        bytes: the number of bytes read and written for the whole batch, counted from the shapes.
        relative_error: the largest absolute difference between the outputs of the form and those of the chain run in float64,
            divided by the largest absolute value of the latter. With `borders="train"` the form itself is run in float64.

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
    """The forms that were tried for one chain, and the form that was chosen.

    Attributes:
        names: the paths of the chain's convolutions and linear layers, in call order.
        candidates: the forms by name. `keep` has batch norm folded, `merge` is one operator, `split` merges stretches of the
            chain, `reorder` is a split after average pooling was moved forward, `kernel` runs pairs of operators in one
            kernel, and `masked` is one operator whose bias depends on the padding it reads. Only the forms that the chain
            allows are there.
        choice: the name of the chosen form.
        note: the reason why a form was not possible or not chosen, or "".
        ended_by: the operator behind the end of the chain and the path of its module, such as "aten.relu in features.0.2", or
            "" if the chain ends with an output of the model.

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
    ended_by: str = ""

    def __str__(self) -> str:
        """Return a line with the first and last name, a line for each candidate, what ended it, and the note."""
        lines = [
            f"  {'*' if name == self.choice else ' '} {name:<7} {_milliseconds(candidate.milliseconds):>12}"
            f"{plural(candidate.operators, 'operator'):>14}{candidate.multiplications / 1e6:>10.2f} M multiplications"
            f"{candidate.bytes / 1e6:>9.2f} MB   error {candidate.relative_error:.0e}"
            for name, candidate in self.candidates.items()
        ]
        title = self.names[0] if len(self.names) == 1 else f"{self.names[0]} … {self.names[-1]}"
        notes = [f"ended by {self.ended_by}"] * bool(self.ended_by) + [self.note]
        wrapped = [line for note in notes for line in textwrap.wrap(note, 100, initial_indent="    ", subsequent_indent="    ")]
        return "\n".join([title, *lines, *wrapped])


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """The forms of a network that `fuse` tried, their times, and the form that was chosen. It prints as a table.

    Attributes:
        chains: the report on each chain.
        milliseconds: the median time of one call on the example inputs, by form: `original` (the model as given, in eager
            mode), `folded` (only batch norm folded) and `fused` (every chain in its chosen form), both in `backend`. What is
            timed is the module that is returned. All are measured side by side. Empty if nothing was measured; without a form
            that the backend cannot run.
        memory_formats: the fastest memory format of each of the three forms: `contiguous` or `channels_last`.
        choice: the form that `fuse` returned: `original`, `folded` or `fused`.
        max_relative_error: the largest absolute difference between an output of this form and that of the model, on all
            inputs on which the two were compared, divided by the largest absolute value of the output. If it is above the
            tolerance, the model is also run in float64, and the smaller of the two errors counts.
        backend: what runs the returned form: `eager`, `inductor` or `onnxruntime`.
        times: the milliseconds of each form in each backend that was measured. `original` in `inductor` is the model compiled
            by torch.compile with frozen weights.
        notes: which backend could not run the network or a form of it, and why; why nothing was fused.
        bound: the bound that the error was held to, as text: the tolerance, or 10 times the error that the model itself has
            against float64, where that is larger.
        neurons: for the path of each `NeuronwiseActivation`, how many of its neurons are `active`, `linear` and `constant`, and
            how many of all are `cut` out in the folded and the fused form, and how many linear ones are `split` off there: they
            have a path of their own, without the activation. Empty if the model has none.
        multiplications: those of all convolutions and linear layers `before` and `after` neurons were cut out, with every chain
            as it is. They are those of a call on the example inputs, or on two samples if these are a batch of one. Empty if
            `neurons` is.

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
    backend: str = "eager"
    times: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bound: str = ""
    neurons: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    multiplications: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        """Return the time of the original divided by the time of the chosen form, or None if nothing was measured."""
        times = self._by_backend()
        return times["eager"]["original"] / times[self.backend][self.choice] if times else None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that can be written as JSON.

        Returns:
            The fields by name, and `speedup`. Chains and candidates are dicts too.
        """
        return {**dataclasses.asdict(self), "speedup": self.speedup}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusionReport:
        """Make a report from the dict that `to_dict` returned.

        Args:
            values: the dict, which may have been written to JSON and read back.

        Returns:
            A report equal to the original one.

        Raises:
            KeyError: a field is missing.
            TypeError: a candidate has a missing or an unknown field.
        """
        chains = tuple(
            ChainReport(
                tuple(chain["names"]),
                {name: Candidate(**candidate) for name, candidate in chain["candidates"].items()},
                chain["choice"],
                chain["note"],
                chain.get("ended_by", ""),
            )
            for chain in values["chains"]
        )
        names = ("milliseconds", "memory_formats", "choice", "max_relative_error")
        further = {
            "backend": values["backend"],
            "times": values["times"],
            "notes": tuple(values["notes"]),
            "bound": values.get("bound", ""),
            "neurons": values.get("neurons", {}),
            "multiplications": values.get("multiplications", {}),
        }
        return cls(chains, *(values[name] for name in names), **further)

    def __str__(self) -> str:
        """Return each chain with its candidates, the neurons cut out, the times of the whole model, and the chosen form."""
        gain = f", {self.speedup:.2f}× as fast as the original" if self.speedup else ""
        backend = "" if self.backend == "eager" else f" in {self.backend}"
        kept = f"kept: {self.choice}{backend}{gain}, relative error {self.max_relative_error:.0e}"
        kept += f", within {self.bound}" if self.bound else ""
        has_another = self.choice != "fused" and any(chain.choice != "keep" for chain in self.chains)
        slower = ["the fused form is not used: it was slower or not verified"] * has_another
        return "\n".join([*map(str, self.chains), *self._neurons(), *self._times(), kept, *slower, *self.notes])

    def _times(self) -> list[str]:
        """Return a line with the times of the whole model for each backend that was measured."""
        lines = []
        for backend, times in self._by_backend().items():
            formats = self.memory_formats if backend == "eager" else {}
            each = [f"{name} {ms:.3f} ms{f' ({formats[name]})' if formats else ''}" for name, ms in times.items()]
            lines.append(f"model{'' if backend == 'eager' else f' in {backend}'}: {', '.join(each)}")
        return lines or ["model: not measured"]

    def _neurons(self) -> list[str]:
        """Return a line with the numbers of neurons that are cut out and split off, and of the multiplications left."""
        cut, split = (sum(states[name] for states in self.neurons.values()) for name in ("cut", "split"))
        if not cut and not split:
            return []
        before, after = (self.multiplications[name] / 1e6 for name in ("before", "after"))
        left = f"{after:.2f} of {before:.2f} M multiplications left"
        return [f"{plural(cut, 'neuron')} cut out, {split} linear on paths of their own: {left}"]

    def _by_backend(self) -> dict[str, dict[str, float]]:
        """Return the milliseconds of each form by backend: those of `backend` alone if `times` was not given."""
        return self.times or ({self.backend: self.milliseconds} if self.milliseconds else {})


def _milliseconds(value: float | None) -> str:
    """Return a time as text, or "-" for None."""
    return "-" if value is None else f"{value:.3f} ms"
