"""Recipes for the command line: each is a network, its data, and the methods to train, evaluate and calibrate it."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastentropy._utils.optional import install_command

#: The class of each recipe by its name, as "module:class". The module is imported when the recipe is loaded.
RECIPES = {
    "digits": "fastentropy.recipes.digits:Digits",
    "cifar10": "fastentropy.recipes.cifar10:Cifar10",
    "images": "fastentropy.recipes.images:Images",
}
#: The optional dependencies that each recipe needs, by its name: an extra of this package, as in `fastentropy[cli]`.
_EXTRAS = {"digits": "cli", "cifar10": "cifar10", "images": "images"}

Split = Literal["validation", "test"]


class Progress(NamedTuple):
    """How far a long operation has come.

    Attributes:
        done: how many images it has worked on.
        total: how many it works on in all.
        loss: the training loss of the last batch, a scalar, or None.
    """

    done: int
    total: int
    loss: Tensor | None = None


Report = Callable[[Progress], object]


def ignore(progress: Progress) -> None:
    """Show nothing."""


class Recipe(Protocol):
    """The interface of a recipe. Long operations are generators: they yield after each unit of work, to show the progress.

    A unit is an epoch, or a batch of the training set, or what `Progress` says. The attributes with values are defaults that a
    recipe inherits.
    """

    epochs: int
    """The default number of epochs of one call of `train`."""
    calibration_batches: int
    """How many times `calibrate` yields."""
    threads: int | None = None
    """How many CPU threads PyTorch uses during a run; None keeps the current number."""
    chosen: Mapping[str, Any] = {}
    """Settings of the run that the recipe has chosen itself, by name."""
    protected: Sequence[str] = ()
    """The names of activation calls that the recipe's network cannot do without."""
    notes: Sequence[str] = ()
    """Sentences for the user about what the recipe has chosen and found."""
    untrained: str | None = "its weights are random"
    """Why the network of `build_model` is of no use before it is trained; None if it is."""
    teacher: nn.Module | None = None
    """The network to learn from in `train`, beside the labels. Only recipes with the option distill use it."""

    def build_model(self) -> nn.Module:
        """Return a new network on the recipe's device. Its weights are drawn from torch's default random generator."""
        ...

    def train(self, model: nn.Module, epochs: int) -> Iterator[float | Progress]:
        """Train a network in place. Yield the mean training loss after each epoch, or the progress after each batch.

        Args:
            model: the network to train, in train mode.
            epochs: how many epochs to train. The learning rate passes through its whole schedule in these epochs.
        """
        ...

    def evaluate(self, model: nn.Module, split: Split, report: Report = ignore) -> float:
        """Return the accuracy of a network on the validation set or the test set, from 0 to 1. `report` is called meanwhile."""
        ...

    def calibrate(self, model: nn.Module) -> Iterator[Progress | None]:
        """Run the training set forward through a network, and yield after each batch.

        The entropies of the activations are measured in these passes.
        """
        ...

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the positional inputs of one call of the network, with the batch size for which latency is measured."""
        ...


def load_recipe(name: str, device: torch.device, report: Report = ignore, **options: Any) -> Recipe:
    """Create a recipe, and load its data onto a device.

    Args:
        name: a name in `RECIPES`.
        device: where the data and the networks are placed.
        report: called with the progress of reading the data, if that may take long.
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
        taken = inspect.signature(make).parameters
        for option in given:
            if option not in taken:
                raise ValueError(f"the recipe {name} takes no --{option.replace('_', '-')}; leave it out")
        recipe: Recipe = make(device, **given, **({"report": report} if "report" in taken else {}))
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ValueError(f"the recipe {name} needs {package}; install it with: {install_command(_EXTRAS[name])}") from error
    return recipe
