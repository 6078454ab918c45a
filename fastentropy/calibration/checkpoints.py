"""Checkpoints: one file with the counts and the position in the data, from which a killed run continues."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastentropy._utils.files import save_tensors
from fastentropy.calibration.data.batching import Batch
from fastentropy.calibration.data.documents import Problem, Problems
from fastentropy.collector.statistics import Statistics

_KEY = "fastentropy_calibration"


@dataclass
class Tally:
    """The totals of a run: batches, tokens (or images), documents, truncated documents, tokens cut off, and problems."""

    batches: int = 0
    tokens: int = 0
    documents: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        self.batches += 1
        self.tokens += batch.tokens
        self.documents += batch.documents
        self.truncated += batch.truncated
        self.tokens_cut += batch.tokens_cut

    def add_problems(self, problems: Problems) -> None:
        """Add the problems of a chunk."""
        self.problems = list(Problems([*self.problems, *problems]))

    def __add__(self, other: "Tally") -> "Tally":
        """Return the sum. Problems are sorted by path, because the order in which they occur depends on the number of ranks."""
        numbers = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "problems"}
        return Tally(**numbers, problems=sorted(Problems([*self.problems, *other.problems])))


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run.

    Attributes:
        settings: the settings that determine the counts. A run with other settings is another run.
        statistics: the counts of all chunks before `chunk`, and of no others.
        tally: the totals of these chunks.
        chunk: the number of the next chunk to read.
        seconds: the time spent on the run so far.
    """

    settings: dict[str, Any]
    statistics: Statistics
    tally: Tally
    chunk: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write a safetensors file, either completely or not at all. `Statistics.load` can read it too."""
        tensors = self.statistics.state_dict()
        sites = json.dumps(tensors.pop("sites"))
        rest = {"settings": self.settings, "tally": asdict(self.tally), "chunk": self.chunk, "seconds": self.seconds}
        save_tensors(tensors, path, {"fastentropy_sites": sites, _KEY: json.dumps(rest)})

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is damaged or something else.
        """
        try:
            statistics = Statistics.load(path)
            with safe_open(path, framework="pt") as file:
                rest = json.loads((file.metadata() or {})[_KEY])
            tally = Tally(**rest["tally"])
            tally = replace(tally, problems=[Problem(*problem) for problem in tally.problems])
            return cls(rest["settings"], statistics, tally, int(rest["chunk"]), float(rest["seconds"]))
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a checkpoint of fastentropy calibrate; start again with another --output"
            ) from error
