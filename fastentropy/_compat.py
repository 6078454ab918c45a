"""Every private name of PyTorch and of Python that fastentropy uses, each in one small function.

A private name can vanish with any release. If a function does not find its name, it raises RuntimeError. It does not fall back
on a default, because wrong counts, or a fused model that computes something else, would go unnoticed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

# Passed on unchanged: the base class of dispatch modes, which is documented, and the functions for nested values (pytrees).
try:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
    from torch.utils._pytree import keystr as keystr
    from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_unflatten as tree_unflatten
except ImportError as error:
    raise ImportError(f"fastentropy does not work with PyTorch {torch.__version__}: {error}") from error

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor


@functools.cache
def _named(module: str, name: str) -> Any:
    """Return what a module of PyTorch holds under a private name, and import the module if necessary.

    Raises:
        RuntimeError: this release has no such module or no such name.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError) as error:
        raise _unknown_release(f"{module}.{name}") from error


def _attribute(owner: object, name: str) -> Any:
    """Return a private attribute of an object of PyTorch.

    Raises:
        RuntimeError: the object has no such attribute in this release.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise _unknown_release(f"{type(owner).__name__}.{name}") from error


def _unknown_release(name: str) -> RuntimeError:
    """Return the error for a release of PyTorch in which a private name is missing."""
    return RuntimeError(
        f"PyTorch {torch.__version__} has no {name}, which fastentropy needs; install a release that the CHANGELOG of "
        "fastentropy names"
    )


# The state in which an operator runs ------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Return whether autograd is running a backward pass.

    Activation checkpointing repeats a forward there, and a repeated forward must not be counted twice.
    """
    return bool(_named("torch._C", "_current_graph_task_id")() != -1)


def is_traced() -> bool:
    """Return whether calls are being traced: for torch.compile, torch.export, torch.jit.trace or make_fx.

    What counts must not become a part of the trace.
    """
    return (
        torch.compiler.is_compiling()
        or _named("torch._C", "_get_tracing_state")() is not None
        or _named("torch.fx.experimental.proxy_tensor", "get_proxy_mode")() is not None
    )


def in_dispatch_mode() -> bool:
    """Return whether a TorchDispatchMode is active. A mode does not see a kernel that is launched directly."""
    return bool(_named("torch._C", "_len_torch_dispatch_stack")())


def in_function_mode() -> bool:
    """Return whether a TorchFunctionMode of the user is active, which may run other functions in place of PyTorch's.

    The mode of a default device and those of fastentropy do not count: they change no activation.
    """
    if not _named("torch._C", "_is_torch_function_mode_enabled")():
        return False
    kinds = [type(mode) for mode in _named("torch.overrides", "_get_current_function_mode_stack")()]
    default_device = _named("torch.utils._device", "DeviceContext")
    return any(kind is not default_device and not kind.__module__.startswith("fastentropy.") for kind in kinds)


@contextmanager
def entered(mode: TorchDispatchMode) -> Iterator[None]:
    """Activate a mode inside the block. Afterwards it is as active as before, wherever in this process anything was raised.

    A RecursionError or KeyboardInterrupt may be raised inside of the mode's own `__exit__`, which then leaves it active.
    """
    before, flags = _activations(mode), _mode_flags()
    try:
        try:
            with mode:
                yield
        finally:
            _deactivate(mode, before, flags)
    finally:
        _deactivate(mode, before, flags)  # for an interrupt in the first call


def _activations(mode: TorchDispatchMode) -> int:
    """Return how many times a mode is on the stack of this thread."""
    entry, size = _named("torch._C", "_get_dispatch_stack_at"), _named("torch._C", "_len_torch_dispatch_stack")
    return sum(entry(index) is mode for index in range(size()))


def _mode_flags() -> list[bool]:
    """Return what PyTorch has noted, beside the stack, about the modes that are active."""
    return [_attribute(sys.modules[TorchDispatchMode.__module__], name) for name in _MODE_FLAGS]


_MODE_FLAGS = (
    "_is_in_torch_dispatch_mode",
    "_is_in_non_infra_torch_dispatch_mode",
    "_is_in_any_mode_without_ignore_compile_internals",
)


def _deactivate(mode: TorchDispatchMode, times: int, flags: list[bool]) -> None:
    """Take a mode from the stack until it is there so many times, and restore the flags. Other modes stay."""
    others = []
    while _activations(mode) > times:
        top = _named("torch._C", "_pop_torch_dispatch_stack")(None)
        if top is not mode:
            others.append(top)
    for other in reversed(others):
        _named("torch._C", "_push_on_torch_dispatch_stack")(other)
    if _mode_flags() != flags:
        vars(sys.modules[TorchDispatchMode.__module__]).update(zip(_MODE_FLAGS, flags, strict=True))
        _named("torch._C._dynamo.guards", "set_is_in_mode_without_ignore_compile_internals")(flags[-1])


def without_modes() -> AbstractContextManager[object]:
    """Return a context without modes and without the functions of subclasses of Tensor.

    No mode and no subclass of the user may see the operators that count.
    """
    context: AbstractContextManager[object] = _named("torch._C", "DisableTorchFunction")()
    return _and_without_dispatch_modes(context) if in_dispatch_mode() else context


@contextmanager
def _and_without_dispatch_modes(context: AbstractContextManager[object]) -> Iterator[None]:
    """Enter a context, and one without any TorchDispatchMode, for the block."""
    with context, _named("torch.utils._python_dispatch", "_disable_current_modes")():
        yield


def is_functorch_tensor(x: Tensor) -> bool:
    """Return whether `x` belongs to a transform of torch.func. Such a tensor has no single value that could be counted."""
    return bool(_named("torch._C._functorch", "is_functorch_wrapped_tensor")(x))


def has_values(x: Tensor) -> bool:
    """Return whether `x` holds values that can be read, unlike a tensor on the meta device or a tensor of a tracer."""
    if x.is_meta or _named("torch", "_is_functional_tensor")(x):
        return False
    if type(x) is Tensor:
        return True
    tracers = (_named("torch._subclasses", "FakeTensor"), _named("torch._subclasses.functional_tensor", "FunctionalTensor"))
    return not isinstance(x, tracers)


def add_to_each(tensors: Sequence[Tensor], values: Sequence[Tensor | int]) -> None:
    """Add `values[i]` to `tensors[i]` in place for all i, in one launch.

    One launch per tensor would take longer than the counting itself.
    """
    _named("torch", "_foreach_add_")(list(tensors), list(values))


def storage_id(x: Tensor) -> int:
    """Return a number that is the same for all tensors in the storage of `x`.

    The address of the data would not do, because it is 0 for every tensor on the meta device.
    """
    try:
        number: int = x.untyped_storage()._cdata  # not by `_attribute`, since this runs for each tensor that is followed
    except AttributeError as error:
        raise _unknown_release(f"{type(x.untyped_storage()).__name__}._cdata") from error
    return number


def weak_storage(x: Tensor) -> Any:
    """Return a weak reference to the storage of `x`, with a method `expired`.

    As long as the reference exists, no other storage has the same `storage_id`. The memory itself can be freed and used again.
    """
    return _named("torch.multiprocessing.reductions", "StorageWeakRef")(x.untyped_storage())


@functools.cache
def handles_operators(kind: type[Tensor]) -> bool:
    """Return whether a class of tensors handles operators itself, so that it may not have memory like a plain tensor."""
    handler = _attribute(kind, "__torch_dispatch__")
    return handler is not _named("torch._C", "_disabled_torch_dispatch_impl")


# Modules ------------------------------------------------------------------------------------------------------------------


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own buffers by name, including those that are None.

    `named_buffers` leaves these out.
    """
    buffers: dict[str, Tensor | None] = _attribute(module, "_buffers")
    return buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict in which a module keeps its children by name. `named_children` lists each module only once."""
    children: dict[str, nn.Module | None] = _attribute(module, "_modules")
    return children


def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on a module."""
    try:
        return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
    except AttributeError as error:
        raise _unknown_release(f"{type(module).__name__}.{error.name}") from error


def has_pre_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module runs hooks before its forward, which may change the inputs."""
    try:
        return bool(module._forward_pre_hooks or _global_pre_hooks())
    except AttributeError as error:
        raise _unknown_release(f"{type(module).__name__}.{error.name}") from error


@functools.cache
def _global_pre_hooks() -> dict[int, Any]:
    """Return the dict of the hooks that run before the forwards of all modules. PyTorch changes it in place."""
    hooks: dict[int, Any] = _named("torch.nn.modules.module", "_global_forward_pre_hooks")
    return hooks


def module_identity(module: nn.Module) -> int:
    """Return a number that a module shares with its replicas of nn.DataParallel, but with no deep copy of it.

    A replica has the same dict of hooks as the module that it was made from.
    """
    try:
        return id(module._forward_hooks)
    except AttributeError as error:
        raise _unknown_release(f"{type(module).__name__}.{error.name}") from error


def module_call() -> Callable[..., Any]:
    """Return the method of nn.Module through which all calls of modules pass, compiled ones included.

    `nn.Module.__call__` would not do: `torch.compile(model)` keeps the bound method `__call__` of the model.
    """
    call: Callable[..., Any] = _attribute(nn.Module, "_call_impl")
    return call


def replace_module_call(call: Callable[..., Any]) -> None:
    """Let all calls of modules pass through `call(module, *args, **kwargs)` from now on (see `module_call`)."""
    module_call()
    nn.Module._call_impl = call  # type: ignore[method-assign]


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return what the method `compile` of a module has put in place of `module_call`; None if it was not compiled in place."""
    call: Callable[..., Any] | None = _attribute(module, "_compiled_call_impl")
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
        raise _unknown_release(f"nn.Module.{error.args[0]}") from error
    return not (has_hooks or _named("torch.nn.modules.module", "_has_any_global_hook")())


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled: wrapped by `torch.compile`, or compiled in place by its method `compile`."""
    if "torch._dynamo" not in sys.modules:  # whoever compiles imports it, which takes seconds
        return False
    return isinstance(module, _named("torch._dynamo", "OptimizedModule")) or (compiled_call(module) is not None)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped in `module`, or `module` itself if it is not wrapped."""
    if "torch._dynamo" not in sys.modules or not isinstance(module, _named("torch._dynamo", "OptimizedModule")):
        return module
    original: nn.Module = _attribute(module, "_orig_mod")
    return original


def path_when_uncompiled(path: str) -> str:
    """Return the dotted path that a module has in the model before torch.compile, without the parts `_orig_mod`."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


# Operators that are intercepted ------------------------------------------------------------------------------------------

# A dispatch key that no part of PyTorch uses. Its kernels run, and cost something, only in a thread that includes the key.
_INTERCEPTED = "TESTING_ONLY_GenericMode"
_libraries: list[torch.library.Library] = []  # a library takes its kernels back when it is deleted


@functools.cache
def _intercepted_key() -> Any:
    """Return the dispatch key of the kernels that intercept operators."""
    return _named("torch._C", "_dispatch_key_parse")(_INTERCEPTED)


@functools.cache
def _intercepted_keys() -> Any:
    """Return the set with only this dispatch key."""
    return _named("torch._C", "DispatchKeySet")(_intercepted_key())


@functools.cache
def intercept_operators(operators: tuple[Any, ...], run: Callable[..., Any]) -> None:
    """Let `run(operator, args, kwargs)` run in place of some ATen operators, in threads that are `set_intercepting`.

    A TorchFunctionMode would see every function and cost microseconds for each. Here all other operators cost nothing. An
    operator is intercepted wherever it is called, also in C++ and in functions that TorchScript has compiled.

    Args:
        operators: overloads of operators, such as `torch.ops.aten.relu_.default`.
        run: the function that runs in their place. Nothing is intercepted while it runs.
    """
    _leave_other_operators_alone()
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)

    def kernel(operator: Any) -> Callable[..., Any]:
        def intercepted(*args: Any, **kwargs: Any) -> Any:
            with without_intercepting():
                return run(operator, args, kwargs)

        return intercepted

    for operator in operators:
        library.impl(operator, kernel(operator), _INTERCEPTED)


@functools.cache
def _leave_other_operators_alone() -> None:
    """Let operators without a kernel under the dispatch key run as if there were no such key."""
    library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    library.fallback(torch.library.fallthrough_kernel, _INTERCEPTED)
    _libraries.append(library)


def set_intercepting(is_on: bool) -> None:
    """Intercept operators in this thread from now on (see `intercept_operators`), or no longer."""
    _named("torch._C", "_dispatch_tls_set_dispatch_key_included")(_intercepted_key(), is_on)


def without_intercepting() -> AbstractContextManager[object]:
    """Return a context in which this thread intercepts no operators."""
    guard: AbstractContextManager[object] = _named("torch._C", "_ExcludeDispatchKeyGuard")(_intercepted_keys())
    return guard


# Operators and exported programs ----------------------------------------------------------------------------------------


def operator_schema(target: object) -> torch._C.FunctionSchema | None:
    """Return the schema of an overload of an operator, such as `torch.ops.aten.relu.default`; None if `target` is none."""
    return _attribute(target, "_schema") if isinstance(target, _named("torch._ops", "OpOverload")) else None


def composite_kernel(operator: object) -> Callable[..., Any] | None:
    """Return the kernel that composes an overload of an operator of other operators.

    It is None if there is no such kernel, or if the operator has a kernel of its own, which may round differently.

    The public `OpOverload.decompose` prefers decompositions in Python, which parts of PyTorch register when they are imported.
    Those round differently.
    """
    if not isinstance(operator, _named("torch._ops", "OpOverload")):
        return None
    key = _named("torch._C", "DispatchKey").CompositeImplicitAutograd
    has_kernel = functools.partial(_named("torch._C", "_dispatch_has_kernel_for_dispatch_key"), operator.name())
    try:
        is_composed = has_kernel(key) and not has_kernel("CPU") and not has_kernel("CUDA")
    except RuntimeError:  # some operators are not known to the dispatcher, such as prim::device and aten::sym_size
        return None
    return functools.partial(_attribute(operator, "_op_dk"), key) if is_composed else None


def tree_node(spec: Any) -> tuple[Any, Any, list[Any]]:
    """Return the root of a structure of nested values (a TreeSpec): its type, what belongs to it, and the parts below it.

    The type is None for a value that is not nested. The keys belong to a dict.
    """
    parts = _attribute(spec, "children")() if hasattr(spec, "children") else _attribute(spec, "children_specs")
    return _attribute(spec, "type"), _attribute(spec, "context"), parts


def export_guards(program: ExportedProgram) -> list[str]:
    """Return the conditions on the inputs under which `torch.export` traced a program, as Python expressions.

    If a condition is false for the sizes of a call, the model may take another branch than the trace did.
    """
    return list(_attribute(program, "_guards_code"))


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile a program with AOTInductor for this machine, and write the package to `path`."""
    _named("torch._inductor", "aoti_compile_and_package")(program, package_path=str(path))


def load_package(path: Path) -> Callable[..., Any]:
    """Return the compiled program in the package at `path`, which `compile_package` wrote."""
    program: Callable[..., Any] = _named("torch._inductor", "aoti_load_package")(str(path))
    return program


def with_frozen_weights() -> AbstractContextManager[object]:
    """Return a context in which torch.compile treats weights as constants.

    The same option in the call of torch.compile takes effect too late.
    """
    context: AbstractContextManager[object] = _named("torch._inductor", "config").patch(freezing=True)
    return context


# Tensors of several ranks ------------------------------------------------------------------------------------------------


def _is_pending(x: Tensor) -> TypeGuard[AsyncCollectiveTensor]:
    """Return whether `x` is the result of a collective operation that may not have finished."""
    if type(x) is Tensor or not torch.distributed.is_available():
        return False
    return isinstance(x, _named("torch.distributed._functional_collectives", "AsyncCollectiveTensor"))


def wait_tensor(x: Tensor) -> Tensor:
    """Return `x` when its values can be read. If `x` is the result of a collective operation, wait until it has finished."""
    return x.wait() if _is_pending(x) else x


def without_waiting(x: Tensor) -> Tensor:
    """Return the plain tensor that has the memory of `x`.

    If `x` is the result of a collective operation, this function does not wait until the operation has finished.
    """
    return x.elem if _is_pending(x) else x


def local_part(x: DTensor) -> Tensor:
    """Return the tensor that this rank holds of the DTensor `x`. No operator runs that a mode or autograd would see."""
    local: Tensor = _attribute(x, "_local_tensor")
    return local


def local_shape_and_offset(x: DTensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of this rank's part of the DTensor `x`, and the index on each axis at which the part begins."""
    compute = _named("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset")
    shape, offset = compute(x.shape, x.device_mesh, x.placements)
    return shape, offset


# Python ------------------------------------------------------------------------------------------------------------------


#: Return the stack frame that lies a number of calls above this one. `inspect.stack` would read source files.
stack_frame: Callable[[int], FrameType] = sys._getframe
