"""Stand between the modules of a model and their callers for a while, and leave no trace.

A module gets a subclass of its own class for that time, as PyTorch's parametrizations and FSDP do. Unlike a hook this is in
force however the module is called, is met by the replicas of `nn.DataParallel`, costs nothing on other modules, and is not
in the copies that are made meanwhile: those are of the original class.
"""

import contextlib
import copyreg
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

#: Runs in place of a method of a module: (name, module, the method of its class, args, kwargs) -> what the method returns.
Handler = Callable[[str, nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_KEY = "_fastentropy_interception"


class _Intercepted(NamedTuple):
    """What an intercepted module has in its __dict__."""

    name: str
    kind: type[nn.Module]
    handler: Handler


class Interception:
    """Modules whose calls are handled, while attached, by one of two functions.

    on_call gets whole calls, hooks included. on_forward gets the forward alone, between the hooks; a module that has a forward
    of its own in its __dict__ is given to on_call instead, since no class can stand before that.
    """

    def __init__(self, model: nn.Module, on_call: Mapping[str, nn.Module], on_forward: Mapping[str, nn.Module]) -> None:
        """Name the modules; see `attach` for the functions."""
        self._model, self._on_call, self._on_forward = model, dict(on_call), dict(on_forward)
        self._changed: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._undo = contextlib.ExitStack()

    def attach(self, call_handler: Handler, forward_handler: Handler) -> None:
        """Begin. Raises RuntimeError where another interception is attached to one of the modules."""
        if any(_KEY in vars(module) for module in self._model.modules()):
            raise RuntimeError("a collector is attached to this model already; detach it first")
        try:
            self._undo.enter_context(_EAGER)
            self._undo.enter_context(_without_fast_paths(self._model))
            for name, module in self._on_call.items():
                self._intercept(name, module, "__call__", call_handler)
            for name, module in self._on_forward.items():
                self._intercept(name, module, "__call__" if "forward" in vars(module) else "forward", forward_handler)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave every module as it was before `attach`."""
        for module, kind, subclass in self._changed:
            vars(module).pop(_KEY, None)
            if type(module) is subclass:  # else somebody put another class on top, which now runs the original
                module.__class__ = kind
        self._changed.clear()
        self._undo.close()

    def _intercept(self, name: str, module: nn.Module, method: str, handler: Handler) -> None:
        kind = type(module)
        subclass = _subclass(kind, method)
        vars(module)[_KEY] = _Intercepted(name, kind, handler)
        self._changed.append((module, kind, subclass))
        module.__class__ = subclass


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module as its user knows it."""
    intercepted = vars(module).get(_KEY)
    return intercepted.kind if intercepted else type(module)


def _subclass(kind: type[nn.Module], method: str) -> type[nn.Module]:
    """A class with the same name whose method asks the handler of the module, if it has one."""
    original = getattr(kind, method)

    def handled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        intercepted = vars(self).get(_KEY)
        if intercepted is None:
            return original(self, *args, **kwargs)
        return intercepted.handler(intercepted.name, self, original, args, kwargs)

    def reduce_as_original(self: nn.Module, protocol: Any) -> Any:
        """Copies and pickles are of the original class."""
        reduced = kind.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        constructor, arguments, *rest = reduced
        if constructor is copyreg.__newobj__:  # type: ignore[attr-defined]
            constructor, arguments = copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key != _KEY}
        return (kind if constructor is type(self) else constructor, arguments, *rest)

    body = {
        method: handled,
        "__reduce_ex__": reduce_as_original,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))


class _Eager:
    """While anyone is inside, what was compiled with torch.compile runs eagerly and nothing is compiled.

    Compiled code knows nothing of an interception that came after it, and would keep one that was there when it was compiled.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._stance = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


_EAGER = _Eager()


def fast_paths(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The attributes that let nn.TransformerEncoder run whole layers in one kernel, in which no activation can be seen.

    Each with its module and the value that makes the layers run their activations as they are.
    """
    layers = [
        (module, "activation_relu_or_gelu", 0) for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)
    ]
    encoders = [(module, "use_nested_tensor", False) for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [(module, name, value) for module, name, value in (*layers, *encoders) if vars(module).get(name)]


@contextlib.contextmanager
def _without_fast_paths(model: nn.Module) -> Iterator[None]:
    changes = fast_paths(model)
    before = [vars(module)[name] for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)
