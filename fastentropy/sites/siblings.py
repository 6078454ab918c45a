"""Remember how the inputs of activations looked, for the same activations in other modules of a class."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastentropy.sites.channel_axis import NO_AXIS
from fastentropy.sites.padding import BY_SHAPE, TokenAxes
from fastentropy.sites.passes import Pass
from fastentropy.sites.sharding import Sharding
from fastentropy.sites.site import Site

#: What siblings have in common: the class of the module, the attribute that holds the activation, the number of axes.
Kind = tuple[type[nn.Module], str, int | None]


class FoundAxis(NamedTuple):
    """What is known of the neurons of a site when it is discovered."""

    axis: int  # the channel axis, or NO_AXIS
    is_inferred: bool
    sharding: Sharding | None = None
    token_axes: TokenAxes | None = BY_SHAPE


class Siblings:
    """Hold what was found for sites. A module of the same class, with an activation in the same attribute, gets the same."""

    def __init__(self, class_at: Callable[[str], type[nn.Module]]) -> None:
        """Begin without sites. `class_at` is a function that returns the class of the module at a dotted path."""
        self._class_at = class_at
        self.found: dict[Kind, FoundAxis] = {}

    def kind(self, name: str, ndim: int | None) -> Kind:
        """Return what a site has in common with its siblings.

        Args:
            name: the name of the site, or its path.
            ndim: the number of axes of its input.
        """
        owner, _, attribute = name.partition(":")[0].rpartition(".")
        return self._class_at(owner), attribute, ndim

    def find(self, x: Tensor, kind: Kind, current: Pass[Any]) -> FoundAxis:
        """Return what is known of a new site.

        This is what the operators tell, in a pass in which they are followed; else what the layer before it tells; else what is
        known of the same activation in another module of the same class. Where nothing tells the channel axis, it is axis 1 for
        inputs with at least 4 axes (images), else the last axis.
        """
        default = 1 if x.ndim >= 4 else x.ndim - 1
        if current.tracker is not None:
            axis, sharding, token_axes = current.tracker.evidence(x)
            return FoundAxis(default if axis is None else axis, axis is None, sharding, token_axes)
        axis, is_certain = current.produced.channel_axis(x)
        sibling = self.found.get(kind)
        if sibling is not None and not is_certain:
            return sibling._replace(token_axes=BY_SHAPE)
        return FoundAxis(default if axis is None else axis, axis is None or not is_certain)

    def site_like(self, name: str, activation: str, x: Tensor) -> Site | None:
        """Return a site for a call that is left out, like those of its siblings; None if none of them has been found."""
        found = self.found.get(self.kind(name, x.ndim))
        if found is None or found.axis == NO_AXIS or found.sharding is not None or x.is_nested:
            return None
        return Site(name, activation, int(x.shape[found.axis]), found.axis)
