"""Decide what compiles the code that a thread runs while modules are intercepted."""

import threading
import weakref
from types import FrameType
from typing import Any, Protocol

from torch import nn

from fastentropy._compat import Compiler, CompilerWith, called_module, in_backward, run_as_it_is
from fastentropy.sites.outside_calls import OutsideCompilers


class CompiledCaller(Protocol):
    """What runs compiled code in the passes of a watcher."""

    def choose_compiler(self, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile that the pass of this thread is about to call."""
        ...

    def latest_compiler(self, compiler: Compiler) -> tuple[bool, Compiler]:
        """Return whether `choose_compiler` was asked for a compiler, and what it has returned last."""
        ...

    def watches(self, module: nn.Module) -> bool:
        """Return whether a module, without those in it, is watched."""
        ...

    def note(self, text: str) -> None:
        """Take a sentence about code that runs eagerly."""
        ...


class _Thread(threading.local):
    """What runs compiled code in a thread; None outside of passes."""

    caller: Any = None


_THREAD = _Thread()
#: What may run compiled code in any thread.
_CALLERS: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _note(text: str) -> None:
    """Tell all that may run compiled code."""
    for caller in list(_CALLERS):
        caller.note(text)


_OUTSIDE = OutsideCompilers(_note)


def choose_compiler(compiler: Compiler, frame: FrameType | None) -> Compiler:
    """Return what compiles a function of torch.compile that this thread is about to call.

    Outside of passes a function may call a model, which begins a pass, so only code without modules and activations is
    compiled, and the code of models that nobody watches. Checkpointing repeats functions in the backward pass, and they must
    save the same tensors: they are compiled as in the forward pass.

    Args:
        compiler: what compiles it while nothing is attached.
        frame: the frame that calls it; None between two graphs.
    """
    chosen = _choose(compiler, frame)
    if chosen is None and compiler is not None:
        run_as_it_is()
    return chosen


def _choose(compiler: Compiler, frame: FrameType | None) -> Compiler:
    """Return what compiles a function. The arguments are as in `choose_compiler`."""
    if not in_backward():
        caller: CompiledCaller | None = _THREAD.caller
        return _OUTSIDE.choose(compiler, _unwatched(frame)) if caller is None else caller.choose_compiler(compiler)
    if isinstance(compiler, CompilerWith):
        return compiler
    for each in list(_CALLERS):
        is_known, chosen = each.latest_compiler(compiler)
        if is_known:
            return chosen  # type: ignore[no-any-return] # the callers are held weakly, without a type
    return _OUTSIDE.known(compiler, _unwatched(frame))


def _unwatched(frame: FrameType | None) -> nn.Module | None:
    """Return the module of which a frame calls a method, if neither it nor any module in it is watched, and None otherwise."""
    module = None if frame is None else called_module(frame)
    if module is None:
        return None
    callers: list[CompiledCaller] = list(_CALLERS)
    return None if any(caller.watches(each) for caller in callers for each in module.modules()) else module


def add_caller(caller: CompiledCaller) -> None:
    """Note what may run compiled code from now on."""
    _CALLERS.add(caller)


def remove_caller(caller: CompiledCaller) -> None:
    """Note what runs compiled code no longer."""
    _CALLERS.discard(caller)
    if not _CALLERS:
        _OUTSIDE.forget()


def current_caller() -> Any:
    """Return what runs compiled code in this thread and counts; None outside of passes, and in backward passes."""
    return None if _THREAD.caller is None or in_backward() else _THREAD.caller


def set_caller(caller: CompiledCaller | None) -> Any:
    """Let `caller` run the compiled code of this thread from now on, and return what did before."""
    before, _THREAD.caller = _THREAD.caller, caller
    return before
