"""Recipes for the command line: each is a network, its data, and the methods to train, evaluate and calibrate it."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

#: The class of each recipe by its name, as "module:class". The module is imported when the recipe is loaded.
RECIPES = {"digits": "fastentropy.recipes.digits:Digits", "cifar10": "fastentropy.recipes.cifar10:Cifar10"}
#: The optional dependencies that each recipe needs, by its name: an extra of this package, as in `fastentropy[cli]`.
_EXTRAS = {"digits": "cli", "cifar10": "cifar10"}

Split = Literal["validation", "test"]


class Recipe(Protocol):
    """The interface of a recipe. Long operations are generators: they yield after each unit of work, to show the progress."""

    epochs: int
    """The default number of epochs of one call of `train`."""
    threads: int | None
    """How many CPU threads PyTorch uses during a run; None keeps the current number."""
    calibration_batches: int
    """How many times `calibrate` yields."""

    def build_model(self) -> nn.Module:
        """Return a new network on the recipe's device. Its weights are drawn from torch's default random generator."""
        ...

    def train(self, model: nn.Module, epochs: int) -> Iterator[float]:
        """Train a network in place, and yield the mean training loss after each epoch.

        Args:
            model: the network to train, in train mode.
            epochs: how many epochs to train. The learning rate passes through its whole schedule in these epochs.
        """
        ...

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """Return the accuracy of a network on the validation set or the test set, from 0 to 1."""
        ...

    def calibrate(self, model: nn.Module) -> Iterator[None]:
        """Run the training set forward through a network, and yield after each batch.

        The entropies of the activations are measured in these passes.
        """
        ...

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the positional inputs of one call of the network, with the batch size for which latency is measured."""
        ...


def load_recipe(name: str, device: torch.device, **options: Any) -> Recipe:
    """Create a recipe, and load its data onto a device.

    Args:
        name: a name in `RECIPES`.
        device: where the data and the networks are placed.
        **options: further arguments of the recipe's class. An option that is None is not passed on.

    Returns:
        The recipe.

    Raises:
        ValueError: the name is unknown, the recipe does not take one of the options, the recipe cannot use the value of an
            option, or a package that the recipe needs is not installed.
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
