"""Every private name of PyTorch and of Python that fastentropy uses, each in one small function.

A private name can vanish with any release. If a function does not find its name, it raises RuntimeError. It does not fall back
on a default, because wrong counts, or a fused model that computes something else, would go unnoticed.
"""

from __future__ import annotations

import copyreg
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

# Passed on unchanged: the base class of dispatch modes, which is documented, and the functions for nested values (pytrees).
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import keystr as keystr
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

if TYPE_CHECKING:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

P = ParamSpec("P")
T = TypeVar("T")


def _fails_closed(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that it raises RuntimeError, with a message of one line, if a name that it uses is missing."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function, and raise RuntimeError if a name is missing."""
        try:
            return function(*args, **kwargs)
        except (AttributeError, ImportError) as error:
            raise _unknown_release(function.__name__, error) from error

    return checked


def _unknown_release(function: str, error: Exception) -> RuntimeError:
    """Return the error for a release of PyTorch in which a private name is missing.

    Args:
        function: the function that uses the name.
        error: the error that it met.
    """
    return RuntimeError(
        f"fastentropy does not know PyTorch {torch.__version__} ({function}: {error}); "
        "install a release that the CHANGELOG of fastentropy names"
    )


# The state in which an operator runs ------------------------------------------------------------------------------------


def in_backward() -> bool:
    """Return whether autograd is running a backward pass.

    Activation checkpointing repeats a forward there, and a repeated forward must not be counted twice.
    """
    try:  # without the decorator, because its call takes time for each activation
        return bool(torch._C._current_graph_task_id() != -1)
    except AttributeError as error:
        raise _unknown_release("in_backward", error) from error


@_fails_closed
def in_dispatch_mode() -> bool:
    """Return whether a TorchDispatchMode is active. A mode does not see a kernel that is launched directly."""
    return bool(torch._C._len_torch_dispatch_stack())


@_fails_closed
def without_modes() -> AbstractContextManager[object]:
    """Return a context without any TorchDispatchMode, because a mode of the user must not see the operators that count."""
    from torch.utils import _python_dispatch

    context: AbstractContextManager[object] = _python_dispatch._disable_current_modes()
    return context


def is_functorch_tensor(x: Tensor) -> bool:
    """Return whether `x` belongs to a transform of torch.func. Such a tensor has no single value that could be counted."""
    try:  # as in `in_backward`
        return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))
    except AttributeError as error:
        raise _unknown_release("is_functorch_tensor", error) from error


@_fails_closed
def is_fake(x: Tensor) -> bool:
    """Return whether `x` is a fake tensor: one with a shape but no values, as tracers use."""
    from torch._subclasses import FakeTensor

    return isinstance(x, FakeTensor)


@_fails_closed
def add_to_each(tensors: Sequence[Tensor], values: Sequence[Tensor | int]) -> None:
    """Add `values[i]` to `tensors[i]` in place for all i, in one launch.

    One launch per tensor would take longer than the counting itself.
    """
    torch._foreach_add_(list(tensors), list(values))  # type: ignore[arg-type]


@_fails_closed
def storage_id(x: Tensor) -> int:
    """Return a number that is the same for all tensors in the storage of `x`.

    The address of the data would not do, because it is 0 for every tensor on the meta device.
    """
    return int(x.untyped_storage()._cdata)


# Modules ------------------------------------------------------------------------------------------------------------------


@_fails_closed
def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own buffers by name, including those that are None.

    `named_buffers` leaves these out.
    """
    return module._buffers


@_fails_closed
def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict in which a module keeps its children by name. `named_children` lists each module only once."""
    return module._modules


@_fails_closed
def has_hooks(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@_fails_closed
def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled: wrapped by `torch.compile`, or compiled in place by its method `compile`."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def path_when_uncompiled(path: str) -> str:
    """Return the dotted path that a module has in the model before torch.compile, without the parts `_orig_mod`."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


# Operators and exported programs ----------------------------------------------------------------------------------------


@_fails_closed
def operator_schema(target: object) -> torch._C.FunctionSchema | None:
    """Return the schema of an overload of an operator, such as `torch.ops.aten.relu.default`; None if `target` is none."""
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


@_fails_closed
def composite_kernel(operator: object) -> Callable[..., Any] | None:
    """Return the kernel that composes an overload of an operator of other operators; None if it has no such kernel.

    The public `OpOverload.decompose` prefers decompositions in Python, which parts of PyTorch register when they are imported.
    Those round differently.
    """
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if not isinstance(operator, torch._ops.OpOverload):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), key):  # type: ignore[no-untyped-call]
        return None
    return functools.partial(operator._op_dk, key)


@_fails_closed
def export_guards(program: ExportedProgram) -> list[str]:
    """Return the conditions on the inputs under which `torch.export` traced a program, as Python expressions.

    If a condition is false for the sizes of a call, the model may take another branch than the trace did.
    """
    return list(program._guards_code)


@_fails_closed
def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile a program with AOTInductor for this machine, and write the package to `path`."""
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


@_fails_closed
def load_package(path: Path) -> Callable[..., Any]:
    """Return the compiled program in the package at `path`, which `compile_package` wrote."""
    from torch._inductor import aoti_load_package

    program: Callable[..., Any] = aoti_load_package(str(path))
    return program


@_fails_closed
def with_frozen_weights() -> AbstractContextManager[object]:
    """Return a context in which torch.compile treats weights as constants.

    The same option in the call of torch.compile takes effect too late.
    """
    from torch._inductor import config

    context: AbstractContextManager[object] = config.patch(freezing=True)
    return context


# Tensors of several ranks ------------------------------------------------------------------------------------------------


def _is_pending(x: Tensor) -> TypeGuard[AsyncCollectiveTensor]:
    """Return whether `x` is the result of a collective operation that may not have finished."""
    if type(x) is Tensor:
        return False
    module = sys.modules.get("torch.distributed._functional_collectives")  # if nobody has imported it, there is no such tensor
    return module is not None and isinstance(x, module.AsyncCollectiveTensor)


@_fails_closed
def wait_tensor(x: Tensor) -> Tensor:
    """Return `x` when its values can be read. If `x` is the result of a collective operation, wait until it has finished."""
    return x.wait() if _is_pending(x) else x


@_fails_closed
def without_waiting(x: Tensor) -> Tensor:
    """Return the plain tensor that has the memory of `x`.

    If `x` is the result of a collective operation, this function does not wait until the operation has finished.
    """
    return x.elem if _is_pending(x) else x


@_fails_closed
def local_part(x: DTensor) -> Tensor:
    """Return the tensor that this rank holds of the DTensor `x`. No operator runs that a mode or autograd would see."""
    return x._local_tensor


@_fails_closed
def local_shape_and_offset(x: DTensor) -> tuple[Sequence[int], Sequence[int]]:
    """Return the shape of this rank's part of the DTensor `x`, and the index on each axis at which the part begins."""
    from torch.distributed.tensor import _utils

    shape, offset = _utils.compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return shape, offset


# Python ------------------------------------------------------------------------------------------------------------------


@_fails_closed
def as_original_class(kind: type, constructor: Any, arguments: Any) -> tuple[Any, Any]:
    """Change the result of `__reduce_ex__` for an object of a subclass so that copies and pickles have the class `kind`.

    Args:
        kind: the original class of the object.
        constructor: the first entry of the result, a function that makes the object.
        arguments: the second entry, the arguments of this function.

    Returns:
        The two entries as they would be for an object of `kind`.
    """
    if constructor is copyreg.__newobj__:  # type: ignore[attr-defined]
        return copyreg._reconstructor, (kind, object, None)  # type: ignore[attr-defined]
    return constructor, arguments
