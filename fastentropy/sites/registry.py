"""Remember the sites (calls of activations) of a model, and how their inputs looked when the sites were discovered."""

import threading
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.sharding import RankShare, Sharding, is_dtensor, local_tensor
from fastentropy.sites.site import Site


class SiteRegistry:
    """Hold the sites of a model by name. A site is discovered in its first call and checked in every later call.

    Attributes:
        sites: the sites by name, in the order of their discovery.
        functional: the names of the sites that are calls of functions.
    """

    def __init__(self, kinds: Mapping[str, type[nn.Module]], channel_axis: Mapping[str, int]) -> None:
        """Begin without sites.

        Args:
            kinds: the class of each module of the model, by dotted path.
            channel_axis: the neuron axes that the user gave, by name of the site.
        """
        self.sites: dict[str, Site] = {}
        self.functional: set[str] = set()
        self._kinds, self._channel_axis = kinds, channel_axis
        self._ranks: dict[str, int] = {}  # the number of axes of the input, by name of the site
        self._shardings: dict[str, Sharding | None] = {}
        self._meshes: set[Any] = set()  # device meshes of the DTensors in the passes
        # The channel axis and the sharding of a known activation. A module of the same class, with an activation in the same
        # attribute and with as many axes, gets the same ones. The key is (class, attribute, number of axes).
        self._siblings: dict[tuple[type[nn.Module], str, int], tuple[int, Sharding | None]] = {}
        self._lock = threading.Lock()
        self._has_recommended = False

    def resolve(self, name: str, path: str, activation: str, x: Tensor, tracker: AxisTracker | None) -> tuple[Site, Tensor]:
        """Return the site of a call, and this rank's part of its input.

        Args:
            name: the name of the site.
            path: the name without the number of the call (without :1, :2, …).
            activation: the name of the activation.
            x: the input, which may be a DTensor.
            tracker: the tracker that knows the channel axis and the sharding of `x`. None if the pass does not discover sites.

        Raises:
            RuntimeError: the input does not fit the known site, or the axis or the sharding of a new site cannot be determined.
            ValueError: the channel axis that the user gave is not an axis of the input.
        """
        local = x if type(x) is Tensor else self._local_input(name, x)
        site = self.sites.get(name)
        if site is None:
            with self._lock:
                site = self.sites[name] = self._discover(name, path, activation, x, tracker)
        elif local.ndim != self._ranks[name]:
            site = self._with_other_rank(site, local)
        if site.channel_axis is not None and local.shape[site.channel_axis] != site.neurons:
            raise _changed_shape(site, local)
        return site, local

    def share(self, site: Site) -> RankShare:
        """Return where this rank's counts of a site belong in the counts of all ranks.

        If the model has DTensors, but the input of this activation does not come from one, all ranks of their meshes are taken
        to hold the same input. Then only the first of these ranks is counted.
        """
        sharding = self._shardings[site.name]
        if sharding is not None and site.channel_axis is not None:
            return sharding.share(site.channel_axis, site.neurons)
        return RankShare(0, site.neurons, is_counted=not any(any(mesh.get_coordinate() or ()) for mesh in self._meshes))

    def tokens_here(self, is_token: Tensor, site: Site, x: Tensor) -> Tensor:
        """Return the part of a padding mask that belongs to this rank's input of a site.

        Args:
            is_token: bool [batch, tokens], False at padding.
            site: the site.
            x: this rank's part of the input of the site.

        Raises:
            RuntimeError: the tokens are divided among ranks, and it is not known which part of the mask belongs to `x`.
        """
        sharding = self._shardings[site.name]
        axis = site.channel_axis
        if sharding is None or axis is None or x.ndim not in (2, 3) or axis != x.ndim - 1 or not sharding.divides(axis):
            return is_token
        part = sharding.tokens(is_token, x.shape)
        if part is None:
            raise RuntimeError(
                f"the tokens of site {site.name!r} are divided among ranks, and it is not known which part of a padding mask "
                f"of shape {list(is_token.shape)} its input of shape {list(x.shape)} has; pass this rank's part of the mask"
            )
        return part

    def add_meshes(self, meshes: set[Any]) -> None:
        """Add the device meshes of the DTensors in a pass."""
        with self._lock:
            self._meshes |= meshes

    def recommend_isolation(self, model: str) -> None:
        """Recommend `isolate`, in one warning, if the model calls activations as functions.

        Args:
            model: the name of the model's class, for the message.
        """
        names = sorted(self.functional)
        if not names or self._has_recommended:
            return
        self._has_recommended = True
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(
            f"{model} calls {len(names)} of its activations as functions ({shown}); they are counted by a slower route, and "
            "fe.isolate(model, example_inputs) makes modules of them",
            stacklevel=2,
        )

    def _local_input(self, name: str, x: Tensor) -> Tensor:
        """Return this rank's part of the input of a site.

        Raises:
            RuntimeError: the input holds partial sums, or it is divided among ranks in another way than in the first pass.
        """
        if not is_dtensor(x):
            return x
        if any(placement.is_partial() for placement in x.placements):
            raise RuntimeError(
                f"the input of site {name!r} is a DTensor of partial sums {x.placements}, which the ranks have yet to add up; "
                "redistribute it to Replicate() or Shard(…) before the activation"
            )
        known = self._shardings.get(name)
        if known is not None and x.ndim == self._ranks[name] and known.axes != Sharding.of(x).axes:
            raise RuntimeError(
                f"the input of site {name!r} is divided among ranks in another way than in the first pass, now {x.placements}; "
                "collect such passes apart, with a collector for each"
            )
        return local_tensor(x)

    def _discover(self, name: str, path: str, activation: str, x: Tensor, tracker: AxisTracker | None) -> Site:
        """Return a new site.

        The channel axis is the one that the user gave, else the tracker's, else the one of the same activation in another
        module of the same class. The arguments are those of `resolve`.
        """
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"site {name!r} is met for the first time while a CUDA graph is captured; "
                "run one forward pass with the collector attached before the capture"
            )
        owner, _, attribute = path.rpartition(".")
        kind = (self._kinds.get(owner, nn.Module), attribute, x.ndim)
        axis, sharding = self._siblings.get(kind, (None, None))
        if tracker is not None:
            axis, sharding = tracker.axis_of(x), tracker.sharding_of(x)
            if axis is None:
                axis = 1 if x.ndim >= 4 else x.ndim - 1
        axis, sharding = self._channel_axis.get(name, axis), Sharding.of(x) if is_dtensor(x) else sharding
        if axis is None:
            raise RuntimeError(
                f"site {name!r} did not run in the first forward pass; name its neuron axis with channel_axis={{{name!r}: 1}}"
            )
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"channel_axis of site {name!r} is {axis}, but its input has shape {list(x.shape)}")
        axis %= x.ndim
        self._ranks[name], self._siblings[kind], self._shardings[name] = x.ndim, (axis, sharding), sharding
        return Site(name, activation, local_tensor(x).shape[axis], axis)

    def _with_other_rank(self, site: Site, x: Tensor) -> Site:
        """Return the site for an input with more or fewer axes than in the first call.

        The channel axis keeps its index, counted from the front or from the back. The number of neurons decides which of the
        two. If the user gave the channel axis, that one is used.
        """
        if site.channel_axis is None:
            return site
        named = self._channel_axis.get(site.name)
        candidates = (
            [site.channel_axis, x.ndim - self._ranks[site.name] + site.channel_axis] if named is None else [named % x.ndim]
        )
        fitting = {axis for axis in candidates if 0 <= axis < x.ndim and x.shape[axis] == site.neurons}
        if len(fitting) != 1:
            raise _changed_shape(site, x)
        return Site(site.name, site.activation, site.neurons, fitting.pop())


def _changed_shape(site: Site, x: Tensor) -> RuntimeError:
    """Return the error for an input that does not have as many neurons as the site."""
    return RuntimeError(
        f"site {site.name!r} had {site.neurons} neurons on axis {site.channel_axis} and now has an input of shape "
        f"{list(x.shape)}; name its neuron axis with channel_axis={{{site.name!r}: …}}"
    )
