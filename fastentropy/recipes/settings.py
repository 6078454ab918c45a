"""The settings of a run of a recipe, the checks of their values, and the history that holds them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fastentropy._utils.errors import reason
from fastentropy.pruning.criteria import CRITERIA
from fastentropy.pruning.options import Options
from fastentropy.recipes import RECIPES
from fastentropy.reporting.history import check_history

#: The type, the lowest and the highest value of each number.
_LIMITS: dict[str, tuple[type, float, float]] = {
    "seed": (int, 0, 2**63 - 1),
    "max_drop": (float, 0, 1),
    "max_removed": (int, 0, math.inf),
    "per_step": (int, 1, math.inf),
    "epochs": (int, 1, math.inf),
    "epochs_dense": (int, 0, math.inf),
    "target_speedup": (float, 0, math.inf),
    "max_latency_ms": (float, 0, math.inf),
    "width": (float, 0.01, 100),
    "image_size": (int, 8, 4096),
    "images_per_epoch": (int, 2, math.inf),
    "batch_size": (int, 2, math.inf),
    "learning_rate": (float, 1e-8, 100),
    "label_smoothing": (float, 0, 1),
    "ema": (float, 0, 1),
    "distill": (float, 0.01, math.inf),
    "cache_gb": (float, 0, math.inf),
}
#: The numbers that may not be None.
_REQUIRED = ("seed", "max_drop", "per_step", "epochs")
#: The options of recipes that are passed on as they are.
_RECIPE_OPTIONS = (
    "model",
    "data",
    "width",
    "weights",
    "image_size",
    "images_per_epoch",
    "batch_size",
    "optimizer",
    "learning_rate",
    "label_smoothing",
    "ema",
    "distill",
    "precision",
    "cache_gb",
)
#: The values of options that name one of several things.
_CHOICES = {"statistics": ("published",), "optimizer": ("sgd", "adamw"), "precision": ("float32", "bfloat16")}


@dataclass(frozen=True)
class Settings:
    """The options that determine the outcome of a run. They are written to history.json.

    Attributes:
        recipe: the name of the recipe, in `RECIPES`.
        seed: the seed of torch's random generators.
        max_drop: the largest accepted loss of validation accuracy, from 0 to 1.
        max_removed: the largest number of activations to remove, or None for no limit.
        per_step: how many activations are removed in each step, or how many percent of the neurons.
        epochs: the number of epochs of each training.
        epochs_dense: the number of epochs of the training of the dense network; None for the same as `epochs`. With 0 it
            keeps the weights that it begins with.
        device: the device of PyTorch on which the recipe runs.
        criterion: the rule that chooses the next activations to remove, in `CRITERIA`.
        granularity: "layer" to remove whole activations, "neuron" to remove the activation of single neurons.
        zeros_together: whether each step also removes all activations whose entropy is 0.
        target_speedup: stop as soon as the network is predicted to be this many times as fast; None for no target.
        max_latency_ms: stop as soon as a call is predicted to take at most this many milliseconds; None for no limit.
        collapse: "project" to approximate a series of linearised convolutions by one where the exact product is slower; None
            to merge exactly.
        protect: the names of activations that are never removed.
        model: the network of the recipe; None leaves the choice to the recipe.
        data: the folder or the name of the recipe's data, or None. Not every recipe takes it.
        compile: whether training uses torch.compile.
        statistics: "published" for entropies as in the code of EASIER: of the batches of the last epoch of each training, with
            0 counted as on, averaged. None for entropies of the training images without augmentation, in eval mode.
        width, weights, image_size, images_per_epoch, batch_size, optimizer, learning_rate, label_smoothing, ema, distill,
        precision, cache_gb: further options of recipes, under the names of their arguments. None leaves the choice to the
            recipe.
    """

    recipe: str
    seed: int
    max_drop: float
    max_removed: int | None
    per_step: int
    epochs: int
    device: str
    criterion: str = "entropy"
    granularity: str = "layer"
    zeros_together: bool = False
    target_speedup: float | None = None
    max_latency_ms: float | None = None
    collapse: str | None = None
    protect: Sequence[str] = ()
    model: str | None = None
    data: str | None = None
    compile: bool = False
    epochs_dense: int | None = None
    statistics: str | None = None
    width: float | None = None
    weights: str | None = None
    image_size: int | None = None
    images_per_epoch: int | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    label_smoothing: float | None = None
    ema: float | None = None
    distill: float | None = None
    precision: str | None = None
    cache_gb: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range or of another type."""
        if self.recipe not in RECIPES:
            raise ValueError(f"unknown recipe {self.recipe!r}; the recipes are {', '.join(RECIPES)}")
        for name, (kind, lowest, highest) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name not in _REQUIRED:
                continue
            if type(value) not in (kind, int) or not lowest <= value <= highest:
                expected = "an int" if kind is int else "a float"
                raise ValueError(f"{name} is {value!r}; expected {expected} from {lowest} to {highest}")
        for name in ("zeros_together", "compile"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected true or false")
        for name in ("model", "data", "weights"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a text")
        if not isinstance(self.protect, list | tuple) or not all(isinstance(each, str) for each in self.protect):
            raise ValueError(f"protect is {self.protect!r}; expected a list of names")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is {self.criterion!r}; expected one of {', '.join(CRITERIA)}")
        if self.statistics and self.collapse:
            raise ValueError("collapse fits convolutions to the training images in eval mode; leave out statistics 'published'")
        Options(**self.pruning_options)

    @property
    def pruning_options(self) -> dict[str, Any]:
        """The options that are passed to `prune`, by name."""
        published = self.statistics == "published"
        figures = {"zero": "on" if published else "discard", "average": "batch" if published else "dataset"}
        names = [field.name for field in fields(Options) if field.name not in figures]
        return {name: getattr(self, name) for name in names} | figures | {"protect": tuple(self.protect)}

    @property
    def recipe_options(self) -> dict[str, Any]:
        """The options that are passed to the recipe, by name. An option that is None is left to the recipe."""
        return {name: getattr(self, name) for name in _RECIPE_OPTIONS} | {"compile": self.compile or None}


def settings_of(history: Mapping[str, Any]) -> Settings:
    """Return the settings in the history of a run."""
    return Settings(recipe=history["recipe"], seed=history["seed"], **history["options"])


def read_history(path: Path) -> dict[str, Any]:
    """Read the history of a run.

    Args:
        path: the file history.json of the run.

    Returns:
        The content of the file. Its settings have been checked.

    Raises:
        ValueError: the file is missing, damaged or not the history of a run.
    """
    try:
        history = json.loads(path.read_text(encoding="utf-8"))
        torch.device(settings_of(history).device)
        history["steps"], history["kept_step"], history["fusion"]
        return dict(history)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is missing, damaged or not the history of a run: {reason(error)}") from error


def check_read_history(history: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if a history that was read from `path` lacks a value that the reports show."""
    try:
        check_history(history)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
