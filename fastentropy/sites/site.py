"""A site: one call of an activation in a forward pass, and the call itself while it is about to run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """Describe a site: one call of one activation in a forward pass.

    Attributes:
        name: the module's dotted path, with :1, :2, … for further calls of it in the same pass. The call of a function is named
            after the module whose forward makes it and after the function.
        activation: the name of the activation, such as "relu"; `register_activation` adds names.
        neurons: the number of neurons of the site. Where ranks of torch.distributed divide them, the number on this rank.
        channel_axis: the axis of the activation's input whose entries are the neurons.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> fe.find_sites(model, (torch.zeros(1, 3),))
        [Site(name='1', activation='relu', neurons=4, channel_axis=1)]
    """

    name: str
    activation: str
    neurons: int
    channel_axis: int


class Call(NamedTuple):
    """One activation that is about to run."""

    site: Site
    x: Tensor  # what the activation is given, which may be a DTensor
    is_token: Tensor | None  # bool [batch, tokens]: False where the batch is padded
    module: nn.Module | None  # None where a function is called
    function: str  # its name; empty where a module is called
    run: Callable[[], Any]
