"""Remember the sites (calls of activations) of a model, and how their inputs looked when the sites were discovered."""

import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastentropy._utils.text import plural
from fastentropy.sites.channel_axis import NO_AXIS
from fastentropy.sites.padding import BY_SHAPE, TokenAxes
from fastentropy.sites.passes import Pass
from fastentropy.sites.sharding import RankShare, Sharding, is_dtensor, local_tensor
from fastentropy.sites.siblings import Siblings
from fastentropy.sites.site import Site

#: What happens to a site of which an input has another number of neurons: "raise" raises RuntimeError, "skip" leaves it out.
Misfits = Literal["raise", "skip"]


class SiteRegistry:
    """Hold the sites of a model by name. A site is discovered in its first call and checked in every later call.

    Attributes:
        sites: the sites by name, in the order of their discovery.
        functional: the names of the sites that are calls of functions.
        notes: sentences about sites that are left out, and why.
        siblings: what is known of the same activations in other modules of a class.
    """

    def __init__(
        self,
        class_at: Callable[[str], type[nn.Module]],
        channel_axis: Mapping[str, int],
        exclude: Collection[str],
        misfits: Misfits,
    ) -> None:
        """Begin without sites.

        Args:
            class_at: a function that returns the class of the module at a dotted path.
            channel_axis: the neuron axes that the user gave, by name of the site.
            exclude: names of sites, or patterns of names, that are left out.
            misfits: what happens to a site of which an input has another number of neurons.
        """
        self.sites: dict[str, Site] = {}
        self.functional: set[str] = set()
        self.notes: list[str] = []
        self.siblings = Siblings(class_at)
        self._channel_axis, self._exclude, self._misfits = channel_axis, exclude, misfits
        self._left_out: dict[str, bool] = {}  # whether a site is left out, by its name
        self._ranks: dict[str, int] = {}  # the number of axes of the input, by name of the site
        self._shardings: dict[str, Sharding | None] = {}
        self._token_axes: dict[str, TokenAxes | None] = {}
        self._meshes: set[Any] = set()  # device meshes of the DTensors in the passes
        self._lock = threading.Lock()
        self._has_recommended = False
        self._inferred: list[str] = []  # names of the sites of which nobody has been warned yet

    def resolve(self, name: str, path: str, activation: str, x: Tensor, current: Pass[Any]) -> tuple[Site, Tensor] | None:
        """Return the site of a call, and this rank's part of its input; None if the site is left out.

        Args:
            name: the name of the site.
            path: the name without the number of the call (without :1, :2, …).
            activation: the name of the activation.
            x: the input, which may be a DTensor.
            current: the pass, which may know the channel axis and the sharding of `x`.

        Raises:
            RuntimeError: the input does not fit the known site, or the sharding of a new site cannot be determined.
            ValueError: the channel axis that the user gave is not an axis of the input.
        """
        site = self.sites.get(name)
        if site is not None and type(x) is Tensor and x.ndim == self._ranks[name] and site.activation == activation:
            axis = site.channel_axis
            if axis is None or (not x.is_nested and x.shape[axis] == site.neurons):
                return site, x  # as in almost all calls
        left_out = self._left_out.get(name)
        if left_out is None:
            left_out = self._left_out[name] = any(fnmatchcase(name, pattern) for pattern in self._exclude)
        if left_out:
            return None
        local = x if type(x) is Tensor else self._local_input(name, x)
        if site is None:
            with self._lock:
                site = self.sites[name] = self._discover(name, path, activation, x, current)
        elif site.activation != activation:
            self.note(f"site {name!r} was {site.activation} and is {activation} now; the counts of both are added up")
        if local.ndim != self._ranks[name]:
            site = self._with_other_rank(site, local)
        if site is None or (site.channel_axis is not None and _size(local, site.channel_axis) != site.neurons):
            self._leave_out(name, local)
            return None
        return site, local

    def is_left_out(self, name: str) -> bool:
        """Return whether a site is left out."""
        return self._left_out.get(name, False) or any(fnmatchcase(name, pattern) for pattern in self._exclude)

    def known(self, name: str, activation: str, x: Tensor) -> Site | None:
        """Return the site of a call with an input like `x`, which need not have values; None if no known site fits."""
        site = self.sites.get(name)
        if site is None or site.activation != activation or self._shardings[name] is not None or x.is_nested:
            return None
        if x.ndim != self._ranks[name]:
            site = self._with_other_rank(site, x)
        if site is None or site.channel_axis is None or _size(x, site.channel_axis) != site.neurons:
            return None
        return site

    def unlike_sibling(self, site: Site, ndim: int) -> str | None:
        """Return the name of a sibling of a site, whose input has as many axes, with another channel axis."""
        others = (name for name, other in list(self.sites.items()) if other.channel_axis != site.channel_axis)
        kind = self.siblings.kind(site.name, ndim)
        return next((name for name in others if self.siblings.kind(name, self._ranks[name]) == kind), None)

    def axes(self, name: str) -> tuple[int | None, TokenAxes | None]:
        """Return the channel axis of a known site, and its token axes."""
        return self.sites[name].channel_axis, self._token_axes[name]

    def axis_from_end(self, name: str) -> int | None:
        """Return the channel axis of a site, counted from the end: -1 is the last one. None if the site has none."""
        site = self.sites.get(name)
        return None if site is None or site.channel_axis is None else site.channel_axis - self._ranks[name]

    def known_or_new(self, name: str, like: Site, ndim: int) -> Site | None:
        """Return the site of a call in a compiled graph; None if it is left out.

        A further call of a layer is new, and gets a site like that for which the layer was compiled, with as many axes.
        """
        site = self.sites.get(name)
        if site is None and self.is_left_out(name):
            self._left_out[name] = True
            return None
        if site is None:
            with self._lock:
                site = self.sites[name] = replace(like, name=name)
                self._ranks[name], self._shardings[name] = ndim, None
                self._token_axes[name] = self._token_axes.get(like.name, BY_SHAPE)
        axes = site.channel_axis, like.channel_axis
        if site.neurons != like.neurons or (ndim == self._ranks[name] and axes[0] != axes[1]):
            neurons = f"{plural(like.neurons, 'neuron')} on axis {like.channel_axis}"
            self.note(f"site {name!r} was not counted in some calls, compiled for {neurons}")
            return None
        return site

    def check_left_out(self, name: str) -> None:
        """Note a call in a compiled graph that does not count it, if its site is not left out."""
        if self.is_left_out(name):
            self._left_out[name] = True
        else:
            self.note(f"site {name!r} was not counted in some calls, compiled for a module where it is left out")

    @property
    def left_out(self) -> list[str]:
        """Return the names of the sites that are left out."""
        return [name for name, is_left_out in self._left_out.items() if is_left_out]

    def token_axes(self, site: Site, x: Tensor) -> TokenAxes | None:
        """Return where the token positions lie in the input of a site; None if its values do not belong to tokens."""
        return self._token_axes[site.name] if x.ndim == self._ranks[site.name] else BY_SHAPE

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

    def note(self, text: str) -> None:
        """Add a sentence to the notes and warn of it, unless it is among them already."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, stacklevel=2)

    def unused(self) -> list[str]:
        """Return sentences about names of sites that the user gave and that no site has."""
        names = self._left_out.keys()
        patterns = [pattern for pattern in self._exclude if not any(fnmatchcase(name, pattern) for name in names)]
        axes = [name for name in self._channel_axis if name not in names]
        given = [("exclude", pattern) for pattern in patterns] + [("channel_axis", name) for name in axes]
        return [f"{option} names {name!r}, but no site has this name; the sites are {_first(names)}" for option, name in given]

    def warn_of_inferred(self) -> None:
        """Warn of the new sites of which the channel axis is a default, in one warning."""
        if not self._inferred:
            return
        with self._lock:
            names, self._inferred = self._inferred, []
        if names:
            site = self.sites[names[0]]
            warnings.warn(
                f"nothing tells where the neurons of {plural(len(names), 'site')} lie ({_first(names)}), so a default axis is "
                f"taken; if it is wrong, name it with channel_axis={{{site.name!r}: {site.channel_axis}}}",
                stacklevel=2,
            )

    def recommend_isolation(self, model: str) -> None:
        """Recommend `isolate`, in one warning, if the model calls activations as functions.

        Args:
            model: the name of the model's class, for the message.
        """
        names = sorted(self.functional)
        if not names or self._has_recommended:
            return
        self._has_recommended = True
        warnings.warn(
            f"{model} calls {len(names)} of its activations as functions ({_first(names)}); they are counted by a slower "
            "route, and fe.isolate(model, example_inputs) makes modules of them",
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

    def _discover(self, name: str, path: str, activation: str, x: Tensor, current: Pass[Any]) -> Site:
        """Return a new site. The arguments are those of `resolve`."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"site {name!r} is met for the first time while a CUDA graph is captured; "
                "run one forward pass with the collector attached before the capture"
            )
        kind = self.siblings.kind(path, x.ndim)
        found = self.siblings.find(x, kind, current)
        axis = self._channel_axis.get(name, found.axis)
        if name in self._channel_axis and not -x.ndim <= axis < x.ndim:
            raise ValueError(f"channel_axis of site {name!r} is {axis}, but its input has shape {list(x.shape)}")
        if name in self._channel_axis:
            found = found._replace(axis=axis % x.ndim, is_inferred=False)
        if is_dtensor(x):
            found = found._replace(sharding=Sharding.of(x))
        self._ranks[name], self.siblings.found[kind], self._shardings[name] = x.ndim, found, found.sharding
        self._token_axes[name] = found.token_axes
        if found.is_inferred:
            self._inferred.append(name)
        if found.axis == NO_AXIS:
            return Site(name, activation, 1, None)
        return Site(name, activation, _size(local_tensor(x), found.axis), found.axis, found.is_inferred)

    def _leave_out(self, name: str, x: Tensor) -> None:
        """Leave out a site of which an input has another number of neurons, from now on, or raise."""
        site = self.sites[name]
        shape = [_size(x, axis) for axis in range(x.ndim)]
        fitting = [axis for axis, size in enumerate(shape) if size == site.neurons]
        had = f"site {name!r} had {plural(site.neurons, 'neuron')} on axis {site.channel_axis} and now has an input of shape"
        if self._misfits == "raise":
            axes = f"{{{name!r}: {fitting[0]}}}" if fitting else f"{{{name!r}: …}}"
            where = f"axis {', '.join(map(str, fitting))} would fit" if fitting else "no axis would fit"
            raise RuntimeError(
                f"{had} {shape}, of which {where}; name its neuron axis with channel_axis={axes}, "
                f"or leave the site out with exclude=[{name!r}]"
            )
        with self._lock:
            self.sites.pop(name, None)
            self._left_out[name] = True
        self.note(f"{had} {shape}; it is left out")

    def _with_other_rank(self, site: Site, x: Tensor) -> Site | None:
        """Return the site for an input with more or fewer axes than in the first call; None if it does not fit.

        The channel axis keeps its index, counted from the front or from the back. The number of neurons decides which of the
        two. If the user gave the channel axis, that one is used.
        """
        if site.channel_axis is None:
            return site
        named = self._channel_axis.get(site.name)
        candidates = (
            [site.channel_axis, x.ndim - self._ranks[site.name] + site.channel_axis] if named is None else [named % x.ndim]
        )
        fitting = {axis for axis in candidates if 0 <= axis < x.ndim and _size(x, axis) == site.neurons}
        return replace(site, channel_axis=fitting.pop()) if len(fitting) == 1 else None


def _first(names: Collection[str]) -> str:
    """Return the first three names, for a message."""
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")


def _size(x: Tensor, axis: int) -> int:
    """Return the size of an axis of a tensor; -1 if the axis of a nested tensor has a size in each component."""
    if not x.is_nested:
        return x.shape[axis]
    sizes = {part.shape[axis - 1] for part in x.unbind()} if axis else {x.size(0)}
    return sizes.pop() if len(sizes) == 1 else -1
