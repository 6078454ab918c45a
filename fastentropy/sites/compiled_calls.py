"""Decide what compiles the code that a thread runs while modules are intercepted."""

import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

from torch import nn

from fastentropy._compat import Compiler, CompilerWith, called_module, choose_compilers, in_backward, run_as_it_is
from fastentropy.sites.checkpoints import CheckpointedCompilers
from fastentropy.sites.outside_calls import OutsideCompilers


class CompiledCaller(Protocol):
    """What runs compiled code in the passes of a watcher."""

    def choose_compiler(self, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile that the pass of this thread is about to call."""
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


class _Choosing:
    """The choice of what compiles the functions of torch.compile, while it is made."""

    def __init__(self) -> None:
        """Begin without it."""
        self._is_needed, self._end = False, list[Callable[[], None]]()
        self.checkpointed = CheckpointedCompilers(self._end_if_idle)

    def begin(self) -> Callable[[], None]:
        """Begin to choose compilers. The function that is returned ends it, as soon as nothing is left to recompute."""
        self._is_needed = True
        if not self._end:
            self._end.append(choose_compilers(choose_compiler))
        return self._no_longer_needed

    def _no_longer_needed(self) -> None:
        """End the choice once all checkpoints are gone, whose backward passes may still come."""
        self._is_needed = False
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        """End the choice if there is nothing to choose."""
        if not self._is_needed and not self.checkpointed and self._end:
            self._end.pop()()


_CHOOSING = _Choosing()
#: Begin to choose what compiles the functions of torch.compile, and return what ends it.
begin_choosing = _CHOOSING.begin


def choose_compiler(compiler: Compiler, frame: FrameType | None) -> Compiler:
    """Return what compiles a function of torch.compile that this thread is about to call.

    Outside of passes a function may call a model, which begins a pass, so only code without modules and activations is
    compiled, and the code of models that nobody watches. Nothing is counted in backward passes: what is compiled there is as
    without a collector, but for functions in checkpoints, which are compiled as in the forward pass.

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
    if in_backward():
        return compiler if isinstance(compiler, CompilerWith) else _choose_in_backward(compiler)
    if not _CALLERS:
        return compiler
    caller: CompiledCaller | None = _THREAD.caller
    chosen = _OUTSIDE.choose(compiler, _unwatched(frame)) if caller is None else caller.choose_compiler(compiler)
    _CHOOSING.checkpointed.note(compiler, chosen)
    return chosen


def _choose_in_backward(compiler: Compiler) -> Compiler:
    """Return what compiles a function that a backward pass calls."""
    is_known, chosen = _CHOOSING.checkpointed.chosen(compiler)
    if not _CALLERS:
        return None if is_known and chosen is None else compiler
    return chosen if is_known else _OUTSIDE.for_backward(compiler)


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
