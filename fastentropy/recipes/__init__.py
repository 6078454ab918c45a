"""Recipes: a model, its data, and functions to train, evaluate and calibrate it, for the command line."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

#: Recipe name -> "module:class", imported when the recipe is loaded.
RECIPES = {"digits": "fastentropy.recipes.digits:Digits", "cifar10": "fastentropy.recipes.cifar10:Cifar10"}
#: Recipe name -> the extra of this package that it needs.
_EXTRAS = {"digits": "cli", "cifar10": "cifar10"}

Split = Literal["validation", "test"]


class Recipe(Protocol):
    """What the command line needs of a recipe. Long operations yield after each unit of work, so that progress can be shown."""

    epochs: int
    """The default number of epochs of a schedule."""
    threads: int | None
    """How many CPU threads to use; None for PyTorch's default."""
    calibration_batches: int
    """How many times `calibrate` yields."""

    def build_model(self) -> nn.Module:
        """Return a new network on the recipe's device, initialised from torch's default random generator."""
        ...

    def train(self, model: nn.Module, epochs: int) -> Iterator[float]:
        """Train in place for one schedule; yield the mean training loss of each epoch."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """Return the accuracy on a split, from 0 to 1."""
        ...

    def calibrate(self, model: nn.Module) -> Iterator[None]:
        """Run the training set through the model; yield after each batch."""
        ...

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the inputs of one call, at the batch size for which latency is measured."""
        ...


def load_recipe(name: str, device: torch.device, **options: Any) -> Recipe:
    """Load a recipe, and its data onto a device.

    Args:
        name: a name in `RECIPES`.
        device: where the data and the networks are placed.
        **options: the options of the recipe; those that are None are left out.

    Raises:
        ValueError: the name is unknown; the recipe does not take an option, or cannot use its value; a package that the recipe
            needs is not installed.
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
