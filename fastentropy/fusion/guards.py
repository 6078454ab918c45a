"""Decide whether a traced model may be called with given inputs.

The inputs must have the sizes and constants of the trace and meet its guards: conditions on sizes under which the model takes
the branches that the trace took. Guards are stored in files: they are text that is parsed and evaluated here, never executed.
"""

import ast
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastentropy._compat import export_guards, keystr, tree_flatten_with_path, tree_leaves
from fastentropy._utils.text import plural
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import fits, input_sizes, user_inputs

_OPERATIONS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"sym_max": max, "sym_min": min}


class Conditions:
    """The conditions on the inputs of a traced model."""

    def __init__(self, program: ExportedProgram, guards: tuple[str, ...]) -> None:
        """Take the sizes and constants from a program, and guards as `guards_of` returns them."""
        self.guards = guards
        self._inputs = list(zip(user_inputs(program), input_sizes(program), strict=True))
        self._met: set[tuple[torch.Size, ...]] = set()

    def refusal(self, inputs: Inputs) -> str:
        """Return why the model cannot be called with these inputs; empty if it can."""
        leaves = tree_leaves(inputs)
        if len(leaves) != len(self._inputs):
            return f"this model was fused for {plural(len(self._inputs), 'input')}, but is called with {len(leaves)}"
        for leaf, (constant, sizes) in zip(leaves, self._inputs, strict=True):
            if sizes is None and not _is_same(leaf, constant):
                return f"an input {_describe(leaf)}, but this model was fused for {constant!r}; fuse it again"
            if sizes is not None and not fits(leaf, sizes):
                wanted = [low if high == low + 1 else "any" for low, high in sizes]
                return f"an input {_describe(leaf)}, but this model was fused for {wanted}; fuse it again"
        return "" if torch.compiler.is_compiling() else self._unmet(leaves)

    def _unmet(self, leaves: Sequence[Any]) -> str:
        shapes = tuple(leaf.shape for leaf in leaves if isinstance(leaf, Tensor))
        if shapes in self._met:
            return ""
        for guard in self.guards:
            if not holds(guard, leaves):
                given = ", ".join(str(list(shape)) for shape in shapes)
                return f"for inputs of the sizes {given} the model may take another branch ({guard} is false); fuse it again"
        self._met.add(shapes)
        return ""


def _is_same(value: Any, constant: Any) -> bool:
    return type(value) is type(constant) and not isinstance(value, Tensor) and bool(value == constant)


def _describe(value: Any) -> str:
    return f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is {value!r}"


def guards_of(program: ExportedProgram, model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return the conditions under which a trace of a model computes what the model computes.

    `leaf_i` stands for input i in flat order. If `holds` cannot read one of the conditions, all sizes but the batch must be
    those of the inputs instead. Raises RuntimeError if this release of PyTorch does not give the conditions.
    """
    leaves = tree_leaves(inputs)
    bound = inspect.signature(model.forward).bind(*inputs).arguments
    paths = [keystr(path) for path, _ in tree_flatten_with_path(bound)[0]]
    guards = []
    for guard in export_guards(program):
        for index in sorted(range(len(paths)), key=lambda index: -len(paths[index])):
            guard = guard.replace(f"L{paths[index]}", f"leaf_{index}")
        guards.append(guard)
    try:
        all(holds(guard, leaves) for guard in guards)
    except ValueError:
        return tuple(
            f"leaf_{index}.size()[{axis}] == {size}"
            for index, value in enumerate(leaves)
            if isinstance(value, Tensor)
            for axis, size in enumerate(value.shape[1:], 1)
        )
    return tuple(guards)


def holds(guard: str, leaves: Sequence[Any]) -> bool:
    """Return whether a condition is true of the inputs, given in flat order.

    Raises ValueError for anything but arithmetic and comparisons of sizes, since a condition may come from a file.
    """
    try:
        return bool(_value(ast.parse(guard, mode="eval").body, leaves))
    except (SyntaxError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{guard!r} is not a condition on sizes") from error


def _value(node: ast.AST, leaves: Sequence[Any]) -> Any:
    match node:
        case ast.Constant(int() | float() as number):
            return number
        case ast.BinOp(left, operation, right):
            return _OPERATIONS[type(operation)](_value(left, leaves), _value(right, leaves))
        case ast.UnaryOp(operation, operand):
            return _OPERATIONS[type(operation)](_value(operand, leaves))
        case ast.BoolOp(ast.And(), values):
            return all(_value(each, leaves) for each in values)
        case ast.BoolOp(ast.Or(), values):
            return any(_value(each, leaves) for each in values)
        case ast.Compare(left, operations, others):
            values = [_value(each, leaves) for each in (left, *others)]
            return all(_OPERATIONS[type(o)](a, b) for o, a, b in zip(operations, values, values[1:], strict=False))
        case ast.Call(ast.Name(name) | ast.Attribute(ast.Name("torch"), name), arguments):
            return _FUNCTIONS[name](*(_value(each, leaves) for each in arguments))
        case ast.Subscript(ast.Call(ast.Attribute(ast.Name(leaf), "size")), axis):
            return _size(leaf, int(_value(axis, leaves)), leaves)
        case _:
            raise ValueError(f"{ast.dump(node)} is not a condition on sizes")


def _size(leaf: str, axis: int, leaves: Sequence[Any]) -> int:
    value = leaves[int(leaf.removeprefix("leaf_"))]
    if not isinstance(value, Tensor):
        raise TypeError(f"{leaf} is not a tensor")
    return value.shape[axis]
