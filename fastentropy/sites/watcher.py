"""Watch the forward passes of a model, and report every call of an activation to an observer."""

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastentropy._compat import in_backward, is_compiled, is_functorch_tensor, path_when_uncompiled
from fastentropy.sites.activations import activation_name, function_name
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.interception import Interception, original_class
from fastentropy.sites.observer import Observer
from fastentropy.sites.padding import Mask, mask_argument, token_mask
from fastentropy.sites.registry import SiteRegistry
from fastentropy.sites.sharding import local_tensor
from fastentropy.sites.site import Call, Site

P = TypeVar("P")


@dataclass
class _Pass(Generic[P]):
    """A forward pass in one thread: the outermost call of the model, or of a part of it."""

    observed: P  # the value that the observer's begin_pass returned
    tracker: AxisTracker | None  # None if the pass does not discover sites
    follows_owners: bool  # whether the watcher must know which module's forward is running
    calls: dict[str, int] = field(default_factory=dict)  # the number of calls so far, by path
    owners: list[str] = field(default_factory=list)  # paths of the modules whose forwards are running, outermost first
    is_token: Tensor | None = None  # the padding mask that applies, bool [batch, tokens]
    inside_activation: bool = False  # whether an activation is running


class SiteWatcher(Generic[P]):
    """Report every activation call of a model to an observer while attached. The observer runs the activation.

    Each such call belongs to a site, which is one call of an activation in a forward pass. Sites are discovered in the first
    complete pass through each module that is called from outside. Each thread has passes of its own. Activation checkpointing
    repeats forwards during backward; these are not reported.

    Attributes:
        registry: the sites that were discovered.
        activations: the name of the activation of each activation module, by dotted path.
    """

    def __init__(
        self,
        model: nn.Module,
        observer: Observer[P],
        channel_axis: Mapping[str, int] | None = None,
        mask: Mask = None,
    ) -> None:
        """Prepare to watch a model.

        Args:
            model: any module.
            observer: the object that runs the activations.
            channel_axis: the axis of the neurons, by name of the site, for sites where it should not be inferred.
            mask: where the padding mask of a call comes from: the name of an argument, a function, or None (see `Mask`).
        """
        self._model, self._observer = model, observer
        self._mask = mask
        modules = {path_when_uncompiled(name): module for name, module in model.named_modules()}
        self.activations = {name: activation for name, module in modules.items() if (activation := activation_name(module))}
        containers = {
            name: module
            for name, module in modules.items()
            if name not in self.activations and (module is model or not _is_plain(module))
        }
        self._paths = frozenset(modules)
        kinds = {name: original_class(module) for name, module in modules.items()}
        self.registry = SiteRegistry(kinds, dict(channel_axis or {}))
        self._mask_arguments = {
            name: argument
            for name, module in containers.items()
            if isinstance(mask, str) and (argument := mask_argument(module, mask))
        }
        self._handled = {name: (module, self._run_container) for name, module in containers.items()}
        self._handled |= {name: (modules[name], self._run_activation) for name in self.activations}
        self._interception = Interception(model)
        self._entries: set[str] = set()
        self._thread = threading.local()
        self._warned_of_mask = False

    def attach(self) -> None:
        """Begin to watch.

        Raises:
            RuntimeError: the model, or a part of it, is being watched already.
            ValueError: activations are compiled by TorchScript.
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
    def sites(self) -> dict[str, Site]:
        """Return the sites that were discovered, by name."""
        return self.registry.sites

    @property
    def is_attached(self) -> bool:
        """Return whether the model is being watched."""
        return self._interception.is_attached

    def _run_container(
        self, name: str, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward of a module that is not an activation. A call from outside begins a pass.

        This is a handler of `Interception`, so the arguments are those of `interception.Handler`.
        """
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
        """Run the forward of an activation module, and report it to the observer unless another activation calls it.

        This is a handler of `Interception`, so the arguments are those of `interception.Handler`.
        """
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not _is_countable(x) or in_backward():
            return original(module, *args, **kwargs)
        current: _Pass[P] | None = getattr(self._thread, "current", None)
        if current is None:
            with self._new_pass(name, args, kwargs):
                return self._run_activation(name, module, original, args, kwargs)
        if current.inside_activation:  # another activation calls this one as a part of itself
            return original(module, *args, **kwargs)
        activation = self.activations[name]
        return self._show(current, name, activation, x, module, "", lambda: original(module, *args, **kwargs))

    def run_function(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a PyTorch function that is called during a pass. If it is an activation, report it to the observer.

        Args:
            function: the function, or the method of Tensor.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            The output of the function.
        """
        current: _Pass[P] | None = getattr(self._thread, "current", None)
        activation = function_name(function)
        x = args[0] if args else kwargs.get("input")
        if activation is None or current is None or current.inside_activation or not _is_countable(x) or in_backward():
            return function(*args, **kwargs)
        name = self._function_path(current.owners[-1] if current.owners else "", function.__name__.strip("_"))
        index = current.calls.get(name, 0)
        self.registry.functional.add(f"{name}:{index}" if index else name)
        return self._show(current, name, activation, x, None, function.__name__, lambda: function(*args, **kwargs))

    def _function_path(self, owner: str, function: str) -> str:
        """Return the path for the calls of a function by the module with the path `owner`.

        If a module of the model has this path, a number is added to it.
        """
        path = f"{owner}.{function}".lstrip(".")
        index = 0
        while path in self._paths:
            index += 1
            path = f"{owner}.{function}_{index}".lstrip(".")
        return path

    @contextlib.contextmanager
    def _new_pass(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[_Pass[P]]:
        """Run a call from outside as a pass, inside the block.

        The first complete pass of each module discovers sites. For this it follows every operator.
        """
        tracker = None if name in self._entries else AxisTracker(self._model.parameters())
        follows_owners = tracker is not None or bool(self.registry.functional)
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
                self.registry.add_meshes(tracker.meshes)
            self._observer.end_pass(current.observed, completed)

    @contextlib.contextmanager
    def _inside(self, current: _Pass[P], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Run the forward of a module inside the block.

        In the block, calls of functions are named after the module, and the padding mask that the module was given applies.
        """
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
        """Warn, once, that an argument with the name of the padding mask holds something else, which is ignored."""
        if not self._warned_of_mask:
            self._warned_of_mask = True
            given = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            warnings.warn(
                f"{self._mask} of {given} does not tell which tokens are padding, so all are counted; pass one of shape "
                "[batch, tokens], or collect with a function as mask=",
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
        """Resolve the site of an activation call, let the observer run the call, and return its output.

        Args:
            current: the pass.
            path: the path of the activation module, or of the function's calls.
            activation: the name of the activation.
            x: the input of the activation.
            module: the activation module, or None if a function is called.
            function: the name of the function; empty if a module is called.
            run: a function that runs the activation and returns its output.
        """
        index = current.calls.get(path, 0)
        current.calls[path] = index + 1
        name = f"{path}:{index}" if index else path
        site, local = self.registry.resolve(name, path, activation, x, current.tracker)
        is_token = current.is_token
        if is_token is not None:
            is_token = self.registry.tokens_here(is_token, site, local)
        before, current.inside_activation = current.inside_activation, True
        try:
            return self._observer.run_activation(current.observed, Call(site, x, is_token, module, function, run))
        finally:
            current.inside_activation = before


class _FunctionCalls(TorchFunctionMode):
    """Hand every PyTorch function that is called while this mode is active to a watcher, which runs it."""

    def __init__(self, watcher: SiteWatcher[Any]) -> None:
        """Prepare to hand functions to `watcher`."""
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let the watcher run `func`, because it reports the function if it is an activation."""
        return self._watcher.run_function(func, args, kwargs or {})


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module's forward cannot call an activation that the watcher would see.

    This is so for modules of torch.nn without children, and for modules that TorchScript has compiled.
    """
    childless = next(module.children(), None) is None
    return (childless and type(module).__module__.startswith("torch.nn.modules.")) or isinstance(module, torch.jit.ScriptModule)


def _is_scripted_activation(module: nn.Module) -> bool:
    """Return whether a module was compiled by TorchScript and runs an activation."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    operators = re.findall(r"aten::(\w+)", str(getattr(module, "inlined_graph", "")))
    functions = [getattr(namespace, name, None) for name in operators for namespace in (torch.Tensor, F)]
    return any(function is not None and function_name(function) for function in functions)


def _is_countable(x: Any) -> TypeGuard[Tensor]:
    """Return whether a value has neurons to count: a floating-point tensor with axes that is not a parameter.

    Raises:
        RuntimeError: the value belongs to a transform of torch.func.
    """
    if isinstance(x, Tensor) and is_functorch_tensor(x):
        raise RuntimeError(
            "activations cannot be counted inside of torch.func transforms; collect while the model is called alone"
        )
    is_activation = type(x) is Tensor or (isinstance(x, Tensor) and not isinstance(x, nn.Parameter))
    return is_activation and x.is_floating_point() and x.ndim > 0
