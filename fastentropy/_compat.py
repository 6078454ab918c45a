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
    return int(_attribute(x.untyped_storage(), "_cdata"))


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
    return any(_attribute(module, name) for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))


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
    return isinstance(module, _named("torch._dynamo", "OptimizedModule")) or (
        _attribute(module, "_compiled_call_impl") is not None
    )


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped in `module`, or `module` itself if it is not wrapped."""
    if "torch._dynamo" not in sys.modules or not isinstance(module, _named("torch._dynamo", "OptimizedModule")):
        return module
    original: nn.Module = _attribute(module, "_orig_mod")
    return original


def path_when_uncompiled(path: str) -> str:
    """Return the dotted path that a module has in the model before torch.compile, without the parts `_orig_mod`."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


# Operators and exported programs ----------------------------------------------------------------------------------------


def operator_schema(target: object) -> torch._C.FunctionSchema | None:
    """Return the schema of an overload of an operator, such as `torch.ops.aten.relu.default`; None if `target` is none."""
    return _attribute(target, "_schema") if isinstance(target, _named("torch._ops", "OpOverload")) else None


def composite_kernel(operator: object) -> Callable[..., Any] | None:
    """Return the kernel that composes an overload of an operator of other operators; None if it has no such kernel.

    The public `OpOverload.decompose` prefers decompositions in Python, which parts of PyTorch register when they are imported.
    Those round differently.
    """
    if not isinstance(operator, _named("torch._ops", "OpOverload")):
        return None
    key = _named("torch._C", "DispatchKey").CompositeImplicitAutograd
    if not _named("torch._C", "_dispatch_has_kernel_for_dispatch_key")(operator.name(), key):
        return None
    return functools.partial(_attribute(operator, "_op_dk"), key)


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


def as_original_class(kind: type, constructor: Any, arguments: Any) -> tuple[Any, Any]:
    """Change the result of `__reduce_ex__` for an object of a subclass so that copies and pickles have the class `kind`.

    Args:
        kind: the original class of the object.
        constructor: the first entry of the result, a function that makes the object.
        arguments: the second entry, the arguments of this function.

    Returns:
        The two entries as they would be for an object of `kind`.
    """
    if constructor is _named("copyreg", "__newobj__"):
        return _named("copyreg", "_reconstructor"), (kind, object, None)
    return constructor, arguments
