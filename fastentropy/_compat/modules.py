"""What nn.Module keeps to itself: hooks, buffers, and the method through which calls pass."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastentropy._compat.lookup import attribute, named, unknown_release


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own buffers by name, including those that are None.

    `named_buffers` leaves these out.
    """
    buffers: dict[str, Tensor | None] = attribute(module, "_buffers")
    return buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dict in which a module keeps its own parameters by name, including those that are None."""
    parameters: dict[str, nn.Parameter | None] = attribute(module, "_parameters")
    return parameters


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict in which a module keeps its children by name. `named_children` lists each module only once."""
    children: dict[str, nn.Module | None] = attribute(module, "_modules")
    return children


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on a module."""
    try:
        return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
    except AttributeError as error:
        raise unknown_release(f"{type(module).__name__}.{error.name}") from error


def has_pre_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module runs hooks before its forward, which may change the inputs."""
    try:
        return bool(module._forward_pre_hooks or _global_pre_hooks())
    except AttributeError as error:
        raise unknown_release(f"{type(module).__name__}.{error.name}") from error


@functools.cache
def _global_pre_hooks() -> dict[int, Any]:
    """Return the dict of the hooks that run before the forwards of all modules. PyTorch changes it in place."""
    hooks: dict[int, Any] = named("torch.nn.modules.module", "_global_forward_pre_hooks")
    return hooks


def module_identity(module: nn.Module) -> int:
    """Return a number that a module shares with its replicas of nn.DataParallel, but with no deep copy of it.

    A replica has the same dict of hooks as the module that it was made from.
    """
    try:
        return id(module._forward_hooks)
    except AttributeError as error:
        raise unknown_release(f"{type(module).__name__}.{error.name}") from error


def module_call() -> Callable[..., Any]:
    """Return the method of nn.Module through which all calls of modules pass, compiled ones included.

    `nn.Module.__call__` would not do: `torch.compile(model)` keeps the bound method `__call__` of the model.
    """
    call: Callable[..., Any] = attribute(nn.Module, "_call_impl")
    return call


def outer_module_call() -> Callable[..., Any]:
    """Return `nn.Module.__call__`; what it was before if torch.fx has replaced it, because another thread traces."""
    call: Callable[..., Any] = nn.Module.__call__
    plain: Callable[..., Any] = attribute(named("torch.fx", "_symbolic_trace"), "_orig_module_call")
    return plain if getattr(call, "__wrapped__", None) is plain else call


def take_for_call_in_traces(call: Callable[..., Any]) -> Callable[[], None]:
    """Let `call` be what calls modules while torch.fx traces, also for make_fx and torch.compile.

    Meanwhile a function of torch.fx is in place of `nn.Module.__call__` in all threads, and calls the method of PyTorch.

    Returns:
        A function that ends this.
    """
    traces: Any = named("torch.fx", "_symbolic_trace")
    plain = attribute(traces, "_orig_module_call")
    traces._orig_module_call = call

    def end() -> None:
        traces._orig_module_call = plain

    return end


def replace_module_call(call: Callable[..., Any]) -> None:
    """Let all calls of modules pass through `call(module, *args, **kwargs)` from now on (see `module_call`)."""
    module_call()
    nn.Module._call_impl = call  # type: ignore[method-assign]


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return what the method `compile` of a module has put in place of `module_call`; None if it was not compiled in place."""
    call: Callable[..., Any] | None = attribute(module, "_compiled_call_impl")
    return call


def is_replica(module: nn.Module) -> bool:
    """Return whether a module is a replica that nn.DataParallel has made of another module, with which it shares dicts."""
    return bool(vars(module).get("_is_replica"))


def runs_only_forward(module: nn.Module) -> bool:
    """Return whether a call of a module runs nothing but its forward: no hook of the module or of all modules."""
    state = vars(module)
    try:
        has_hooks = (
            state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
        )
    except KeyError as error:
        raise unknown_release(f"nn.Module.{error.args[0]}") from error
    try:
        has_global_hooks = torch_module._has_any_global_hook  # not by `named`, since this runs in each call of an activation
        return not (has_hooks or has_global_hooks())  # type: ignore[no-untyped-call]
    except AttributeError as error:
        raise unknown_release(f"torch.nn.modules.module.{error.name}") from error


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled: wrapped by `torch.compile`, or compiled in place by its method `compile`."""
    if "torch._dynamo" not in sys.modules:  # whoever compiles imports it, which takes seconds
        return False
    return isinstance(module, named("torch._dynamo", "OptimizedModule")) or (compiled_call(module) is not None)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped in `module`, or `module` itself if it is not wrapped."""
    if "torch._dynamo" not in sys.modules or not isinstance(module, named("torch._dynamo", "OptimizedModule")):
        return module
    original: nn.Module = attribute(module, "_orig_mod")
    return original


def path_when_uncompiled(path: str) -> str:
    """Return the dotted path that a module has in the model before torch.compile, without the parts `_orig_mod`."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")
