"""The options of `prune`, and their checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from fastentropy.collector.site_statistics import Average, Zero
from fastentropy.fusion.latency import LatencyTable
from fastentropy.pruning.criteria import CRITERIA, Criterion

#: What is removed in each step: whole activations, or the activation of single neurons.
Granularity: TypeAlias = Literal["layer", "neuron"]


#: The default of `max_drop`, also on the command line.
MAX_DROP = 0.01


@dataclass(frozen=True)
class Options:
    """The options that determine the outcome of a run, together with the model and the user's functions.

    They have the names and the meaning of the arguments of `prune`.
    """

    max_drop: float
    max_removed: int | None
    per_step: int
    criterion: Criterion
    zeros_together: bool
    protect: tuple[str, ...]
    target_speedup: float | None
    max_latency_ms: float | None
    collapse: str | None
    zero: Zero
    average: Average
    granularity: Granularity

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range."""
        if not self.max_drop >= 0:
            raise ValueError(f"max_drop is {self.max_drop}; expected 0 or more, in the units of evaluate")
        if self.max_removed is not None and self.max_removed < 0:
            raise ValueError(f"max_removed is {self.max_removed}; expected 0 or more, or None for no limit")
        if not isinstance(self.per_step, int) or self.per_step < 1:
            raise ValueError(f"per_step is {self.per_step}; expected a whole number, 1 or more")
        if self.criterion not in CRITERIA and not callable(self.criterion):
            raise ValueError(f"criterion is {self.criterion!r}; expected one of {', '.join(CRITERIA)}, or a function")
        if self.collapse not in (None, "project"):
            raise ValueError(f"collapse is {self.collapse!r}; expected 'project' or None")
        kinds = {"zero": Zero, "average": Average, "granularity": Granularity}
        for name, known in ((name, get_args(kind)) for name, kind in kinds.items()):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        budgets = {"target_speedup": self.target_speedup, "max_latency_ms": self.max_latency_ms}
        given = {name: value for name, value in budgets.items() if value is not None}
        for name, value in given.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a number above 0")
        if given and (self.criterion != "entropy-per-latency" or len(given) > 1):
            raise ValueError(f"{' and '.join(given)}: give one of them, with criterion='entropy-per-latency'")

        if self.granularity == "neuron":
            self._check_neurons()

    def _check_neurons(self) -> None:
        """Raise ValueError if options are given that choose whole activations."""
        if self.criterion not in ("entropy", "random"):
            raise ValueError("granularity='neuron' chooses neurons by criterion='entropy' or 'random'; give one of the two")
        whole = {"max_removed": self.max_removed is not None, "zeros_together": self.zeros_together, "collapse": self.collapse}
        if given := [name for name, value in whole.items() if value]:
            raise ValueError(f"{' and '.join(given)}: for whole activations only; leave it out with granularity='neuron'")
        if self.per_step > 100:
            raise ValueError(f"per_step is {self.per_step}; with granularity='neuron' expected a percentage from 1 to 100")

    @property
    def needs_latency(self) -> bool:
        """Return whether the latency of the network must be measured before the first step."""
        return self.criterion == "entropy-per-latency" or self.collapse is not None

    def most_removed(self, sites: Sequence[str]) -> int:
        """Return how many of these sites may be removed at most, or 0 if single neurons are removed."""
        if self.granularity == "neuron":
            return 0
        left = sum(name not in self.protect for name in sites)
        return left if self.max_removed is None else min(left, self.max_removed)

    def budget(self, table: LatencyTable) -> float | None:
        """Return how many milliseconds one call may take, or None if there is no limit.

        Args:
            table: the measured latencies of the dense network.
        """
        return self.max_latency_ms if self.target_speedup is None else table.original / self.target_speedup

    def to_dict(self) -> dict[str, Any]:
        """Return the options by name, as values of JSON types.

        If the criterion is a function, its name stands for it.
        """
        name = getattr(self.criterion, "__qualname__", type(self.criterion).__qualname__)
        criterion = self.criterion if isinstance(self.criterion, str) else name
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "criterion": criterion, "protect": sorted(self.protect)}
