"""A case is what is measured side by side; a measurement is what came of one operation of it."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastentropy._utils.timing import measure_samples

#: Short operations are repeated until a sample takes so long.
SAMPLE_SECONDS = 0.005


class Quartiles(NamedTuple):
    """The median of samples, and the quartiles around it, which show the noise."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quartiles:
        """The quartiles of two samples or more."""
        return cls(*statistics.quantiles(samples, method="inclusive"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quartiles:
        """The quartiles of a record. Raises TypeError or ValueError for what are none of times."""
        quartiles = cls(**values)
        if not 0 < quartiles.lower <= quartiles.median <= quartiles.upper < math.inf:
            raise ValueError(f"{values} are no quartiles of times")
        return quartiles

    def apart_from(self, other: Quartiles) -> bool:
        """Whether the middle halves of the two have nothing in common."""
        return self.lower > other.upper or other.lower > self.upper


@dataclasses.dataclass(frozen=True)
class Case:
    """Operations by name, of which `baseline` is what the others are set against.

    sizes: bytes that an operation has to move at least, for those where that is the bound. roof: the operation whose bandwidth
    is the most there is. facts: what else is known, for the record. graphs_on: the GPU on which they run as CUDA graphs.
    peers: operations of others, which may not run here.
    """

    name: str
    operations: Mapping[str, Callable[[], object]]
    baseline: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    roof: str | None = None
    facts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    graphs_on: torch.device | None = None
    peers: frozenset[str] = frozenset()


def name_case(what: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """What a case is called: resnet18, 16 × 3 × 224 × 224, float32."""
    return f"{what}, {' × '.join(map(str, shape))}, {name_dtype(dtype)}"


def name_dtype(dtype: torch.dtype) -> str:
    """Its name without the module."""
    return str(dtype).removeprefix("torch.")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One operation of one case.

    ratio is that of its time to the baseline's in the same round. bytes (moved at least), gigabytes_per_second and
    percent_of_roof (of the bandwidth that the roof reached in the same rounds) are None where memory is not what is measured.
    That percentage may exceed 100 where reading alone is faster than copying, in caches, and in CUDA graphs, where a large copy
    is not always as fast as a kernel. skipped says why there are no figures.
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
        """The measurement in the types of JSON, without what is not there."""
        values = dataclasses.asdict(self)
        for name in ("milliseconds", "ratio"):
            quartiles = getattr(self, name)
            values[name] = quartiles and quartiles._asdict()
        return {name: value for name, value in values.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """The measurement that `to_dict` gave. Raises TypeError or ValueError for what it did not give."""
        quartiles = {name: Quartiles.from_dict(values[name]) for name in ("milliseconds", "ratio") if name in values}
        return cls(**{**values, **quartiles})


def measure(case: Case, *, rounds: int, budget_seconds: float) -> list[Measurement]:
    """Measure the operations of a case in turns; see `timing.measure_samples` for rounds and budget.

    A peer that raises is skipped, with a line of what it said. Calls before the first round, such as the pass in which a
    collector finds the sites, are not in the figures.
    """
    operations, skipped = dict(case.operations), []
    for name in [name for name in operations if name in case.peers]:
        if reason := why_not(operations[name]):
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


def why_not(peer: Callable[[], object]) -> str | None:
    """Call a peer; what it raised, in one line, or None."""
    try:
        peer()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        # PyTorch's compiler begins with a line such as: backend='inductor' raised:
        return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)
    return None


def _measurement(case: Case, name: str, samples: Mapping[str, Sequence[float]]) -> Measurement:
    times, size = Quartiles.of(samples[name]), case.sizes.get(name)
    return Measurement(
        case.name,
        name,
        milliseconds=times,
        ratio=Quartiles.of([one / other for one, other in zip(samples[name], samples[case.baseline], strict=True)]),
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
