"""Cases, which are groups of operations that are timed side by side, and the measurements of these operations."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastentropy._utils.timing import measure_samples

#: Seconds that a sample of a short operation takes about, because the operation is repeated within the sample.
SAMPLE_SECONDS = 0.005


class Quartiles(NamedTuple):
    """The lower quartile, the median and the upper quartile of some samples. The quartiles show the noise."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quartiles:
        """Return the quartiles of the samples, of which there must be at least two."""
        return cls(*statistics.quantiles(samples, method="inclusive"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quartiles:
        """Return the quartiles that are stored in a record.

        Args:
            values: "lower", "median" and "upper" as positive, finite numbers.

        Returns:
            The quartiles.

        Raises:
            TypeError: `values` has other keys, or a value is not a number.
            ValueError: the numbers are not positive, finite and in ascending order.
        """
        quartiles = cls(**values)
        if not 0 < quartiles.lower <= quartiles.median <= quartiles.upper < math.inf:
            raise ValueError(f"{values} are no quartiles of times")
        return quartiles

    def apart_from(self, other: Quartiles) -> bool:
        """Return whether the interquartile ranges of the two do not overlap."""
        return self.lower > other.upper or other.lower > self.upper


@dataclasses.dataclass(frozen=True)
class Case:
    """A group of operations that are timed side by side.

    Attributes:
        name: the name of the case in tables, plots and records.
        operations: the operations by name. Each is a function without arguments.
        denominator: the name of the operation to whose time the times of all operations are compared.
        sizes: the least number of bytes that an operation must read and write, by the name of the operation. It is empty if
            bandwidth is not of interest.
        roof: the name of the operation whose bandwidth counts as the highest possible, or None.
        facts: further facts about an operation, which are stored in the record, by the name of the operation.
        graphs_on: the GPU on which the operations run as CUDA graphs, or None for eager calls.
        baselines: the names of the operations that are not part of fastentropy, or need what may be missing. They are skipped
            if they raise.
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
    """Return the name of a case, such as "resnet18, 16 × 3 × 224 × 224, float32".

    Args:
        what: the name of the network or operation, such as "resnet18".
        shape: the shape of its input.
        dtype: the dtype of its input or weights.
    """
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
        milliseconds: the time of one call, or None if the operation was skipped.
        ratio: the time of the operation divided by the time of the case's denominator in the same round, or None if the
            operation was skipped.
        bytes: the least number of bytes that a call must read and write, or None if the case has no `sizes`.
        gigabytes_per_second: `bytes` divided by the median time, or None.
        percent_of_roof: the bandwidth as a percentage of that of the case's roof, or None. It may exceed 100: reading alone may
            be faster than copying, caches help, and in a CUDA graph a large copy is not always as fast as a kernel.
        facts: further facts, which are stored in the record.
        skipped: why the operation was skipped, in one line, or None if it was measured.
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
        """Return the fields as values that JSON can represent. Fields that are None or empty are left out."""
        values = dataclasses.asdict(self)
        for name in ("milliseconds", "ratio"):
            quartiles = getattr(self, name)
            values[name] = quartiles and quartiles._asdict()
        return {name: value for name, value in values.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        """Return the measurement from a dictionary.

        Args:
            values: a dictionary that `to_dict` returned.

        Returns:
            The measurement.

        Raises:
            TypeError: `values` has other keys, or a time is not a number.
            ValueError: the times are not positive, finite and in ascending order.
        """
        quartiles = {name: Quartiles.from_dict(values[name]) for name in ("milliseconds", "ratio") if name in values}
        return cls(**{**values, **quartiles})


def measure(case: Case, *, rounds: int, budget_seconds: float) -> list[Measurement]:
    """Measure the operations of a case in interleaved rounds, each of which takes one sample of every operation.

    A baseline that raises is skipped, and its measurement holds a line of the error message. Each operation is called twice
    before the first round. These calls are not part of the samples, because a first call does extra work: for example, a
    collector finds the sites (calls of activations) of its model.

    Args:
        case: the case.
        rounds: the number of rounds.
        budget_seconds: the time after which no further round begins, except the first `timing.MIN_ROUNDS`.

    Returns:
        The measurements in the order of the operations, and last those of the skipped baselines.
    """
    operations, skipped = dict(case.operations), []
    for name, operation in case.operations.items():
        if name not in case.baselines:
            operation()
        elif reason := skip_reason(operation):
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
    """Call a baseline to find out whether it runs.

    Args:
        baseline: the operation, a function without arguments.

    Returns:
        A line of the message of the error that it raised, or None if it raised none.
    """
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
