"""Let handlers run in place of the forwards of a model's modules for a while, and leave no trace afterwards.

A module that is intercepted gets a subclass of its own class, as with PyTorch's parametrizations and FSDP. Unlike a hook, the
subclass takes effect however the module is called, also on the replicas of `nn.DataParallel`. Other modules are not slowed
down. Copies of an intercepted module have the original class.
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

#: A function that runs in place of a method of a module: (name, module, method of the original class, args, kwargs) -> result.
Handler = Callable[[str, nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

#: The key of the `_Intercepted` in the __dict__ of an intercepted module.
_KEY = "_fastentropy_interception"


class _Intercepted(NamedTuple):
    """The entry in the __dict__ of an intercepted module. Copies and pickles of the module have None instead."""

    name: str  # the name that the handler is given
    kind: type[nn.Module]  # the original class
    handler: Handler

    def __deepcopy__(self, memo: object) -> None:
        """Put None into a copy of the module."""
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        """Put None into a pickle of the module."""
        return type(None), ()


class Interception:
    """Let handlers run the forwards of modules of a model while attached.

    A handler replaces the forward and runs inside the module's hooks. It therefore also runs if the forward is called without
    hooks, as a compiled model does. There is one exception: if a module has a `forward` in its own __dict__, a subclass cannot
    override it. Then the handler replaces `__call__` and runs outside the hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare to intercept modules of `model`. No handler is attached yet."""
        self._model = model
        self._changed: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self._undo = contextlib.ExitStack()

    def attach(self, handlers: Mapping[str, tuple[nn.Module, Handler]]) -> None:
        """Attach handlers to modules.

        Args:
            handlers: for each name, a module and the handler that runs in place of its forward.

        Raises:
            RuntimeError: the model or a part of it is intercepted already.
        """
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
        """Return whether handlers are attached."""
        return bool(self._changed)

    def detach(self) -> None:
        """Leave every module as it was before `attach`."""
        for module, kind, subclass in self._changed:
            vars(module).pop(_KEY, None)
            if type(module) is subclass:  # else somebody has changed the class again; that class now runs the original
                object.__setattr__(module, "__class__", kind)
        self._changed.clear()
        self._undo.close()
        _EAGER.leave(self)

    def _intercept(self, name: str, module: nn.Module, handler: Handler) -> None:
        """Give a module a subclass of its class that calls the handler."""
        kind = type(module)
        subclass = _subclass(kind, "__call__" if "forward" in vars(module) else "forward")
        self._changed.append((module, kind, subclass))
        vars(module)[_KEY] = _Intercepted(name, kind, handler)
        object.__setattr__(module, "__class__", subclass)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has when it is not intercepted."""
    intercepted = vars(module).get(_KEY)
    return intercepted.kind if intercepted else type(module)


def _subclass(kind: type[nn.Module], method: str) -> type[nn.Module]:
    """Return a subclass of `kind` with the same name, in which `method` calls the handler of the module if it has one."""
    original = getattr(kind, method)

    def handled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        intercepted = vars(self).get(_KEY)
        if intercepted is None:
            return original(self, *args, **kwargs)
        return intercepted.handler(intercepted.name, self, original, args, kwargs)

    def reduce_as_original(self: nn.Module, protocol: Any) -> Any:
        """Reduce the module so that copies and pickles have the original class."""
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
    subclass.__bases__ = (kind,)  # set afterwards, because `__init_subclass__` of the class must not run
    return subclass


class _Eager:
    """Make compiled modules and functions run eagerly, and compile nothing, while any interception is attached.

    Code that was compiled before an interception would not call its handlers. Code that was compiled during an interception
    would still call them afterwards.
    """

    def __init__(self) -> None:
        """Begin with no interception attached."""
        self._lock, self._inside = threading.RLock(), set[int]()
        self._stance = contextlib.ExitStack()

    def enter(self, who: object) -> None:
        """Register the interception `who`. If it is the first, make compiled code run eagerly."""
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside.add(id(who))
        weakref.finalize(who, self._leave, id(who)).atexit = False

    def leave(self, who: object) -> None:
        """Remove the interception `who`. If it was the last, let compiled code run again."""
        self._leave(id(who))

    def _leave(self, who: int) -> None:
        """Remove the interception with the id `who`, if it is still registered.

        This also runs when an interception is deleted without `detach`.
        """
        with self._lock:
            self._inside.discard(who)
            if not self._inside:
                self._stance.close()


_EAGER = _Eager()


def fast_paths(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """List the attributes that let the transformer layers of a model run in one kernel each, which hides their activations.

    Args:
        model: any module. Only nn.TransformerEncoder and nn.TransformerEncoderLayer inside it have such attributes.

    Returns:
        (module, attribute, value) for each such attribute. With this value, the layers call their activations.
    """
    layers = [
        (module, "activation_relu_or_gelu", 0) for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)
    ]
    encoders = [(module, "use_nested_tensor", False) for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    return [(module, name, value) for module, name, value in (*layers, *encoders) if vars(module).get(name)]


def replace_activation(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace an activation of a model by another module, which gets the training mode of the activation.

    Transformer layers with a kernel for the whole layer are set to call their activation, because the kernel would still
    compute the replaced one.

    Args:
        model: the model, which is changed.
        name: the dotted path of the activation module.
        module: the replacement.
    """
    model.set_submodule(name, module.train(model.get_submodule(name).training))
    for owner, attribute, value in fast_paths(model.get_submodule(name.rpartition(".")[0])):
        setattr(owner, attribute, value)


@contextlib.contextmanager
def _without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Make transformer layers call their activations inside the block (see `fast_paths`)."""
    changes = fast_paths(model)
    before = [vars(module)[name] for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)
