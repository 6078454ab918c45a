"""Compile the repeated layers of a model, so that one compiled layer serves all of them."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compile the layers that a model repeats, each by itself, and return how many. Without such layers, compile the model.

    Layers alike share their compiled code, so a deep model compiles as fast as a shallow one (regional compilation).

    Args:
        model: the model, whose modules are compiled in place.
        options: options of `torch.compile`.
    """
    stacks = max(_stacks(model), key=_parameters, default=[model])
    for layer in stacks:
        layer.compile(**options)
    return len(stacks)


def _stacks(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Yield the lists of modules of a model that hold several modules of one class and nothing else."""
    for module in model.modules():
        layers = list(module) if isinstance(module, nn.ModuleList | nn.Sequential) else []
        if len(layers) > 1 and len({type(layer) for layer in layers}) == 1:
            yield layers


def _parameters(layers: list[nn.Module]) -> int:
    """Return the number of parameters of modules."""
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())
