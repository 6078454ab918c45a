"""Find the sites (calls of activations) of a model in one forward pass that leaves the model as it was."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastentropy._compat import buffers_of
from fastentropy.sites.observer import NoObserver
from fastentropy.sites.site import Site
from fastentropy.sites.watcher import SiteWatcher


def find_sites(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> list[Site]:
    """Find the sites (call sites of activations) of a model, in call order.

    The model runs once in eval mode and is left as it was. If the model is divided among ranks (tensor parallel), the result
    describes the sites of this rank, with the number of neurons on this rank.

    Args:
        model: any module.
        example_inputs: the positional inputs of one call, or a mapping of its keyword inputs.

    Returns:
        One `Site` for each call of a known activation.

    Raises:
        ValueError: the model calls no known activation.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> relu = torch.nn.ReLU()
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), relu, torch.nn.Conv2d(4, 2, 3), relu)
        >>> [(site.name, site.neurons) for site in fe.find_sites(model, (torch.zeros(1, 1, 8, 8),))]
        [('1', 4), ('1:1', 2)]
    """
    watcher = SiteWatcher(model, NoObserver())
    watcher.attach()
    try:
        call_once(model, example_inputs)
    finally:
        watcher.detach()
    if not watcher.sites:
        raise ValueError(no_sites(model))
    return list(watcher.sites.values())


@torch.no_grad()
def call_once(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> Any:
    """Call a model in eval mode without gradients, and return its output.

    The model's buffers, its training mode, the inputs and torch's random generators are left as they were.

    Args:
        model: any module.
        example_inputs: the positional inputs, or a mapping of the keyword inputs.
    """
    training = [module for module in model.modules() if module.training]
    buffers = [
        (module, name, buffer, None if buffer is None or is_lazy(buffer) else buffer.clone())
        for module in model.modules()
        for name, buffer in buffers_of(module).items()
    ]
    inputs = copy.deepcopy(example_inputs)  # a model may write over its inputs
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        with torch.random.fork_rng():
            return model.eval()(*args, **kwargs)
    finally:
        for module in training:
            module.training = True
        for owner, name, buffer, before in buffers:
            buffers_of(owner)[name] = buffer  # the forward may have put another one there
            if buffer is not None and before is not None:
                buffer.copy_(before)


def no_sites(model: nn.Module) -> str:
    """Return the error message for a model in which no activation was found."""
    return (
        f"{type(model).__name__} calls no known activation: use those of torch.nn or torch.nn.functional, "
        "or make yours known with fe.register_activation(YourModule, 'name')"
    )
