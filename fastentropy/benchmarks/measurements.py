"""Cases, whose operations are measured side by side, and the measurements of these operations."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastentropy._utils.timing import measure_samples

#: Seconds of a sample, for which a short operation is repeated.
SAMPLE_SECONDS = 0.005


class Quartiles(NamedTuple):
    """The median of samples, and the quartiles around it, which show the noise."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quartiles:
        """Return the quartiles of two samples or more."""
        return cls(*statistics.quantiles(samples, method="inclusive"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quartiles:
        """Return the quartiles of a record. Raises TypeError or ValueError for values that are no quartiles of times."""
        quartiles = cls(**values)
        if not 0 < quartiles.lower <= quartiles.median <= quartiles.upper < math.inf:
            raise ValueError(f"{values} are no quartiles of times")
        return quartiles

    def apart_from(self, other: Quartiles) -> bool:
        """Return whether the interquartile ranges do not overlap."""
        return self.lower > other.upper or other.lower > self.upper


@dataclasses.dataclass(frozen=True)
class Case:
    """Operations that are measured side by side.

    Attributes:
        name: what the case is called in tables, plots and records.
        operations: functions without arguments, by name.
        denominator: the operation whose time the ratios are relative to.
        sizes: the bytes that an operation must move at least, for operations that are bound by memory.
        roof: the operation that reaches the highest bandwidth.
        facts: further facts of operations, for the record.
        graphs_on: the GPU on which the operations run as CUDA graphs; None for eager calls.
        baselines: operations that are not ours, which are skipped where they do not run.
    """

    name: str
    operations: Mapping[str, Callable[[], object]]
    denominator: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    roof: str | None = None
    facts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    graphs_on: torch.device | None = None
    baselines: frozenset[str] = frozenset()


def name_case(what: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """Return the name of a case, such as "resnet18, 16 × 3 × 224 × 224, float32"."""
    return f"{what}, {' × '.join(map(str, shape))}, {name_dtype(dtype)}"


def name_dtype(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as "float32"."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The figures of one operation of one case.

    Attributes:
        case: the name of the case.
        operation: the name of the operation.
        milliseconds: the time of one call.
        ratio: its time relative to that of the case's denominator in the same round.
        bytes: the bytes that a call must move at least; None unless memory is measured, like the next two.
        gigabytes_per_second: the bandwidth at the median time.
        percent_of_roof: the bandwidth relative to that of the roof in the same rounds. It may exceed 100: reading alone may be
            faster than copying, caches help, and in a CUDA graph a large copy is not always as fast as a kernel.
        facts: further facts, for the record.
        skipped: why there are no figures.
    """

    case: str
    operation: str
    milliseconds: Quartiles | None = None
    ratio: Quartiles | None = None
    bytes: int | None = None
    gigabytes_per_second: float | None = None
    percent_of_roof: float | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as values of JSON, without what is missing."""
        values = dataclasses.asdict(self)
        for name in ("milliseconds", "ratio"):
            quartiles = getattr(self, name)
            values[name] = quartiles and quartiles._asdict()
        return {name: value for name, value in values.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Return the measurement of what `to_dict` returned. Raises TypeError or ValueError for anything else."""
        quartiles = {name: Quartiles.from_dict(values[name]) for name in ("milliseconds", "ratio") if name in values}
        return cls(**{**values, **quartiles})


def measure(case: Case, *, rounds: int, budget_seconds: float) -> list[Measurement]:
    """Measure the operations of a case in turns; see `timing.measure_samples` for rounds and budget.

    A baseline that raises is skipped, with a line of its message. Calls before the first round, such as the pass in which a
    collector finds the sites, do not count.
    """
    operations, skipped = dict(case.operations), []
    for name in [name for name in operations if name in case.baselines]:
        if reason := skip_reason(operations[name]):
            del operations[name]
            skipped.append(Measurement(case.name, name, facts=case.facts.get(name, {}), skipped=reason))
    samples = measure_samples(
        operations,
        rounds=rounds,
        round_seconds=SAMPLE_SECONDS,
        graphs_on=case.graphs_on,
        budget_seconds=budget_seconds,
    )
    return [_measurement(case, name, samples) for name in operations] + skipped


def skip_reason(baseline: Callable[[], object]) -> str | None:
    """Call a baseline. Return the message of what it raised in one line, or None."""
    try:
        baseline()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        # the message of PyTorch's compiler begins with a line such as: backend='inductor' raised:
        return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)
    return None


def _measurement(case: Case, name: str, samples: Mapping[str, Sequence[float]]) -> Measurement:
    times, size = Quartiles.of(samples[name]), case.sizes.get(name)
    return Measurement(
        case.name,
        name,
        milliseconds=times,
        ratio=Quartiles.of([one / other for one, other in zip(samples[name], samples[case.denominator], strict=True)]),
        bytes=size,
        gigabytes_per_second=size and _bandwidth(size, times),
        percent_of_roof=size and _percent_of_roof(case, samples, size, times),
        facts=case.facts.get(name, {}),
    )


def _bandwidth(size: int, times: Quartiles) -> float:
    return size / times.median / 1e6


def _percent_of_roof(case: Case, samples: Mapping[str, Sequence[float]], size: int, times: Quartiles) -> float | None:
    if case.roof is None:
        return None
    roof = _bandwidth(case.sizes[case.roof], Quartiles.of(samples[case.roof]))
    return 100 * _bandwidth(size, times) / roof
