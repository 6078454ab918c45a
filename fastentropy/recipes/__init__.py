"""Recipes: a model, its data, and how to train, evaluate and calibrate it, ready for the command line."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

#: Recipe name -> where it is: "module:class", imported when asked for.
RECIPES = {"digits": "fastentropy.recipes.digits:Digits", "cifar10": "fastentropy.recipes.cifar10:Cifar10"}
#: Recipe name -> the extra of the package that it needs.
_EXTRAS = {"digits": "cli", "cifar10": "cifar10"}

Split = Literal["validation", "test"]


class Recipe(Protocol):
    """What the command line needs of a recipe. Work that takes long yields after each unit, so that progress can be shown."""

    epochs: int
    """The default length of a schedule."""
    threads: int | None
    """How many CPU threads its network has work for; None for as many as PyTorch takes."""
    calibration_batches: int
    """How often `calibrate` yields."""

    def build_model(self) -> nn.Module:
        """A new network on the recipe's device, initialised from torch's default random generator."""
        ...

    def train(self, model: nn.Module, epochs: int) -> Iterator[float]:
        """Train in place for one schedule; yields the mean training loss of each epoch."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The accuracy on a split, from 0 to 1."""
        ...

    def calibrate(self, model: nn.Module) -> Iterator[None]:
        """Run the training set through the model; yields after each batch."""
        ...

    def example_inputs(self) -> tuple[Tensor, ...]:
        """The inputs of one call, of the batch size that latency is measured at."""
        ...


def load_recipe(name: str, device: torch.device, **options: Any) -> Recipe:
    """The recipe of that name with its data on a device. Options that are None are left out.

    Raises ValueError for a name that is not in `RECIPES`, an option that the recipe does not take or with a value that it
    cannot use, and where a package that the recipe needs is not installed.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    module, _, attribute = RECIPES[name].partition(":")
    given = {option: value for option, value in options.items() if value is not None}
    try:
        make = getattr(importlib.import_module(module), attribute)
        for option in given:
            if option not in inspect.signature(make).parameters:
                raise ValueError(f"the recipe {name} takes no --{option}; leave it out")
        recipe: Recipe = make(device, **given)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        install = f"pip install 'fastentropy[{_EXTRAS[name]}]'"
        raise ValueError(f"the recipe {name} needs {package}; install it with: {install}") from error
    return recipe
