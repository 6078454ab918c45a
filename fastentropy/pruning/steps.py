"""The steps of a pruning run, and how they are stored. Each step has a folder, in which `step.json` is written last."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastentropy._utils.errors import joined_lines, reason
from fastentropy._utils.files import remove_leftovers, save_json, save_tensors
from fastentropy.collector.statistics import Statistics
from fastentropy.fusion.latency import LatencyTable
from fastentropy.fusion.projection import Projection, install
from fastentropy.surgery.linearization import replace_by_identity
from fastentropy.surgery.neuron_replacement import ReplacedNeurons, replace_neurons


@dataclass(frozen=True)
class Step:
    """One step of `prune`: the sites it linearised, and figures of the network after its fine-tuning.

    To linearise a site (call of an activation) is to replace the activation by the identity. Step 0 is the dense network, with
    no site linearised.

    Attributes:
        removed: the names of the sites that this step linearised.
        layer_entropy: the layer entropy (arXiv 2404.18949, equation 4), in bits, of each remaining site, by name in call order.
        score: the value that `evaluate` returned.
        metrics: the figures that `measure` returned, by name. If the run measured the latency of the network, `predicted_ms` is
            among them: the predicted time of one call in milliseconds.
        collapsed: the approximations of this step. Each is a series of modules that was replaced by one fitted convolution
            before the fine-tuning.
        neurons: the neurons of which this step replaced the activation, by the name of their site. Where all neurons of a site
            are linear then, it is also in `removed`.

    Examples:
        >>> import fastentropy as fe
        >>> step = fe.Step(removed=("layer1.relu",), layer_entropy={"layer2.relu": 0.75}, score=0.91)
        >>> min(step.layer_entropy, key=step.layer_entropy.get)
        'layer2.relu'
    """

    removed: tuple[str, ...]
    layer_entropy: dict[str, float]
    score: float
    metrics: dict[str, float] = field(default_factory=dict)
    collapsed: tuple[Projection, ...] = ()
    neurons: dict[str, ReplacedNeurons] = field(default_factory=dict)


class StepFolder:
    """A folder with the options of a run and its finished steps.

    Subfolders 00, 01, … hold the model, the statistics and the random state of each finished step. All files are safetensors or
    JSON. If a file is damaged, reading it raises a ValueError that names the file.
    """

    def __init__(self, path: str | PathLike[str], options: Mapping[str, Any]) -> None:
        """Use a folder. If it does not exist, it is created when something is written.

        Args:
            path: the folder.
            options: the options of the run, as values of JSON types.

        Raises:
            ValueError: the folder holds a run with other options. The run cannot continue, because its steps depend on its
                options.
        """
        self.path, self._options = Path(path), dict(options)
        if (self.path / "options.json").exists():
            options = _load_json(self.path / "options.json")
            if options != self._options:
                raise ValueError(f"{self.path} holds a run with the options {options}, not {self._options}; name another")

    def save(self, index: int, step: Step, model: nn.Module, statistics: Statistics, random_state: dict[str, Tensor]) -> None:
        """Write a step. The step counts as finished only when all its files are written.

        Args:
            index: the index of the step.
            step: the step.
            model: the network at the end of the step.
            statistics: its statistics.
            random_state: the states of torch's random generators at the end of the step, by device.

        Raises:
            ValueError: the model's state_dict holds something other than tensors.
        """
        folder, state = self._folder(index), model.state_dict()
        if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"the model's state_dict holds {', '.join(others)}, which are not tensors and cannot be stored")
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self._options, self.path / "options.json")
        save_tensors(state, folder / "model.safetensors")
        save_tensors(random_state, folder / "random_state.safetensors")
        statistics.save(folder / "statistics.safetensors")
        values = asdict(step)
        del values["layer_entropy"]  # computed from the statistics when the step is read
        save_json(values, folder / "step.json")

    def save_latency(self, table: LatencyTable) -> None:
        """Write `table`, the latencies that were measured before the first step.

        A resumed run reads them, because other measurements could lead it to other decisions.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        save_json(self._options, self.path / "options.json")
        save_json(table.to_dict(), self.path / "latency.json")

    def load_latency(self) -> LatencyTable | None:
        """Return the latencies that were measured before the first step, or None if they have not been written."""
        path = self.path / "latency.json"
        if not path.exists():
            return None
        try:
            return LatencyTable.from_dict(_load_json(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {reason(error)}; delete {self.path} to start the run again") from error

    def load_statistics(self, index: int) -> Statistics:
        """Return the statistics of the step with this index."""
        return Statistics.load(self._folder(index) / "statistics.safetensors")

    def load(self) -> list[Step]:
        """Return the finished steps. Temporary files that a killed run left in the folder are removed."""
        for folder in (self.path, *self.path.glob("[0-9][0-9]*")):
            remove_leftovers(folder)
        steps: list[Step] = []
        while (self._folder(len(steps)) / "step.json").exists():
            steps.append(self._load_step(len(steps)))
        return steps

    def restore(self, model: nn.Module, steps: Sequence[Step]) -> nn.Module:
        """Turn a copy of the dense model, in place, into the network at the end of a finished step.

        Args:
            model: the copy, which is changed.
            steps: the finished steps up to this one.

        Returns:
            The same model.

        Raises:
            ValueError: the folder is damaged, or its steps do not fit the model.
        """
        for step in steps:
            try:
                replace_neurons(model, step.neurons)
            except (IndexError, ValueError) as error:
                text = f"{self.path} holds a step that replaces neurons that the model lacks: {reason(error)}"
                raise ValueError(text) from error
            replace_by_identity(model, step.removed)
            for projection in step.collapsed:
                try:
                    install(model, projection)
                except (AttributeError, RuntimeError, StopIteration, TypeError, ValueError) as error:
                    text = f"{self.path} holds a step that approximates modules that the model lacks: {reason(error)}"
                    raise ValueError(text) from error
        self.load_weights(len(steps) - 1, model)
        return model

    def load_weights(self, index: int, model: nn.Module) -> None:
        """Load the weights of a step into a model.

        Args:
            index: the index of the step.
            model: a model in which the activations that are removed in this step and before it are already linearised.
        """
        path = self._folder(index) / "model.safetensors"
        try:
            model.load_state_dict(_load_tensors(path))
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the model: {joined_lines(error)}") from error

    def restore_random_state(self, index: int) -> dict[str, Tensor]:
        """Set torch's random generators to their states at the end of a step.

        Args:
            index: the index of the step.

        Returns:
            These states, by device.
        """
        path = self._folder(index) / "random_state.safetensors"
        states = _load_tensors(path)
        try:
            set_random_state(states)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return states

    def _load_step(self, index: int) -> Step:
        """Read the step with this index from its folder."""
        folder = self._folder(index)
        entropies = self.load_statistics(index).layer_entropy()
        path = folder / "step.json"
        values = _load_json(path)
        try:
            metrics = {str(name): float(value) for name, value in values["metrics"].items()}
            collapsed = tuple(map(Projection.from_dict, values["collapsed"]))
            neurons = {name: _read_neurons(**value) for name, value in values["neurons"].items()}
            removed, score = tuple(map(str, values["removed"])), float(values["score"])
            step = Step(removed, entropies, score, metrics, collapsed, neurons)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {reason(error)}; delete {folder} to continue before this step") from error
        if not math.isfinite(step.score):
            raise ValueError(f"{path} is damaged: its score is {step.score}; delete {folder} to continue before this step")
        return step

    def _folder(self, index: int) -> Path:
        """Return the folder of the step with this index."""
        return self.path / f"{index:02d}"


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's default random generators, by name of the device ("cpu", "cuda:0", …)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    """Set torch's default random generators to states that `random_state` returned. Devices that are absent are skipped."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.device(device).index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, device)


def _read_neurons(neurons: int, linear: list[int], constant: list[int], channel_axis: int) -> ReplacedNeurons:
    """Return the neurons that a step has stored as values of JSON types."""
    return ReplacedNeurons(int(neurons), tuple(map(int, linear)), tuple(map(int, constant)), int(channel_axis))


def _load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file. Raise a ValueError that names it if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete its folder to continue before it") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raise a ValueError that names it if it is damaged or missing."""
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is damaged or missing: {error}") from error
