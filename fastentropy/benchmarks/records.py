"""Records: the measurements of a run, the machine and the command, written as JSON and checked when read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastentropy._utils.files import save_json
from fastentropy._utils.machine import describe_machine, source_commit
from fastentropy.benchmarks.measurements import Measurement


@dataclasses.dataclass(frozen=True)
class Record:
    """The measurements of one run of `fastentropy bench`.

    Attributes:
        benchmark: kernels, collect or fuse.
        machine: the name of the processor with its threads, or of the GPU.
        date: the day of the run, as YYYY-MM-DD.
        versions: versions of torch and, where it is installed, triton.
        commit: the commit of the sources; None outside a clone.
        command: the command line of the run.
        measurements: the measurements of all finished cases.
        complete: whether all cases are finished.
    """

    benchmark: str
    machine: str
    date: str
    versions: Mapping[str, str]
    commit: str | None
    command: str
    measurements: tuple[Measurement, ...] = ()
    complete: bool = False

    @classmethod
    def begin(cls, benchmark: str, device: str, command: str) -> Record:
        """Return a record of this machine without measurements."""
        machine = describe_machine(device)
        versions = {"torch": machine["torch"], **_triton_version()}
        return cls(benchmark, machine["device"], machine["date"], versions, source_commit(), command)

    def with_more(self, measurements: list[Measurement]) -> Record:
        """Return the record with further measurements."""
        return dataclasses.replace(self, measurements=(*self.measurements, *measurements))

    def cases(self) -> dict[str, list[Measurement]]:
        """Return the measurements by case, in the order in which they were made."""
        cases: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            cases.setdefault(measurement.case, []).append(measurement)
        return cases

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON, replacing an older file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        save_json({**values, "measurements": [measurement.to_dict() for measurement in self.measurements]}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a file of `save`. Raises ValueError for anything else, and OSError for a missing file."""
        try:
            values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            record = cls(**{**values, "measurements": tuple(map(Measurement.from_dict, values["measurements"]))})
            record._check()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged or no record of `fastentropy bench`; name a file that its --json wrote"
            ) from error
        return record

    def _check(self) -> None:
        """Raise TypeError if a field that tables and plots show is not text."""
        texts = [self.benchmark, self.machine, self.date, self.command, self.versions["torch"]]
        texts += [text for each in self.measurements for text in (each.case, each.operation)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("expected texts")


def _triton_version() -> dict[str, str]:
    """Return the version of Triton, which some systems lack."""
    try:
        import triton
    except ImportError:
        return {}
    return {"triton": triton.__version__}
