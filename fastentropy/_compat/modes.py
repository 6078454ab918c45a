"""The state in which an operator runs: backward passes, tracers and modes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from torch import _C
from torch.compiler import is_compiling
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastentropy._compat.lookup import attribute, named, unknown_release


def in_backward() -> bool:
    """Return whether autograd is running a backward pass.

    Activation checkpointing repeats a forward there, and a repeated forward must not be counted twice.
    """
    try:
        return _C._current_graph_task_id() != -1  # not by `named`, since this runs in each call of an activation
    except AttributeError as error:
        raise unknown_release(f"torch._C.{error.name}") from error


def running_checkpoint() -> object | None:
    """Return what PyTorch knows of the innermost checkpoint that this thread runs or recomputes, the same object for both.

    None outside of checkpoints, in those with `use_reentrant=True`, and under hooks for saved tensors of the user.
    """
    hooks = named("torch._C._autograd", "_top_saved_tensors_default_hooks")(True)
    pack: Any = None if hooks is None else inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != checkpoint.__module__:
        return None
    variables = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    try:
        if "frame" in variables:
            return cast(object, variables["frame"].cell_contents)
        return cast(object, variables["target_frame_ref"].cell_contents())
    except KeyError as error:
        raise unknown_release(f"{checkpoint.__module__}: {error}") from error


def is_compiled_here() -> bool:
    """Return whether calls of this thread are being traced for torch.compile or torch.export.

    `torch.compiler.is_compiling()` is also True at runtime in threads beside one that compiles.
    """
    return is_compiling() and _has_tracer()


def _has_tracer() -> bool:
    """Return whether a compiler or a tracer is at work in this thread."""
    contexts = [named("torch._guards", name) for name in ("CompileContext", "TracingContext")]
    if any(context.try_get() is not None for context in contexts):
        return True
    keys = attribute(_C, "_TorchDispatchModeKey")
    return any(named("torch._C", "_get_dispatch_mode")(key) is not None for key in (keys.FAKE, keys.PROXY))


def is_traced() -> bool:
    """Return whether calls are being traced: for torch.compile, torch.export, torch.jit.trace or make_fx.

    What counts must not become a part of the trace.
    """
    return (
        is_compiled_here()
        or named("torch._C", "_get_tracing_state")() is not None
        or named("torch.fx.experimental.proxy_tensor", "get_proxy_mode")() is not None
    )


def in_dispatch_mode() -> bool:
    """Return whether a TorchDispatchMode is active. A mode does not see a kernel that is launched directly."""
    return bool(named("torch._C", "_len_torch_dispatch_stack")())


def in_function_mode() -> bool:
    """Return whether a TorchFunctionMode of the user is active, which may run other functions in place of PyTorch's.

    The mode of a default device and those of fastentropy do not count: they change no activation.
    """
    try:
        if not _C._is_torch_function_mode_enabled():  # not by `named`, since this runs in each call of an activation
            return False
    except AttributeError as error:
        raise unknown_release(f"torch._C.{error.name}") from error
    kinds = [type(mode) for mode in named("torch.overrides", "_get_current_function_mode_stack")()]
    default_device = named("torch.utils._device", "DeviceContext")
    return any(kind is not default_device and not kind.__module__.startswith("fastentropy.") for kind in kinds)


@contextmanager
def entered(mode: TorchDispatchMode) -> Iterator[None]:
    """Activate a mode inside the block. Afterwards it is as active as before, wherever in this process anything was raised.

    A RecursionError or KeyboardInterrupt may be raised inside of the mode's own `__exit__`, which then leaves it active.
    """
    before, inside = _activations(mode), object()
    try:
        try:
            _SHARED_FLAGS.enter(inside)
            with mode:
                yield
        finally:
            _deactivate(mode, before)
            _SHARED_FLAGS.leave(inside)
    finally:
        _deactivate(mode, before)  # for an interrupt in the first calls
        _SHARED_FLAGS.leave(inside)


def is_only_mode(mode: TorchDispatchMode) -> bool:
    """Return whether a TorchDispatchMode is active in this thread, once, and no other one is."""
    try:  # not by `named`, since this runs in each call of a layer that is followed; so in the next two functions
        return _C._len_torch_dispatch_stack() == 1 and _C._get_dispatch_stack_at(0) is mode
    except AttributeError as error:
        raise unknown_release(f"torch._C.{error.name}") from error


def step_aside() -> None:
    """Let the only mode that is active (see `is_only_mode`) see no operators until `step_back`."""
    try:
        _C._pop_torch_dispatch_stack(None)
    except AttributeError as error:
        raise unknown_release(f"torch._C.{error.name}") from error


def step_back(mode: TorchDispatchMode) -> None:
    """Let a mode see operators again, unless it does so already because an interrupt came before `step_aside`."""
    try:
        if not is_only_mode(mode):
            _C._push_on_torch_dispatch_stack(mode)
    except AttributeError as error:
        raise unknown_release(f"torch._C.{error.name}") from error


def _activations(mode: TorchDispatchMode) -> int:
    """Return how many times a mode is on the stack of this thread."""
    entry, size = named("torch._C", "_get_dispatch_stack_at"), named("torch._C", "_len_torch_dispatch_stack")
    return sum(entry(index) is mode for index in range(size()))


def _mode_flags() -> list[bool]:
    """Return what PyTorch has noted, beside the stack, about the modes that are active."""
    return [attribute(sys.modules[TorchDispatchMode.__module__], name) for name in _MODE_FLAGS]


_MODE_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)


class _SharedFlags:
    """Restore the flags when no thread is inside of `entered` any more.

    All threads share the flags. Each mode puts back what it has found, so modes of several threads may leave them on. There is
    no lock, because an interrupt could be raised just after it is taken; sets are changed in one step.
    """

    def __init__(self) -> None:
        """Begin with no thread inside."""
        self._inside, self._before = set[object](), list[bool]()

    def enter(self, inside: object) -> None:
        """Keep the flags if nothing is inside yet. The flags are read first: whoever has changed them is inside already."""
        flags = _mode_flags()
        if not self._inside:
            self._before = flags
        self._inside.add(inside)

    def leave(self, inside: object) -> None:
        """Restore the flags if nothing is inside any more."""
        if inside in self._inside or not self._inside:
            self._inside.discard(inside)
            if not self._inside and self._before and _mode_flags() != self._before:
                vars(sys.modules[TorchDispatchMode.__module__]).update(zip(_MODE_FLAGS, self._before, strict=True))
                named("torch._C._dynamo.guards", "set_is_in_mode_without_ignore_compile_internals")(self._before[-1])


_SHARED_FLAGS = _SharedFlags()


def _deactivate(mode: TorchDispatchMode, times: int) -> None:
    """Take a mode from the stack until it is there so many times. Other modes stay."""
    others = []
    while _activations(mode) > times:
        top = named("torch._C", "_pop_torch_dispatch_stack")(None)
        if top is not mode:
            others.append(top)
    for other in reversed(others):
        named("torch._C", "_push_on_torch_dispatch_stack")(other)


def without_modes() -> AbstractContextManager[object]:
    """Return a context without modes and without the functions of subclasses of Tensor.

    No mode and no subclass of the user may see the operators that count.
    """
    context: AbstractContextManager[object] = named("torch._C", "DisableTorchFunction")()
    return _and_without_dispatch_modes(context) if in_dispatch_mode() else context


def without_transforms() -> AbstractContextManager[object]:
    """Return a context in which transforms of torch.func see no operators.

    They refuse operators that change tensors from outside of them.
    """
    context: AbstractContextManager[object] = named("torch._C", "_DisableFuncTorch")()
    return context


@contextmanager
def _and_without_dispatch_modes(context: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context, and one without any TorchDispatchMode, for the block."""
    with context, named("torch.utils._python_dispatch", "_disable_current_modes")():
        yield
