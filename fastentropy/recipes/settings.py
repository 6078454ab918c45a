"""The settings of a run of a recipe, and the checks of their values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastentropy.pruning.criteria import CRITERIA
from fastentropy.pruning.options import Options
from fastentropy.recipes import RECIPES


@dataclass(frozen=True)
class Settings:
    """The options that determine the outcome of a run. They are written to history.json.

    Attributes:
        recipe: the name of the recipe, in `RECIPES`.
        seed: the seed of torch's random generators.
        max_drop: the largest accepted loss of validation accuracy, from 0 to 1.
        max_removed: the largest number of activations to remove, or None for no limit.
        per_step: how many activations are removed in each step.
        epochs: the number of epochs of each training.
        device: the device of PyTorch on which the recipe runs.
        criterion: the rule that chooses the next activations to remove, in `CRITERIA`.
        zeros_together: whether each step also removes all activations whose entropy is 0.
        target_speedup: stop as soon as the network is predicted to be this many times as fast; None for no target.
        max_latency_ms: stop as soon as a call is predicted to take at most this many milliseconds; None for no limit.
        collapse: "project" to approximate a series of linearised convolutions by one where the exact product is slower; None
            to merge exactly.
        protect: the names of activations that are never removed.
        model: the network of the recipe; None leaves the choice to the recipe.
        data: the folder or the name of the recipe's data, or None. Not every recipe takes it.
        compile: whether training uses torch.compile.
    """

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
        """The options that are passed to `prune`, by name."""
        names = [field.name for field in fields(Options)]
        return {name: getattr(self, name) for name in names} | {"protect": tuple(self.protect)}

    @property
    def recipe_options(self) -> dict[str, Any]:
        """The options that are passed to the recipe, by name. An option that is None is left to the recipe."""
        return {"model": self.model, "data": self.data, "compile": self.compile or None}
