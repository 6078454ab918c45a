"""Report the activation calls of a pass to an observer, each with its site."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastentropy._compat import (
    has_pre_hooks,
    in_function_mode,
    is_functorch_tensor,
    runs_only_forward,
    stack_frame,
    without_intercepting,
    without_modes,
)
from fastentropy.sites import operators
from fastentropy.sites.activations import ELEMENTWISE, FusedActivation, fused_activation
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.modules import WatchedModules
from fastentropy.sites.naming import CallNames, Key, Places
from fastentropy.sites.observer import NOT_RUN, Observer
from fastentropy.sites.passes import Pass
from fastentropy.sites.products import Product, is_plain, product_at
from fastentropy.sites.registry import SiteRegistry
from fastentropy.sites.site import Call

P = TypeVar("P")

#: Source files of the stack frames between the code that calls an activation function and the watcher.
_BETWEEN = frozenset({
    *(str(Path(__file__).parent / name) for name in ("reporter.py", "watcher.py", "operators.py", "channel_axis.py")),
    str(Path(operators.__file__).parent.parent / "_compat" / "interception.py"),
    *(
        str(Path(torch.__file__).parent / name)
        for name in ("nn/functional.py", "nn/modules/module.py", "overrides.py", "_tensor.py", "utils/_device.py")
    ),
})  # fmt: skip


#: The source file of the function that calls the forward of a module.
_MODULE_CALLS = str(Path(torch.__file__).parent / "nn/modules/module.py")


class CallReporter(Generic[P]):
    """Find the site of each activation call, and let an observer run the call.

    Attributes:
        names: the names of the calls.
        places: the places in the code at which they are made.
    """

    def __init__(self, modules: WatchedModules, registry: SiteRegistry, observer: Observer[P]) -> None:
        """Report calls of a model's `modules` to `observer`."""
        self._modules, self._registry, self._observer = modules, registry, observer
        self.names, self.places = CallNames(), Places()
        self._products: dict[tuple[int, int], Product | None] = {}  # by the place in the code of their first factor
        self._fused: dict[nn.Module, FusedActivation | None] = {}

    def run_module(
        self,
        current: Pass[P],
        path: str,
        caller: FrameType,
        module: nn.Module,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Report and run a call of an activation module.

        Args:
            current: the pass.
            path: the path of the module.
            caller: the stack frame that calls the module.
            module: the module.
            original: the function that runs the module, as original(module, *args, **kwargs).
            args: the positional arguments of the call.
            kwargs: its keyword arguments.
        """
        key = (path, False, self.places.of(caller), current.produced.for_path(path))

        def run() -> Any:
            with without_intercepting():
                return original(module, *args, **kwargs)

        if has_pre_hooks(module):
            y = self._run_after_hooks(current, key, module, run)
        elif is_countable(x := args[0] if args else _input(args, kwargs)):
            place = key[2]
            if place not in self._products:
                self._products[place] = product_at(caller.f_code, place[1])
            product = self._products[place]
            is_factor = product is not None and self._is_factor(current, product, caller, module)
            y = self._report(current, key, self._modules.activations[path], x, run, module, is_factor=is_factor)
        else:
            return original(module, *args, **kwargs)
        current.produced.set(path, module, y)
        return y

    def _is_factor(self, current: Pass[P], product: Product, caller: FrameType, module: nn.Module) -> bool:
        """Return whether the output of an activation module is only multiplied by that of a linear layer, which runs next.

        Where a forward is called without its module, it is not known of which module it reads the layers.
        """
        before = caller.f_back
        if current.tracker is not None or not current.owners or before is None or before.f_code.co_filename != _MODULE_CALLS:
            return False
        owner = self._modules.kinds.get(current.owners[-1])
        return owner is not None and is_plain(product, caller.f_code, owner[0], module)

    def _run_after_hooks(self, current: Pass[P], key: Key, module: nn.Module, run: Callable[[], Any]) -> Any:
        """Run an activation module whose hooks may change its input. A further hook, the last one, reports what they return."""
        thread, activation = threading.get_ident(), self._modules.activations[key[0]]

        def report(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == thread and is_countable(x := _input(args, kwargs)):
                self._report(current, key, activation, x, lambda: None, module)

        hook = module.register_forward_pre_hook(report, with_kwargs=True)
        current.inside_activation = True
        try:
            return run()
        finally:
            current.inside_activation = False
            hook.remove()

    def run_function(
        self,
        current: Pass[P],
        frame: FrameType,
        function: Callable[..., Any],
        activation: str,
        x: Tensor,
        run: Callable[[], Any],
    ) -> Any:
        """Report and run a call of a function that is an activation.

        If the function is called by the forward of an activation module, which somebody has called without the module, the call
        is reported as one of the module.

        Args:
            current: the pass.
            frame: the stack frame that calls the function.
            function: the function or operator.
            activation: the name of the activation.
            x: the input of the activation.
            run: a function that runs it and returns its output.
        """
        path = self._modules.activation_in(frame)
        if path in self._modules.activations:
            caller, module = _outside(frame.f_back or frame), self._modules.kinds[path][0]
            key = (path, False, self.places.of(caller), current.produced.for_path(path))
            return self._report(current, key, self._modules.activations[path], x, run, module)
        called: str = getattr(getattr(function, "overloadpacket", function), "__name__", "function")
        path = self._modules.function_path(current.owners[-1] if current.owners else "", called.strip("_"))
        key = (path, True, self.places.of(frame), current.produced.path)
        return self._report(current, key, activation, x, run, function=called, operator=function)

    def _report(
        self,
        current: Pass[P],
        key: Key,
        activation: str,
        x: Tensor,
        run: Callable[[], Any],
        module: nn.Module | None = None,
        function: str = "",
        operator: Any = None,
        is_factor: bool = False,
    ) -> Any:
        """Find the site of an activation call, let the observer run the call, and return its output.

        Args:
            current: the pass.
            key: what is known of the call (see `CallKey`).
            activation: the name of the activation.
            x: the input of the activation.
            run: a function that runs the activation and returns its output.
            module: the activation module, or None if a function is called.
            function: the name of the function; empty if a module is called.
            operator: the function, or the operator that it calls; None if a module is called.
            is_factor: whether the output is only multiplied by that of a linear layer, which runs next.
        """
        name = self.names.name(key, current.names)
        before, current.inside_activation = current.inside_activation, True
        try:
            if current.tracker is None and current.is_token is None and not is_factor:
                y = self._observer.run_repeated(current.observed, name, activation, x, module, run)
                if y is not NOT_RUN:
                    return y
            return self._run_resolved(current, name, key[0], activation, x, run, module, function, operator, is_factor)
        finally:
            current.inside_activation = before

    def _run_resolved(
        self,
        current: Pass[P],
        name: str,
        path: str,
        activation: str,
        x: Tensor,
        run: Callable[[], Any],
        module: nn.Module | None,
        function: str,
        operator: Any,
        is_factor: bool,
    ) -> Any:
        """Look the site of an activation call up, and let the observer run the call. The arguments are those of `_report`.

        Raises:
            RuntimeError: the input belongs to a transform of torch.func.
        """
        if is_functorch_tensor(x):
            raise RuntimeError(
                "activations cannot be counted inside of torch.func transforms; collect while the model is called alone"
            )
        if type(x) is Tensor:
            found = self._registry.resolve(name, path, activation, x, current)
        else:
            with without_modes():  # a subclass would see what is asked of it
                found = self._registry.resolve(name, path, activation, x, current)
        if found is None:
            return self._run_followed(current.tracker, x, run, module, operator)
        site, local = found
        if function and not current.is_compiled:
            self._registry.functional.add(name)
        is_token, token_axes = current.is_token, None
        if is_token is not None:
            is_token = self._registry.tokens_here(is_token, site, local)
            token_axes = self._registry.token_axes(site, local)
        call = Call._make((site, x, is_token, module, function, run, token_axes, is_factor))  # faster than Call(…)
        if current.tracker is None:
            return self._observer.run_activation(current.observed, call)
        count = partial(self._observer.run_activation, current.observed, call)
        return self._run_followed(current.tracker, x, count, module, operator)

    def _run_followed(
        self, tracker: AxisTracker | None, x: Tensor, run: Callable[[], Any], module: nn.Module | None, operator: Any
    ) -> Any:
        """Run an activation. If it is known to be elementwise, the tracker need not follow it."""
        if tracker is None or not (operator in ELEMENTWISE or (module is not None and self._is_elementwise(module))):
            return run()
        return tracker.run_elementwise(x, run)

    def _is_elementwise(self, module: nn.Module) -> bool:
        """Return whether a call of an activation module does nothing but compute each entry from the one at the same place."""
        if in_function_mode() or not runs_only_forward(module):
            return False
        known = self._fused.get(module)
        if known is None or not known.is_of(module):
            known = self._fused[module] = fused_activation(module)
        return known is not None


def calling_frame() -> FrameType:
    """Return the stack frame that calls an activation function, outside of PyTorch's code for the call and of the watcher."""
    return _outside(stack_frame(1))


def _outside(frame: FrameType) -> FrameType:
    """Return the innermost stack frame, from `frame` outwards, that is neither PyTorch's code for a call nor the watcher's."""
    while frame.f_code.co_filename in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame


def is_countable(x: Any) -> TypeGuard[Tensor]:
    """Return whether a value has neurons to count: a floating-point tensor with axes that is not a parameter."""
    if type(x) is Tensor:
        return x.is_floating_point() and x.ndim > 0
    if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
        return False
    with without_modes():  # a subclass would see what is asked of it
        return x.is_floating_point() and x.ndim > 0


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the input of an activation module: the first argument of the call."""
    return args[0] if args else next(iter(kwargs.values()), None)
