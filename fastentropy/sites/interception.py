"""Stand between the modules of a model and their callers for a while, and leave no trace.

A module gets a subclass of its own class for that time, as PyTorch's parametrizations and FSDP do. Unlike a hook this is in
force however the module is called, is met by the replicas of `nn.DataParallel`, costs nothing on other modules, and is not
in the copies that are made meanwhile: those are of the original class.
"""

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fastentropy._compat import as_original_class

#: Runs in place of a method of a module: (name, module, the method of its class, args, kwargs) -> what the method returns.
Handler = Callable[[str, nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_KEY = "_fastentropy_interception"


class _Intercepted(NamedTuple):
    """What an intercepted module has in its __dict__. In copies and pickles of that it is None."""

    name: str
    kind: type[nn.Module]
    handler: Handler

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Interception:
    """Modules of a model whose forwards, while attached, are run by a handler.

    It stands between the hooks of a module and its forward, also where that is called without them, as a compiled model does. A
    module that has a forward of its own in its __dict__ is handled around its hooks, since no class can stand before that one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to nothing yet."""
        self._model = model
        self._changed: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._undo = contextlib.ExitStack()

    def attach(self, handlers: Mapping[str, tuple[nn.Module, Handler]]) -> None:
        """Begin to handle modules, by name. Raises RuntimeError where the model or a part of it is intercepted already."""
        if any(_KEY in vars(module) for module in self._model.modules()):
            raise RuntimeError("a collector is attached to this model already; detach it first")
        try:
            _EAGER.enter(self)
            self._undo.enter_context(_without_fast_paths(self._model))
            for name, (module, handler) in handlers.items():
                self._intercept(name, module, handler)
        except BaseException:
            self.detach()
            raise

    @property
    def is_attached(self) -> bool:
        """Whether modules are handled."""
        return bool(self._changed)

    def detach(self) -> None:
        """Leave every module as it was before `attach`."""
        for module, kind, subclass in self._changed:
            vars(module).pop(_KEY, None)
            if type(module) is subclass:  # else somebody put another class on top, which now runs the original
                object.__setattr__(module, "__class__", kind)
        self._changed.clear()
        self._undo.close()
        _EAGER.leave(self)

    def _intercept(self, name: str, module: nn.Module, handler: Handler) -> None:
        kind = type(module)
        subclass = _subclass(kind, "__call__" if "forward" in vars(module) else "forward")
        self._changed.append((module, kind, subclass))
        vars(module)[_KEY] = _Intercepted(name, kind, handler)
        object.__setattr__(module, "__class__", subclass)


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
        constructor, arguments = as_original_class(kind, constructor, arguments)
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
    subclass = types.new_class(kind.__name__, (nn.Module,), {"metaclass": type(kind)}, lambda space: space.update(body))
    subclass.__bases__ = (kind,)  # afterwards: the class's __init_subclass__ would take it for one of the user's
    return subclass


class _Eager:
    """While anyone is inside, what was compiled with torch.compile runs eagerly and nothing is compiled.

    Compiled code knows nothing of an interception that came after it, and would keep one that was there when it was compiled.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.RLock(), set[int]()
        self._stance = contextlib.ExitStack()

    def enter(self, who: object) -> None:
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside.add(id(who))
        weakref.finalize(who, self._leave, id(who)).atexit = False

    def leave(self, who: object) -> None:
        self._leave(id(who))

    def _leave(self, who: int) -> None:
        """Leave, where one is inside still; who is forgotten without a detach leaves so, too."""
        with self._lock:
            self._inside.discard(who)
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


def replace_activation(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the activation of that name, in its mode; no kernel goes on computing the activation."""
    model.set_submodule(name, module.train(model.get_submodule(name).training))
    for owner, attribute, value in fast_paths(model.get_submodule(name.rpartition(".")[0])):
        setattr(owner, attribute, value)


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
