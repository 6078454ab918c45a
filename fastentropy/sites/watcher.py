"""Watch the forward passes of a model and show an observer every call of an activation."""

import contextlib
import copy
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fastentropy._compat import buffers_of, in_backward, is_compiled, is_functorch_tensor, path_when_uncompiled
from fastentropy.sites.activations import activation_name, function_name
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.interception import Interception, original_class
from fastentropy.sites.padding import Mask, mask_argument, token_mask
from fastentropy.sites.sharding import RankShare, Sharding, is_dtensor, local_tensor
from fastentropy.sites.site import Call, Site

P = TypeVar("P")


class Observer(Protocol[P]):
    """Looks on at forward passes. What begin_pass returns is given to the other two."""

    def begin_pass(self) -> P:
        """The model, or a part of it, is called from outside."""
        ...

    def run_activation(self, forward_pass: P, call: Call) -> Any:
        """Run an activation, before or after looking at its input, and return its output."""
        ...

    def end_pass(self, forward_pass: P, completed: bool) -> None:
        """The call is over; not completed where it raised."""
        ...


def find_sites(model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> list[Site]:
    """The sites of a model in call order, from one forward pass in eval mode. The model is left as it was.

    Of a model that is divided among ranks (tensor parallel), these are the sites and neurons of this rank.

    Args:
        model: any module.
        example_inputs: the positional inputs of one call, or a mapping of its keyword inputs.

    Raises:
        ValueError: the model calls no known activation.
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
    """The output of a model in eval mode; its buffers, training mode and torch's random numbers are left as they were."""
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
    """The error for a model in which no activation was found."""
    return (
        f"{type(model).__name__} calls no known activation: use those of torch.nn or torch.nn.functional, "
        "or make yours known with fe.register_activation(YourModule, 'name')"
    )


@dataclass
class _Pass(Generic[P]):
    """A forward pass in one thread: the call of the model, or of a part of it, that no other call is around."""

    observed: P
    tracker: AxisTracker | None  # in passes that discover
    follows_owners: bool  # whether it must be known whose forward is running
    calls: dict[str, int] = field(default_factory=dict)  # how often each path was called
    owners: list[str] = field(default_factory=list)
    is_token: Tensor | None = None
    inside_activation: bool = False


class SiteWatcher(Generic[P]):
    """Shows an observer every activation call of a model while attached, before the activation runs.

    Sites are discovered in the first complete pass through each module that is called from outside. Passes of several threads
    are kept apart. A forward that activation checkpointing repeats during backward is not shown.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer[P],
        channel_axis: Mapping[str, int] | None = None,
        mask: Mask = None,
    ) -> None:
        """Prepare to watch a model. channel_axis names the neuron axis of sites where it should not be inferred."""
        self.sites: dict[str, Site] = {}
        self.functional_sites: set[str] = set()
        self._model, self._observer = model, observer
        self._channel_axis, self._mask = dict(channel_axis or {}), mask
        modules = {path_when_uncompiled(name): module for name, module in model.named_modules()}
        self.activations = {name: activation for name, module in modules.items() if (activation := activation_name(module))}
        containers = {
            name: module
            for name, module in modules.items()
            if name not in self.activations and (module is model or not _is_plain(module))
        }
        self._kinds = {name: original_class(module) for name, module in modules.items()}
        self._mask_arguments = {
            name: argument
            for name, module in containers.items()
            if isinstance(mask, str) and (argument := mask_argument(module, mask))
        }
        self._handled = {name: (module, self._run_container) for name, module in containers.items()}
        self._handled |= {name: (modules[name], self._run_activation) for name in self.activations}
        self._interception = Interception(model)
        self._ranks: dict[str, int] = {}
        self._shardings: dict[str, Sharding | None] = {}
        self._meshes: set[Any] = set()  # of the DTensors that were met
        self._siblings: dict[tuple[type[nn.Module], str, int], tuple[int, Sharding | None]] = {}
        self._entries: set[str] = set()
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._warned_of_mask = False

    def attach(self) -> None:
        """Begin to watch.

        Raises RuntimeError where the model is being watched already, and ValueError where activations are in TorchScript.
        """
        if scripted := [name for name, module in self._model.named_modules() if _is_scripted_activation(module)]:
            raise ValueError(
                f"{path_when_uncompiled(scripted[0])!r} is compiled by TorchScript, where calls cannot be seen; "
                "collect on the model as it was before torch.jit.script"
            )
        if compiled := [name for name, module in self._model.named_modules() if is_compiled(module)]:
            parts = ", ".join(path_when_uncompiled(name) or "as a whole" for name in compiled)
            warnings.warn(
                f"{original_class(self._model).__name__} is compiled ({parts}); while a collector is attached it runs eagerly, "
                "so that every activation is counted",
                stacklevel=4,
            )
        self._thread = threading.local()
        self._interception.attach(self._handled)

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        self._interception.detach()

    @property
    def is_attached(self) -> bool:
        """Whether calls are watched."""
        return self._interception.is_attached

    def share(self, site: Site) -> RankShare:
        """What the counts of a site are among those of all ranks.

        In a model that has DTensors, an activation whose input comes from none is the same on all ranks of their meshes.
        """
        sharding = self._shardings[site.name]
        if sharding is not None:
            return sharding.share(site.channel_axis, site.neurons)
        return RankShare(0, site.neurons, is_counted=not any(any(mesh.get_coordinate() or ()) for mesh in self._meshes))

    def _run_container(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        current: _Pass[P] | None = getattr(self._thread, "current", None)
        if current is not None and not current.follows_owners and name not in self._mask_arguments:
            return original(module, *args, **kwargs)
        if in_backward():
            return original(module, *args, **kwargs)
        if current is None:
            with self._new_pass(name, args, kwargs) as current, self._inside(current, name, args, kwargs):
                return original(module, *args, **kwargs)
        with self._inside(current, name, args, kwargs):
            return original(module, *args, **kwargs)

    def _run_activation(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not _is_countable(x) or in_backward():
            return original(module, *args, **kwargs)
        current: _Pass[P] | None = getattr(self._thread, "current", None)
        if current is None:
            with self._new_pass(name, args, kwargs):
                return self._run_activation(name, module, original, args, kwargs)
        if current.inside_activation:  # a part of another one
            return original(module, *args, **kwargs)
        activation = self.activations[name]
        return self._show(current, name, activation, x, module, "", lambda: original(module, *args, **kwargs))

    def run_function(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run any PyTorch function that is called in a pass; one of an activation is a site."""
        current: _Pass[P] | None = getattr(self._thread, "current", None)
        activation = function_name(function)
        x = args[0] if args else kwargs.get("input")
        if activation is None or current is None or current.inside_activation or not _is_countable(x) or in_backward():
            return function(*args, **kwargs)
        name = self._functionpath_when_uncompiled(current.owners[-1] if current.owners else "", function.__name__.strip("_"))
        index = current.calls.get(name, 0)
        self.functional_sites.add(f"{name}:{index}" if index else name)
        return self._show(current, name, activation, x, None, function.__name__, lambda: function(*args, **kwargs))

    def _functionpath_when_uncompiled(self, owner: str, function: str) -> str:
        """The name of a function's calls by a module: one that is no other module's path."""
        path = f"{owner}.{function}".lstrip(".")
        index = 0
        while path in self._kinds:
            index += 1
            path = f"{owner}.{function}_{index}".lstrip(".")
        return path

    @contextlib.contextmanager
    def _new_pass(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[_Pass[P]]:
        """A call from outside. The first one through each module discovers sites, and so follows every operator."""
        tracker = None if name in self._entries else AxisTracker(self._model.parameters())
        follows_owners = tracker is not None or bool(self.functional_sites)
        current = _Pass(self._observer.begin_pass(), tracker, follows_owners)
        if callable(self._mask):
            current.is_token = token_mask(local_tensor(self._mask(args, kwargs)), args, kwargs)
        completed = False
        try:
            self._thread.current = current
            with contextlib.ExitStack() as modes:
                if follows_owners:
                    modes.enter_context(_FunctionCalls(self))
                if tracker is not None:
                    modes.enter_context(tracker.following())
                yield current
            completed = True
        finally:
            self._thread.current = None
            if completed:
                self._entries.add(name)
            if tracker is not None:
                with self._lock:
                    self._meshes |= tracker.meshes
            self._observer.end_pass(current.observed, completed)

    @contextlib.contextmanager
    def _inside(self, current: _Pass[P], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """The forward of a module: functional calls are named after it, and its padding mask holds."""
        is_token = current.is_token
        if name in self._mask_arguments:
            given, mask = self._mask_arguments[name].given(args, kwargs)
            if given and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
                current.is_token = token_mask(local_tensor(mask), args, kwargs)
            elif given and not current.owners:
                self._warn_of_mask(mask)
        current.owners.append(name)
        try:
            yield
        finally:
            current.owners.pop()
            current.is_token = is_token

    def _warn_of_mask(self, mask: Any) -> None:
        if not self._warned_of_mask:
            self._warned_of_mask = True
            given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            warnings.warn(
                f"{self._mask} of {given} does not say which tokens are padding, so they are counted; pass [batch, tokens], or "
                "collect with a function as mask=",
                stacklevel=2,
            )

    def _show(
        self,
        current: _Pass[P],
        path: str,
        activation: str,
        x: Tensor,
        module: nn.Module | None,
        function: str,
        run: Callable[[], Any],
    ) -> Any:
        """Find out which site this is, and let the observer run it."""
        index = current.calls.get(path, 0)
        current.calls[path] = index + 1
        name = f"{path}:{index}" if index else path
        local = x if type(x) is Tensor else self._local_input(name, x)
        site = self.sites.get(name)
        if site is None:
            with self._lock:
                site = self.sites[name] = self._discover(name, path, activation, x, current.tracker)
        elif local.ndim != self._ranks[name]:
            site = self._with_other_rank(site, local)
        if local.shape[site.channel_axis] != site.neurons:
            raise _changed_shape(site, local)
        is_token = current.is_token if current.is_token is None else self._tokens_here(current.is_token, site, local)
        before, current.inside_activation = current.inside_activation, True
        try:
            return self._observer.run_activation(current.observed, Call(site, x, is_token, module, function, run))
        finally:
            current.inside_activation = before

    def _local_input(self, name: str, x: Tensor) -> Tensor:
        """What this rank has of the input of a site."""
        if not is_dtensor(x):
            return x
        if any(placement.is_partial() for placement in x.placements):
            raise RuntimeError(
                f"the input of site {name!r} is a DTensor of sums that ranks have yet to add up {x.placements}; "
                "redistribute it to Replicate() or Shard(…) before the activation"
            )
        known = self._shardings.get(name)
        if known is not None and x.ndim == self._ranks[name] and known.axes != Sharding.of(x).axes:
            raise RuntimeError(
                f"the input of site {name!r} is divided among ranks otherwise than in the first pass, now {x.placements}; "
                "collect such passes apart, with a collector for each"
            )
        return local_tensor(x)

    def _tokens_here(self, is_token: Tensor, site: Site, x: Tensor) -> Tensor:
        """The part of a padding mask that this rank's input of a site is about."""
        sharding = self._shardings[site.name]
        may_be_tokens = x.ndim in (2, 3) and site.channel_axis == x.ndim - 1
        if sharding is None or not may_be_tokens or not sharding.divides(site.channel_axis):
            return is_token
        part = sharding.tokens(is_token, x.shape)
        if part is None:
            raise RuntimeError(
                f"the tokens of site {site.name!r} are divided among ranks, and which part of a padding mask of shape "
                f"{list(is_token.shape)} its input of shape {list(x.shape)} has is not known; pass this rank's part of the mask"
            )
        return part

    def _discover(self, name: str, path: str, activation: str, x: Tensor, tracker: AxisTracker | None) -> Site:
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
        """The site for an input with more or fewer axes: its axis counted from the first or the last, as the size tells."""
        named = self._channel_axis.get(site.name)
        candidates = (
            [site.channel_axis, x.ndim - self._ranks[site.name] + site.channel_axis] if named is None else [named % x.ndim]
        )
        fitting = {axis for axis in candidates if 0 <= axis < x.ndim and x.shape[axis] == site.neurons}
        if len(fitting) != 1:
            raise _changed_shape(site, x)
        return Site(site.name, site.activation, site.neurons, fitting.pop())


class _FunctionCalls(TorchFunctionMode):
    """Shows a watcher every PyTorch function that is called while active."""

    def __init__(self, watcher: SiteWatcher[Any]) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one function."""
        return self._watcher.run_function(func, args, kwargs or {})


class NoObserver:
    """Lets every activation run, and looks at nothing."""

    def begin_pass(self) -> None:
        """Begin."""

    def run_activation(self, forward_pass: None, call: Call) -> Any:
        """Run it."""
        return call.run()

    def end_pass(self, forward_pass: None, completed: bool) -> None:
        """End."""


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's forward calls no activation: those of torch.nn without modules inside, and code that is not Python."""
    childless = next(module.children(), None) is None
    return (childless and type(module).__module__.startswith("torch.nn.modules.")) or isinstance(module, torch.jit.ScriptModule)


def _is_scripted_activation(module: nn.Module) -> bool:
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    operators = re.findall(r"aten::(\w+)", str(getattr(module, "inlined_graph", "")))
    functions = [getattr(namespace, name, None) for name in operators for namespace in (torch.Tensor, F)]
    return any(function is not None and function_name(function) for function in functions)


def _is_countable(x: Any) -> TypeGuard[Tensor]:
    """Whether a value has neurons: an activation of a number or of a parameter of the model has none."""
    if isinstance(x, Tensor) and is_functorch_tensor(x):
        raise RuntimeError(
            "activations cannot be counted inside of torch.func transforms; collect while the model is called alone"
        )
    is_activation = type(x) is Tensor or (isinstance(x, Tensor) and not isinstance(x, nn.Parameter))
    return is_activation and x.is_floating_point() and x.ndim > 0


def _changed_shape(site: Site, x: Tensor) -> RuntimeError:
    return RuntimeError(
        f"site {site.name!r} had {site.neurons} neurons on axis {site.channel_axis} and now has an input of shape "
        f"{list(x.shape)}; name its neuron axis with channel_axis={{{site.name!r}: …}}"
    )
