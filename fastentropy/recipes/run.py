"""A pruning run of a recipe in a folder: train, prune, fuse, report. Finished work is on disk at all times."""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastentropy._utils.errors import one_line
from fastentropy._utils.files import remove_leftovers, save_json, save_tensors
from fastentropy._utils.machine import describe_machine
from fastentropy._utils.timing import measure_times
from fastentropy.fusion import FusedModel, fuse
from fastentropy.fusion.memory_format import with_channels_last_weights
from fastentropy.pruning.api import PruningResult, check_names, prune
from fastentropy.pruning.criteria import CRITERIA
from fastentropy.pruning.loop import latency_table
from fastentropy.pruning.options import Options
from fastentropy.pruning.steps import Step, StepFolder
from fastentropy.recipes import RECIPES, Recipe, load_recipe
from fastentropy.reporting.run_report import write_report
from fastentropy.sites.finding import find_sites

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """The options that determine the outcome of a run; see `fastentropy prune --help`."""

    recipe: str
    seed: int
    max_drop: float
    max_removed: int | None
    per_step: int
    epochs: int
    device: str
    criterion: str = "entropy"
    zeros_together: bool = False
    target_speedup: float | None = None
    max_latency_ms: float | None = None
    collapse: str | None = None
    protect: Sequence[str] = ()
    model: str | None = None
    data: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range or of another type."""
        limits: dict[str, tuple[type, float, float]] = {
            "seed": (int, 0, 2**63 - 1),
            "max_drop": (float, 0, 1),
            "max_removed": (int, 0, math.inf),
            "per_step": (int, 1, math.inf),
            "epochs": (int, 1, math.inf),
            "target_speedup": (float, 0, math.inf),
            "max_latency_ms": (float, 0, math.inf),
        }
        optional = ("max_removed", "target_speedup", "max_latency_ms")
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}; the recipes are {', '.join(RECIPES)}")
        for name, (kind, lowest, highest) in limits.items():
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if type(value) not in (kind, int) or not lowest <= value <= highest:
                raise ValueError(f"{name} is {value!r}; expected a {kind.__name__} from {lowest} to {highest}")
        for name in ("zeros_together", "compile"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        for name in ("model", "data"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a text")
        if not isinstance(self.protect, list | tuple) or not all(isinstance(each, str) for each in self.protect):
            raise ValueError(f"protect is {self.protect!r}; expected a list of names")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is {self.criterion!r}; expected one of {', '.join(CRITERIA)}")
        Options(**self.pruning_options)

    @property
    def pruning_options(self) -> dict[str, Any]:
        """The options for `prune`."""
        names = [field.name for field in fields(Options)]
        return {name: getattr(self, name) for name in names} | {"protect": tuple(self.protect)}

    @property
    def recipe_options(self) -> dict[str, Any]:
        """The options for the recipe; None leaves the choice to it."""
        return {"model": self.model, "data": self.data, "compile": self.compile or None}


class Display(Protocol):
    """Shows the progress of a run."""

    def track(self, values: Iterable[T], total: int, title: str) -> Iterator[T]:
        """Yield the values, and show the progress and, if they are numbers, the last value."""
        ...

    def finish_step(self, steps: Sequence[Step]) -> None:
        """Show the score of the step that has just finished."""
        ...


class Run:
    """A run folder: history.json, the steps, the dense, pruned and fused network and report.html."""

    def __init__(self, folder: Path, settings: Settings, recipe: Recipe | None = None) -> None:
        """Use `create_run` or `open_run` instead."""
        self.folder, self.settings, self._recipe = folder, settings, recipe

    def execute(self, display: Display) -> dict[str, Any]:
        """Do the work that is not done yet, and return the history. The same settings give the same removals."""
        remove_leftovers(self.folder)
        device, options = torch.device(self.settings.device), self.settings.recipe_options
        recipe = self._recipe or load_recipe(self.settings.recipe, device, **options)
        threads = torch.get_num_threads()
        torch.set_num_threads(recipe.threads or threads)
        try:
            return self._execute(recipe, display)
        finally:
            torch.set_num_threads(threads)

    def _execute(self, recipe: Recipe, display: Display) -> dict[str, Any]:
        dense = self._train_dense(recipe, display)
        result = self._prune(dense, recipe, display)
        fused = fuse(result.model, recipe.example_inputs())
        collapsed = [asdict(each) for step in result.steps[: result.kept_step + 1] for each in step.collapsed]
        structure = {"removed": json.dumps(result.removed), "collapsed": json.dumps(collapsed)}
        save_tensors(result.model.state_dict(), self.folder / "pruned.safetensors", structure)
        fused.save(self.folder / "fused.pt2")
        history = {
            **self._history(result.steps),
            "kept_step": result.kept_step,
            "fusion": fused.report.to_dict(),
            "latency_ms": _latency(dense, result.model, fused, recipe),
        }
        save_json(history, self.folder / "history.json")
        write_report(history, self.folder / "report.html")
        return history

    def save_settings(self) -> None:
        """Write a history without steps, so that the run can be resumed."""
        save_json(self._history(()), self.folder / "history.json")

    def _train_dense(self, recipe: Recipe, display: Display) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        model, path = recipe.build_model(), self.folder / "dense.safetensors"
        if path.exists():
            _load_weights(model, path)
        else:
            self._measure_latencies(model, recipe, display)
            epochs = self.settings.epochs
            for _ in display.track(recipe.train(model.train(), epochs), epochs, "train the dense network"):
                pass
            save_tensors(model.state_dict(), path)
        # A resumed run, which has not trained, must draw the same random numbers from here on.
        torch.manual_seed(self.settings.seed)
        return model

    def _measure_latencies(self, model: nn.Module, recipe: Recipe, display: Display) -> None:
        """Measure the latencies that the criterion needs before training: they do not depend on the weights."""
        options, inputs = Options(**self.settings.pruning_options), recipe.example_inputs()
        if not options.needs_latency:
            return
        sites = [site.name for site in find_sites(model, inputs)]
        for _ in display.track([None], 1, "time the network's parts"):
            latency_table(model.eval(), inputs, sites, options, StepFolder(self.folder / "steps", options.to_dict()))

    def _prune(self, dense: nn.Module, recipe: Recipe, display: Display) -> PruningResult:
        def train(model: nn.Module) -> None:
            epochs = self.settings.epochs
            for _ in display.track(recipe.train(model, epochs), epochs, "fine-tune"):
                pass

        def calibrate(model: nn.Module) -> None:
            for _ in display.track(recipe.calibrate(model), recipe.calibration_batches, "measure entropies"):
                pass

        def finish_step(steps: Sequence[Step]) -> None:
            history = self._history(steps)
            save_json(history, self.folder / "history.json")
            write_report(history, self.folder / "report.html")
            display.finish_step(steps)

        return prune(
            dense,
            train=train,
            evaluate=lambda model: recipe.evaluate(model, "validation"),
            calibrate=calibrate,
            example_inputs=recipe.example_inputs(),
            **self.settings.pruning_options,
            checkpoint_dir=self.folder / "steps",
            measure=lambda model: _measure(model, recipe),
            on_step=finish_step,
        )

    def _history(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Return the history of an unfinished run."""
        options = {name: value for name, value in asdict(self.settings).items() if name not in ("recipe", "seed")}
        return {
            "recipe": self.settings.recipe,
            "seed": self.settings.seed,
            "options": options,
            "machine": describe_machine(self.settings.device),
            "steps": [_step_dict(step) for step in steps],
            "kept_step": None,
            "fusion": None,
            "latency_ms": None,
        }


def create_run(folder: Path, settings: Settings, recipe: Recipe) -> Run:
    """Begin a run in a new or empty folder.

    Raises:
        ValueError: the folder is not empty or cannot be written, or the network lacks a protected site.
    """
    run = Run(folder, settings, recipe)
    if settings.protect:
        sites = find_sites(recipe.build_model(), recipe.example_inputs())
        check_names(settings.protect, [site.name for site in sites], "protect")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not an empty folder; name a new --output, or --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        run.save_settings()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); name another folder with --output") from error
    return run


def open_run(folder: Path) -> Run:
    """Open the run in a folder to resume it.

    Raises:
        ValueError: its history.json is missing or damaged.
    """
    history = read_history(folder / "history.json")
    return Run(folder, Settings(recipe=history["recipe"], seed=history["seed"], **history["options"]))


def read_history(path: Path) -> dict[str, Any]:
    """Read the history of a run.

    Raises:
        ValueError: the file is missing, damaged or not the history of a run.
    """
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(recipe=history["recipe"], seed=history["seed"], **history["options"])
        torch.device(settings.device)
        history["steps"], history["kept_step"], history["fusion"]
        return dict(history)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is missing, damaged or not the history of a run: {error!r}") from error


@torch.no_grad()
def _measure(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    report = fuse(model, recipe.example_inputs()).report
    return {
        "test": recipe.evaluate(model, "test"),
        "pruned_ms": report.milliseconds["original"],
        "fused_ms": report.milliseconds[report.choice],
    }


@torch.no_grad()
def _latency(dense: nn.Module, pruned: nn.Module, fused: FusedModel, recipe: Recipe) -> dict[str, float]:
    """Return the time of one call of each network in milliseconds, measured side by side.

    The networks are the dense and the pruned one, and both fused. Those that are not fused count in the memory format in
    which they are faster.
    """
    inputs = recipe.example_inputs()
    models = {"dense": dense, "dense_fused": fuse(dense.eval(), inputs), "pruned": pruned, "fused": fused}
    models |= {f"{name} in channels-last": with_channels_last_weights(models[name]) for name in ("dense", "pruned")}
    times = measure_times({name: functools.partial(model.eval(), *inputs) for name, model in models.items()}, rounds=31)
    best = {name: min(times[name], times.pop(f"{name} in channels-last")) for name in ("dense", "pruned")}
    return times | best


def _step_dict(step: Step) -> dict[str, Any]:
    if missing := {"test", "pruned_ms", "fused_ms"} - set(step.metrics):
        raise ValueError(f"a step.json of the run is damaged: it lacks {', '.join(sorted(missing))}")
    return {
        "removed": list(step.removed),
        "layer_entropy": step.layer_entropy,
        "validation": step.score,
        "test": step.metrics["test"],
        "latency_ms": {"pruned": step.metrics["pruned_ms"], "fused": step.metrics["fused_ms"]},
        "collapsed": [asdict(projection) for projection in step.collapsed],
    }


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or of another network: {one_line(error)}") from error
