"""A record: what was measured, on what, and by which command. Written as JSON, read back checked."""

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

    benchmark is kernels, collect or fuse; commit is that of the sources, None outside of a clone. complete is False while
    measurements are missing.
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
        """A record of this machine without measurements."""
        machine = describe_machine(device)
        versions = {"torch": machine["torch"], **_triton_version()}
        return cls(benchmark, machine["device"], machine["date"], versions, source_commit(), command)

    def with_more(self, measurements: list[Measurement]) -> Record:
        """The record with further measurements."""
        return dataclasses.replace(self, measurements=(*self.measurements, *measurements))

    def cases(self) -> dict[str, list[Measurement]]:
        """The measurements by case, in the order in which they were made."""
        cases: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            cases.setdefault(measurement.case, []).append(measurement)
        return cases

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON, in place of what was there."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        save_json({**values, "measurements": [measurement.to_dict() for measurement in self.measurements]}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read what `save` wrote. Raises ValueError for anything else, OSError where there is no file."""
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
        """Raise where what tables and plots show is not text."""
        texts = [self.benchmark, self.machine, self.date, self.command, self.versions["torch"]]
        texts += [text for each in self.measurements for text in (each.case, each.operation)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("expected texts")


def _triton_version() -> dict[str, str]:
    """It is not there on every system."""
    try:
        import triton
    except ImportError:
        return {}
    return {"triton": triton.__version__}
