"""Operators, exported programs and compiled packages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fastentropy._compat.lookup import attribute, named


def operator_schema(target: object) -> torch._C.FunctionSchema | None:
    """Return the schema of an overload of an operator, such as `torch.ops.aten.relu.default`; None if `target` is none."""
    return attribute(target, "_schema") if isinstance(target, named("torch._ops", "OpOverload")) else None


def asserts_metadata(target: object) -> bool:
    """Return whether an operator checks the dtype and the device of a value, as `torch.export` traces it before casts."""
    return target is attribute(torch.ops.aten, "_assert_tensor_metadata").default


def to_copy() -> Any:
    """Return the operator that casts a tensor in a decomposed graph."""
    return attribute(torch.ops.aten, "_to_copy").default


def composite_kernel(operator: object) -> Callable[..., Any] | None:
    """Return the kernel that composes an overload of an operator of other operators.

    It is None if there is no such kernel, or if the operator has a kernel of its own, which may round differently.

    The public `OpOverload.decompose` prefers decompositions in Python, which parts of PyTorch register when they are imported.
    Those round differently.
    """
    if not isinstance(operator, named("torch._ops", "OpOverload")):
        return None
    key = named("torch._C", "DispatchKey").CompositeImplicitAutograd
    has_kernel = functools.partial(named("torch._C", "_dispatch_has_kernel_for_dispatch_key"), operator.name())
    try:
        is_composed = has_kernel(key) and not has_kernel("CPU") and not has_kernel("CUDA")
    except RuntimeError:  # some operators are not known to the dispatcher, such as prim::device and aten::sym_size
        return None
    return functools.partial(attribute(operator, "_op_dk"), key) if is_composed else None


def tree_node(spec: Any) -> tuple[Any, Any, list[Any]]:
    """Return the root of a structure of nested values (a TreeSpec): its type, what belongs to it, and the parts below it.

    The type is None for a value that is not nested. The keys belong to a dict.
    """
    parts = attribute(spec, "children")() if hasattr(spec, "children") else attribute(spec, "children_specs")
    return attribute(spec, "type"), attribute(spec, "context"), parts


def export_guards(program: ExportedProgram) -> list[str]:
    """Return the conditions on the inputs under which `torch.export` traced a program, as Python expressions.

    If a condition is false for the sizes of a call, the model may take another branch than the trace did.
    """
    return list(attribute(program, "_guards_code"))


def compile_package(program: ExportedProgram, path: Path) -> None:
    """Compile a program with AOTInductor for this machine, and write the package to `path`."""
    named("torch._inductor", "aoti_compile_and_package")(program, package_path=str(path))


def load_package(path: Path) -> Callable[..., Any]:
    """Return the compiled program in the package at `path`, which `compile_package` wrote."""
    program: Callable[..., Any] = named("torch._inductor", "aoti_load_package")(str(path))
    return program


def with_frozen_weights() -> AbstractContextManager[object]:
    """Return a context in which torch.compile treats weights as constants.

    The same option in the call of torch.compile takes effect too late.
    """
    context: AbstractContextManager[object] = named("torch._inductor", "config").patch(freezing=True)
    return context


def with_recompile_limit(limit: int) -> AbstractContextManager[object]:
    """Return a context in which torch.compile compiles a function at most `limit` times. By default it gives up after 8."""
    context: AbstractContextManager[object] = named("torch._dynamo", "config").patch(recompile_limit=limit)
    return context
