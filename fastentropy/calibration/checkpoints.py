"""Checkpoints: one file with the counts and the position in the data, from which a killed run continues.

The data is read in chunks, numbered pieces of the corpus. A checkpoint holds the number of the next chunk.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastentropy._utils.files import save_tensors
from fastentropy.calibration.data.batching import Batch
from fastentropy.calibration.data.documents import Problem, Problems
from fastentropy.collector.statistics import Statistics, file_content

#: The key in the file's metadata under which everything but the statistics is stored, as JSON.
_KEY = "fastentropy_calibration"


@dataclass
class Tally:
    """The totals of a run, or of one rank's part of it.

    Attributes:
        batches: the batches that the model has run on.
        tokens: the tokens in these batches without padding; for a corpus of images, the images.
        documents: the documents (texts or images) that begin in these batches.
        truncated: how many of the documents were truncated.
        tokens_cut: how many tokens were removed by truncation.
        problems: what was wrong with files and documents, one entry per file and kind of problem.
    """

    batches: int = 0
    tokens: int = 0
    documents: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Add the numbers of a batch to the totals."""
        self.batches += 1
        self.tokens += batch.tokens
        self.documents += batch.documents
        self.truncated += batch.truncated
        self.tokens_cut += batch.tokens_cut

    def add_problems(self, problems: Problems) -> None:
        """Add the problems that occurred while a chunk was read."""
        self.problems = list(Problems([*self.problems, *problems]))

    def __add__(self, other: "Tally") -> "Tally":
        """Return the sum of both totals.

        Problems are sorted by path, because the order in which they occur depends on the number of ranks.
        """
        numbers = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "problems"}
        return Tally(**numbers, problems=sorted(Problems([*self.problems, *other.problems])))


@dataclass(frozen=True)
class Checkpoint:
    """The state of a calibration between two chunks.

    Attributes:
        settings: the settings that determine the counts, by name. A checkpoint cannot be continued with other settings.
        statistics: how often each neuron was in each state, in all chunks before `chunk`, summed over ranks.
        tally: how many batches, documents and tokens these chunks held, summed over ranks.
        chunk: the number of the next chunk to read. It has no meaning once the run is at its end.
        seconds: the time spent on the run so far, including the parts before interruptions.
    """

    settings: dict[str, Any]
    statistics: Statistics
    tally: Tally
    chunk: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write a safetensors file atomically. `Statistics.load` can read the statistics from it."""
        tensors, metadata = file_content(self.statistics)
        rest = {"settings": self.settings, "tally": asdict(self.tally), "chunk": self.chunk, "seconds": self.seconds}
        save_tensors(tensors, path, {**metadata, _KEY: json.dumps(rest)})

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read a checkpoint from a file that `save` wrote.

        Raises:
            ValueError: the file is damaged, or it is not a checkpoint.
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
