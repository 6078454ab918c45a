"""Decide what compiles the code that a thread runs while modules are intercepted."""

import threading
from typing import Any, Protocol

from fastentropy._compat import Compiler, run_as_it_is


class CompiledCaller(Protocol):
    """What runs compiled code in a pass."""

    def choose_compiler(self, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile that the pass is about to call."""
        ...


class _Thread(threading.local):
    """What runs compiled code in a thread; None outside of passes."""

    caller: Any = None


_THREAD = _Thread()


def choose_compiler(compiler: Compiler) -> Compiler:
    """Return what compiles a function of torch.compile that this thread is about to call.

    Nothing does outside of passes, because the function may call a model, which begins a pass.

    Args:
        compiler: what compiles it while nothing is attached.
    """
    caller = _THREAD.caller
    if caller is not None:
        chosen: Compiler = caller.choose_compiler(compiler)
        return chosen
    run_eagerly(compiler)
    return None


def run_eagerly(compiler: Compiler) -> None:
    """Let a function that `compiler` would compile run as it is, without an error if it must be compiled as a whole."""
    if compiler is not None:
        run_as_it_is()


def current_caller() -> Any:
    """Return what runs compiled code in this thread; None outside of passes."""
    return _THREAD.caller


def set_caller(caller: CompiledCaller | None) -> Any:
    """Let `caller` run the compiled code of this thread from now on, and return what did before."""
    before, _THREAD.caller = _THREAD.caller, caller
    return before
