"""What was counted and how far the data was read, in one file, so that a run that is killed goes on from there."""

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
    """What was run: numbers of batches, tokens (images for images), documents, and what was cut off or met as a problem."""

    batches: int = 0
    tokens: int = 0
    documents: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        self.batches += 1
        self.tokens += batch.tokens
        self.documents += batch.documents
        self.truncated += batch.truncated
        self.tokens_cut += batch.tokens_cut

    def met(self, problems: Problems) -> None:
        """Add what was met in a chunk."""
        self.problems = list(Problems([*self.problems, *problems]))

    def __add__(self, other: "Tally") -> "Tally":
        """Both together. Problems are in the order of paths: that in which they were met depends on the number of ranks."""
        numbers = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "problems"}
        return Tally(**numbers, problems=sorted(Problems([*self.problems, *other.problems])))


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run: chunks before `chunk` are counted, and no others.

    settings: what decides the counts; a run with others is another run. seconds: spent on it so far.
    """

    settings: dict[str, Any]
    statistics: Statistics
    tally: Tally
    chunk: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write a safetensors file, which `Statistics.load` reads as well; complete or not at all."""
        tensors = self.statistics.state_dict()
        sites = json.dumps(tensors.pop("sites"))
        rest = {"settings": self.settings, "tally": asdict(self.tally), "chunk": self.chunk, "seconds": self.seconds}
        save_tensors(tensors, path, {"fastentropy_sites": sites, _KEY: json.dumps(rest)})

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a file that `save` wrote. Raises ValueError where it is damaged or something else."""
        try:
            statistics = Statistics.load(path)
            with safe_open(path, framework="pt") as file:
                rest = json.loads((file.metadata() or {})[_KEY])
            tally = Tally(**rest["tally"])
            tally = replace(tally, problems=[Problem(*problem) for problem in tally.problems])
            return cls(rest["settings"], statistics, tally, int(rest["chunk"]), float(rest["seconds"]))
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a checkpoint of fastentropy calibrate; begin anew with another --output"
            ) from error
