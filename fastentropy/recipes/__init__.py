"""Recipes: a model, its data, and how to train, evaluate and calibrate it, ready for the command line."""

import importlib
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

#: Recipe name -> where it is: "module:class", imported when asked for.
RECIPES = {"digits": "fastentropy.recipes.digits:Digits"}

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


def load_recipe(name: str, device: torch.device) -> Recipe:
    """The recipe of that name with its data on a device. Raises ValueError for a name that is not in `RECIPES`."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    module, _, attribute = RECIPES[name].partition(":")
    recipe: Recipe = getattr(importlib.import_module(module), attribute)(device)
    return recipe
