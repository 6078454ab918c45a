"""Let watchers run the activations that a model calls as functions.

The functions of PyTorch are seen where they call their ATen operators. A function that the user has registered is seen by a
TorchFunctionMode, which is slower: it sees every function.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from fastentropy._compat import intercept_operators, is_compiled_here, never_compile, set_compiler, set_intercepting
from fastentropy.sites.activations import OPERATORS


class Listener(Protocol):
    """What may run a call of an activation."""

    @property
    def is_attached(self) -> bool:
        """Return whether calls are to be run by the listener. Once this is False, it is asked no longer."""
        ...

    def takes(self, x: object) -> bool:
        """Return whether a call that this thread makes now, with the input `x`, is one of the listener's model."""
        ...

    def run_function(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a function or an operator, and return its output."""
        ...


class _Listeners(threading.local):
    """The listeners of a thread, held weakly. The one that came last is asked first."""

    def __init__(self) -> None:
        """Begin without listeners."""
        self.all: list[weakref.ref[Any]] = []

    def refresh(self) -> None:
        """Forget listeners that are attached no longer, and intercept operators in this thread if any are left.

        This is called whenever a pass begins or ends, because `torch.inference_mode` puts back, when it is left, what was
        intercepted when it was entered.
        """
        self.all[:] = [known for known in self.all if (listener := known()) is not None and listener.is_attached]
        set_intercepting(bool(self.all))


_LISTENERS = _Listeners()


def begin_listening(listener: Listener) -> "weakref.ref[Any]":
    """Let a listener run the activations that this thread calls, until it is no longer attached.

    Returns:
        The reference to the listener among those of this thread. Another thread may detach it at any time, which drops it.
    """
    intercept_operators(tuple(OPERATORS), _run)
    reference = weakref.ref(listener)
    _LISTENERS.all.append(reference)
    _LISTENERS.refresh()
    return reference


def keep_listening(listener: Listener) -> None:
    """Let a listener run the activations that this thread calls, unless it does so already."""
    if not any(reference() is listener for reference in _LISTENERS.all):
        begin_listening(listener)


def end_listening() -> None:
    """Ask listeners that are attached no longer not again in this thread. Other threads notice by themselves."""
    _LISTENERS.refresh()


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let a listener run, before any other, the activations that this thread calls inside the block."""
    reference = begin_listening(listener)
    try:
        yield
    finally:
        known = [place for place, other in enumerate(_LISTENERS.all) if other is reference]
        if known:
            del _LISTENERS.all[known[-1]]
        _LISTENERS.refresh()


def _run(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Let the first listener that takes a call run the operator; run it alone if there is none, or if it is being traced."""
    if is_compiled_here():
        return operator(*args, **kwargs)
    for reference in reversed(_LISTENERS.all):
        listener = reference()
        if listener is not None and listener.is_attached and listener.takes(args[0] if args else None):
            return listener.run_function(operator, args, kwargs)
    _LISTENERS.refresh()
    return operator(*args, **kwargs)


class FunctionCalls(TorchFunctionMode):
    """Hand every PyTorch function that is called while this mode is active to a listener, which runs it."""

    def __init__(self, listener: Listener) -> None:
        """Prepare to hand functions to `listener`."""
        super().__init__()
        never_compile(FunctionCalls.__torch_function__.__code__)
        self._listener = listener

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let the listener run `func`, because it reports the function if it is an activation."""
        if is_dynamo_compiling():
            return func(*args, **(kwargs or {}))
        compiler = set_compiler(None)
        try:
            return self._listener.run_function(func, args, kwargs or {})
        finally:
            set_compiler(compiler)
