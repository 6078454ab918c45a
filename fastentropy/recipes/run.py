"""Run a recipe in a folder: train a network, prune its activations, fuse what is left, and write a report.

Every finished part of the work is written to the folder at once, so that an interrupted run can be resumed.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fastentropy._utils.errors import joined_lines
from fastentropy._utils.files import remove_leftovers, save_json, save_tensors
from fastentropy._utils.machine import describe_machine
from fastentropy.collector.api import collect
from fastentropy.collector.collector import EntropyCollector
from fastentropy.collector.statistics import Statistics
from fastentropy.fusion import fuse
from fastentropy.pruning.api import check_names, prune
from fastentropy.pruning.loop import latency_table
from fastentropy.pruning.options import Options
from fastentropy.pruning.result import PruningResult
from fastentropy.pruning.steps import Step, StepFolder
from fastentropy.recipes import Progress, Recipe, Report, load_recipe
from fastentropy.recipes.latencies import final_latencies
from fastentropy.recipes.settings import Settings, check_read_history, read_history, settings_of
from fastentropy.reporting.run_report import write_report
from fastentropy.sites.finding import find_sites

T = TypeVar("T")


class Display(Protocol):
    """Receives the progress of a run, to show it to the user."""

    def track(self, values: Iterable[T], total: int, title: str) -> Iterator[T]:
        """Yield the values one by one, and show how many of them have been yielded.

        Args:
            values: what a long operation yields. If the values are numbers, such as losses, the last one is shown too. If they
                are `Progress`, the images are shown in place of the values.
            total: the number of values.
            title: what the operation does, in a few words.
        """
        ...

    def phase(self, title: str) -> AbstractContextManager[Report]:
        """Return a context manager for a long operation that reports its progress to the function it gets."""
        ...

    def finish_step(self, steps: Sequence[Step], most_removed: int) -> None:
        """Show the score of the last of `steps`. At most `most_removed` activations are removed; 0 if that is not known."""
        ...


class Run:
    """A run in its folder.

    The folder holds history.json, the folder `steps` with every finished step, the dense, the pruned and the fused network
    (dense.safetensors, pruned.safetensors and fused.pt2) and report.html.
    """

    def __init__(
        self, folder: Path, settings: Settings, recipe: Recipe | None = None, outcome: dict[str, Any] | None = None
    ) -> None:
        """Store the arguments; use `create_run` or `open_run` instead.

        Args:
            folder: the folder of the run.
            settings: its options.
            recipe: the recipe that `settings` names; None to load it in `execute`.
            outcome: the history of a run that was finished before, which needs no `execute`; otherwise None.
        """
        self.folder, self.settings, self._recipe, self.outcome = folder, settings, recipe, outcome

    def execute(self, display: Display) -> dict[str, Any]:
        """Do the part of the work that is not done yet. Equal settings give equal removals, also after an interruption.

        Args:
            display: receives the progress.

        Returns:
            The history, as written to history.json.

        Raises:
            ValueError: a file of the folder is damaged, or the recipe or `prune` cannot work with the settings.
        """
        remove_leftovers(self.folder)
        device, options = torch.device(self.settings.device), self.settings.recipe_options
        with display.phase("read the data") as report:
            recipe = self._recipe or load_recipe(self.settings.recipe, device, report, **options)
        threads = torch.get_num_threads()
        torch.set_num_threads(recipe.threads or threads)
        try:
            return self._execute(recipe, display)
        finally:
            torch.set_num_threads(threads)

    def _execute(self, recipe: Recipe, display: Display) -> dict[str, Any]:
        """Train, prune, fuse and write all results; return the history."""
        dense = self._train_dense(recipe, display)
        result = self._prune(dense, recipe, display)
        for _ in display.track([None], 1, "fuse the kept network"):
            fused = fuse(result.model, recipe.example_inputs(), progress=False)
        collapsed = [asdict(each) for step in result.steps[: result.kept_step + 1] for each in step.collapsed]
        neurons = [asdict(step)["neurons"] for step in result.steps[: result.kept_step + 1]]
        parts = {"removed": result.removed, "collapsed": collapsed, "neurons": neurons}
        structure = {name: json.dumps(part) for name, part in parts.items()}
        save_tensors(result.model.state_dict(), self.folder / "pruned.safetensors", structure)
        fused.save(self.folder / "fused.pt2")
        for _ in display.track([None], 1, "time the networks"):
            latencies = final_latencies(dense, result.model, fused, recipe.example_inputs())
        history = {
            **self._history(result.steps),
            "kept_step": result.kept_step,
            "fusion": fused.report.to_dict(),
            "latency_ms": latencies,
        }
        write_report(history, self.folder / "report.html")
        save_json(history, self.folder / "history.json")  # the last file: with it the run is finished
        return history

    @property
    def _dense_statistics(self) -> Path:
        """The file with the statistics of the last epoch of the dense network's training, if they are collected there."""
        return self.folder / "dense-statistics.safetensors"

    def save_settings(self) -> None:
        """Write a history that holds the settings but no steps, so that the run can be resumed from its folder."""
        save_json(self._history(()), self.folder / "history.json")

    def _train_dense(self, recipe: Recipe, display: Display) -> nn.Module:
        """Return the trained network before any removal: train it, or load it if an earlier part of the run has trained it."""
        torch.manual_seed(self.settings.seed)
        model, path = recipe.build_model(), self.folder / "dense.safetensors"
        if path.exists():
            _load_weights(model, path)
        else:
            self._measure_latencies(model, recipe, display)
            settings = self.settings
            epochs = settings.epochs if settings.epochs_dense is None else settings.epochs_dense
            with contextlib.ExitStack() as stack:
                collector = stack.enter_context(collect(model, average="batch")) if settings.statistics else None
                if epochs:
                    _train(recipe, model.train(), epochs, display, "train dense network", collector)
            if collector is not None:
                collector.compute().save(self._dense_statistics)
            save_tensors(model.state_dict(), path)
        # From here on, a resumed run that has not trained must draw the same random numbers as a run that has.
        torch.manual_seed(self.settings.seed)
        return model

    def _measure_latencies(self, model: nn.Module, recipe: Recipe, display: Display) -> None:
        """Time the parts of the network and store the times, if the criterion or `collapse` needs them.

        This is done before training, because the times do not depend on the weights, and an impossible target ends the run.
        """
        options, inputs = Options(**self.settings.pruning_options), recipe.example_inputs()
        if not options.needs_latency:
            return
        sites = [site.name for site in find_sites(model, inputs)]
        for _ in display.track([None], 1, "time the network's parts"):
            latency_table(model.eval(), inputs, sites, options, StepFolder(self.folder / "steps", options.to_dict()))

    def _prune(self, dense: nn.Module, recipe: Recipe, display: Display) -> PruningResult:
        """Prune the dense network with the methods of the recipe. The history and the report are written after each step."""
        recipe.teacher, options = dense, Options(**self.settings.pruning_options)

        def train(model: nn.Module, collector: EntropyCollector | None = None) -> None:
            """Fine-tune the network by the recipe, and show the progress."""
            _train(recipe, model, self.settings.epochs, display, "fine-tune", collector)

        def calibrate(model: nn.Module) -> None:
            """Run the training set forward through the network, and show the progress."""
            for _ in display.track(recipe.calibrate(model), recipe.calibration_batches, "measure entropies"):
                pass

        def evaluate(model: nn.Module) -> float:
            """Return the accuracy on the validation set, and show the progress."""
            with display.phase("validate") as report:
                return recipe.evaluate(model, "validation", report)

        def finish_step(steps: Sequence[Step]) -> None:
            """Write the history and the report after a step, and show its score."""
            history = self._history(steps)
            save_json(history, self.folder / "history.json")
            write_report(history, self.folder / "report.html")
            display.finish_step(steps, options.most_removed(list(steps[0].layer_entropy)))

        published = self.settings.statistics == "published"
        return prune(
            dense,
            train=train,
            evaluate=evaluate,
            calibrate=None if published else calibrate,
            statistics=_load_statistics(self._dense_statistics) if published else None,
            example_inputs=recipe.example_inputs(),
            **self.settings.pruning_options,
            checkpoint_dir=self.folder / "steps",
            measure=lambda model: _measure(model, recipe, display),
            on_step=finish_step,
            progress=False,  # `display` shows more
        )

    def _history(self, steps: Sequence[Step]) -> dict[str, Any]:
        """Return the history of an unfinished run: settings, machine and steps. The results of the end are None."""
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


def _train(
    recipe: Recipe, model: nn.Module, epochs: int, display: Display, title: str, collector: EntropyCollector | None
) -> None:
    """Train a network by its recipe, and show the progress.

    Args:
        recipe: the recipe.
        model: the network, in train mode, which is changed.
        epochs: the length of the schedule.
        display: receives the progress.
        title: what the training is, in a few words.
        collector: an attached collector, which gets to see the last epoch only, or None.
    """
    with contextlib.ExitStack() as earlier:
        if collector is not None and epochs > 1:
            earlier.enter_context(collector.paused())
        for count, progress in enumerate(display.track(recipe.train(model, epochs), epochs, title), 1):
            done = epochs * progress.done / progress.total if isinstance(progress, Progress) else count
            if done >= epochs - 1:
                earlier.close()


def create_run(folder: Path, settings: Settings, recipe: Recipe) -> Run:
    """Begin a run in a new or empty folder.

    Args:
        folder: the folder. It is created if it does not exist.
        settings: the options of the run.
        recipe: the recipe that `settings` names, loaded.

    Returns:
        The run. `Run.execute` does its work.

    Raises:
        ValueError: the folder is not empty or cannot be written, the network has no activation of a name in
            `settings.protect`, or it is not trained, or to be counted in training, and `settings.epochs_dense` is 0.
    """
    run = Run(folder, settings, recipe)
    if settings.epochs_dense == 0 and recipe.untrained:
        raise ValueError(f"--epochs-dense 0 needs a trained network, but {recipe.untrained}; leave the option out")
    if settings.epochs_dense == 0 and settings.statistics:
        raise ValueError("--statistics published needs the last epoch of a training; leave out --epochs-dense 0")
    if settings.protect:
        model = recipe.build_model()
        sites = find_sites(model, recipe.example_inputs())
        check_names(settings.protect, [site.name for site in sites], "protect", model)
    try:
        # A process that was killed while it wrote the first file leaves a temporary one, which `Run.execute` removes.
        if folder.exists() and (not folder.is_dir() or any(not each.name.startswith(".tmp-") for each in folder.iterdir())):
            raise ValueError(f"{folder} exists and is not an empty folder; name a new --output, or --resume {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        run.save_settings()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); name another folder with --output") from error
    return run


def open_run(folder: Path) -> Run:
    """Open a run to resume it.

    Args:
        folder: the folder of the run.

    Returns:
        The run, with the settings in its history.json. If it is finished, its outcome is there too.

    Raises:
        ValueError: history.json is missing or damaged.
    """
    path = folder / "history.json"
    history = read_history(path)
    if history["kept_step"] is None:
        return Run(folder, settings_of(history))
    check_read_history(history, path)
    return Run(folder, settings_of(history), outcome=history)


@torch.no_grad()
def _measure(model: nn.Module, recipe: Recipe, display: Display) -> dict[str, float]:
    """Return the test accuracy of a pruned network, and the milliseconds of one call of it before and after fusing."""
    for _ in display.track([None], 1, "fuse and time"):
        report = fuse(model, recipe.example_inputs(), progress=False).report
    with display.phase("test") as show:
        accuracy = recipe.evaluate(model, "test", show)
    return {
        "test": accuracy,
        "pruned_ms": report.milliseconds["original"],
        "fused_ms": report.milliseconds[report.choice],
    }


def _step_dict(step: Step) -> dict[str, Any]:
    """Return a step as a dict for history.json. Raise ValueError if figures that this run always measures are missing."""
    if missing := {"test", "pruned_ms", "fused_ms"} - set(step.metrics):
        raise ValueError(f"a step.json of the run is damaged: it lacks {', '.join(sorted(missing))}")
    return {
        "removed": list(step.removed),
        "layer_entropy": step.layer_entropy,
        "validation": step.score,
        "test": step.metrics["test"],
        "latency_ms": {"pruned": step.metrics["pruned_ms"], "fused": step.metrics["fused_ms"]},
        "collapsed": [asdict(projection) for projection in step.collapsed],
        "neurons": {
            name: {"neurons": each.neurons, "linear": len(each.linear), "constant": len(each.constant)}
            for name, each in step.neurons.items()
        },
    }


def _load_statistics(path: Path) -> Statistics:
    """Read the statistics of the dense network. Raise ValueError if the file is missing or damaged."""
    try:
        return Statistics.load(path)
    except OSError as error:
        raise ValueError(f"{path} is missing; begin the run anew") from error


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a network from a safetensors file. Raise ValueError if the file does not fit the network."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or of another network: {joined_lines(error)}") from error
