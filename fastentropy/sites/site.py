"""Describe a site (one call of an activation in a forward pass), and such a call when it is about to run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastentropy.sites.padding import BY_SHAPE, TokenAxes


@dataclass(frozen=True)
class Site:
    """Describe a site: one call of one activation in a forward pass.

    Attributes:
        name: for a module, its dotted path. For a function, the dotted path of the module whose forward calls it, followed by
            the name of the function. If the same forward pass calls it again, the further sites have :1, :2, … at the end.
        activation: the name of the activation, such as "relu"; `register_activation` adds names.
        neurons: the number of neurons of the site. If ranks of torch.distributed divide the neurons, the number on this rank.
        channel_axis: the axis of the activation's input whose entries are the neurons. None if the site is one neuron to which
            all values of the input belong, because the axis of size 1 was squeezed away.
        axis_is_inferred: whether the channel axis is a default. It is if nothing told where the neurons lie.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> fe.find_sites(model, (torch.zeros(1, 3),))
        [Site(name='1', activation='relu', neurons=4, channel_axis=1, axis_is_inferred=False)]
    """

    name: str
    activation: str
    neurons: int
    channel_axis: int | None
    axis_is_inferred: bool = field(default=False, compare=False)


class Call(NamedTuple):
    """A call of an activation that is about to run."""

    site: Site
    x: Tensor  # the input of the activation; it may be a DTensor
    is_token: Tensor | None  # bool [batch, tokens]: False at padding; None if nothing is known to be padding
    module: nn.Module | None  # the activation module; None if a function is called
    function: str  # the name of the function; empty if a module is called
    run: Callable[[], Any]  # runs the activation and returns its output
    token_axes: TokenAxes | None = BY_SHAPE  # where the positions of `is_token` lie in x; None if x has none of them
    is_factor: bool = False  # whether the output is only multiplied by that of a linear layer, which runs next (see `products`)
