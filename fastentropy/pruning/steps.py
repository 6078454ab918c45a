"""The steps of a pruning run, and how they lie on disk: a folder each, `step.json` written last."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastentropy._utils.errors import one_line
from fastentropy._utils.files import remove_leftovers, save_json, save_tensors
from fastentropy.collector.statistics import Statistics
from fastentropy.fusion.latency import LatencyTable
from fastentropy.fusion.projection import Projection


@dataclass(frozen=True)
class Step:
    """One turn of the loop: what it linearised, and the network after its fine-tuning. Step 0 is the dense network.

    Attributes:
        removed: the names of the sites that were linearised.
        layer_entropy: bits by site, of the sites that are left, in call order.
        score: what `evaluate` returned.
        metrics: what `measure` returned.
        collapsed: the stretches that were approximated by one convolution before the fine-tuning.
    """

    removed: tuple[str, ...]
    layer_entropy: dict[str, float]
    score: float
    metrics: dict[str, float] = field(default_factory=dict)
    collapsed: tuple[Projection, ...] = ()


class StepFolder:
    """The options of a run, and in subfolders 00, 01, … the model, statistics and random state of each finished step.

    Everything is read with safetensors or as JSON; a damaged file raises ValueError and names itself.
    """

    def __init__(self, path: str | PathLike[str], options: Mapping[str, Any]) -> None:
        """Use a folder, which is made with the first step if it does not exist.

        Raises ValueError where it holds the steps of a run with other options: they might not be what these would give.
        """
        self.path, self._options = Path(path), dict(options)
        if (self.path / "options.json").exists():
            options = _load_json(self.path / "options.json")
            if options != self._options:
                raise ValueError(f"{self.path} holds a run with the options {options}, not {self._options}; name another")

    def save(self, index: int, step: Step, model: nn.Module, statistics: Statistics, random_state: dict[str, Tensor]) -> None:
        """Write a step. It counts as there once it is complete. Raises ValueError for a state that is not of tensors."""
        folder, state = self._folder(index), model.state_dict()
        if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"the model's state_dict holds {', '.join(others)}, which are no tensors and cannot be kept")
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self._options, self.path / "options.json")
        save_tensors(state, folder / "model.safetensors")
        save_tensors(random_state, folder / "random_state.safetensors")
        statistics.save(folder / "statistics.safetensors")
        values = asdict(step)
        del values["layer_entropy"]  # it follows from the statistics
        save_json(values, folder / "step.json")

    def save_latency(self, table: LatencyTable) -> None:
        """Write what was measured before the first step, so that a resumed run decides by the same times."""
        self.path.mkdir(parents=True, exist_ok=True)
        save_json(self._options, self.path / "options.json")
        save_json(table.to_dict(), self.path / "latency.json")

    def load_latency(self) -> LatencyTable | None:
        """The latency table of the run, if it has been written."""
        path = self.path / "latency.json"
        if not path.exists():
            return None
        try:
            return LatencyTable.from_dict(_load_json(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; without {self.path} the run begins anew") from error

    def load_statistics(self, index: int) -> Statistics:
        """The statistics of a step."""
        return Statistics.load(self._folder(index) / "statistics.safetensors")

    def load(self) -> list[Step]:
        """The finished steps. Removes what a run that was killed left of its temporary files."""
        for folder in (self.path, *self.path.glob("[0-9][0-9]*")):
            remove_leftovers(folder)
        steps: list[Step] = []
        while (self._folder(len(steps)) / "step.json").exists():
            steps.append(self._load_step(len(steps)))
        return steps

    def load_weights(self, index: int, model: nn.Module) -> None:
        """Put the weights of a step into a model that has its activations linearised already."""
        path = self._folder(index) / "model.safetensors"
        try:
            model.load_state_dict(_load_tensors(path))
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the model: {one_line(error)}") from error

    def restore_random_state(self, index: int) -> dict[str, Tensor]:
        """Put torch's random generators into their state at the end of a step, and return it, by device."""
        path = self._folder(index) / "random_state.safetensors"
        states = _load_tensors(path)
        try:
            set_random_state(states)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return states

    def _load_step(self, index: int) -> Step:
        folder = self._folder(index)
        entropies = self.load_statistics(index).layer_entropy()
        path = folder / "step.json"
        values = _load_json(path)
        try:
            metrics = {str(name): float(value) for name, value in values["metrics"].items()}
            collapsed = tuple(map(Projection.from_dict, values["collapsed"]))
            step = Step(tuple(map(str, values["removed"])), entropies, float(values["score"]), metrics, collapsed)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; without {folder} the run goes on before it") from error
        if not math.isfinite(step.score):
            raise ValueError(f"{path} is damaged: its score is {step.score}; without {folder} the run goes on before it")
        return step

    def _folder(self, index: int) -> Path:
        return self.path / f"{index:02d}"


def random_state() -> dict[str, Tensor]:
    """The state of torch's default random generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Put torch's default random generators, of those devices that are here, into a state that `random_state` returned."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _load_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; without its folder the run begins before it") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}") from error
