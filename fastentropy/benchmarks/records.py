"""Records of `fastentropy bench`: the measurements, the machine and the command of a run, stored as JSON."""

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
        benchmark: the name of the benchmark: "kernels", "collect" or "fuse".
        machine: the name of the GPU, or the name of the processor and the number of threads.
        date: the day of the run, as YYYY-MM-DD.
        versions: the versions of "torch" and, if it is installed, "triton".
        commit: the commit of the sources, with a "+" if the sources differ from it. None outside of a git clone.
        command: the command line of the run.
        measurements: the measurements of all finished cases. A case is a group of operations that are timed side by side.
        complete: whether all cases of the run are finished.
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
        """Return a record without measurements, with today's date and a description of this machine.

        Args:
            benchmark: the name of the benchmark.
            device: the device that is measured, such as "cpu" or "cuda:0".
            command: the command line of the run.
        """
        machine = describe_machine(device)
        versions = {"torch": machine["torch"], **_triton_version()}
        return cls(benchmark, machine["device"], machine["date"], versions, source_commit(), command)

    def with_more(self, measurements: list[Measurement]) -> Record:
        """Return a copy of the record with further measurements appended."""
        return dataclasses.replace(self, measurements=(*self.measurements, *measurements))

    def cases(self) -> dict[str, list[Measurement]]:
        """Return the measurements by the name of their case, in the order in which they were made."""
        cases: dict[str, list[Measurement]] = {}
        for measurement in self.measurements:
            cases.setdefault(measurement.case, []).append(measurement)
        return cases

    def to_dict(self) -> dict[str, Any]:
        """Return the record as a dict of JSON types."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "measurements": [measurement.to_dict() for measurement in self.measurements]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a JSON file. An existing file is replaced."""
        save_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read and check a file that `save` wrote.

        Args:
            path: the file.

        Returns:
            The record.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is damaged, or is not a record.
        """
        try:
            values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            record = cls(**{**values, "measurements": tuple(map(Measurement.from_dict, values["measurements"]))})
            record._check()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged or no record of `fastentropy bench`; name a file that its --record wrote"
            ) from error
        return record

    def _check(self) -> None:
        """Raise TypeError if a field that tables and plots show is not text."""
        texts = [self.benchmark, self.machine, self.date, self.command, self.versions["torch"]]
        texts += [text for each in self.measurements for text in (each.case, each.operation)]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("expected texts")


def _triton_version() -> dict[str, str]:
    """Return the version of Triton as `{"triton": version}`, or an empty dict if Triton is not installed."""
    try:
        import triton
    except ImportError:
        return {}
    return {"triton": triton.__version__}
