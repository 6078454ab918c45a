"""Sites: the calls of rectifiers in a forward pass, their names, and which axis of their input holds the neurons."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One call of one activation in a forward pass.

    Attributes:
        name: the module's dotted path, with :1, :2, … for further calls of it in the same pass. A functional call is named
            after the module whose forward makes it and the function.
        activation: the name of the activation in the table of `activations`.
        neurons: how many neurons the site has. Where ranks of torch.distributed divide them, these are those of this rank.
        channel_axis: the axis of the activation's input whose entries are the neurons.
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
