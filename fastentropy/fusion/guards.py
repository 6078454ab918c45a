"""Decide whether a traced model may be called with given inputs.

The inputs must have the sizes of the trace. Inputs that are not tensors must have the values of the trace. The inputs must
also meet the guards of the trace: conditions on sizes under which the model takes the branches that were traced.

Guards are stored in files. They are text that is parsed and evaluated here, and never executed.
"""

import ast
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fastentropy._compat import export_guards, keystr, tree_flatten_with_path, tree_node, tree_unflatten
from fastentropy.fusion.inputs import Inputs, is_same
from fastentropy.fusion.traced_inputs import TracedInputs, fits
from fastentropy.sites.inputs import described

#: The operations that a guard may contain, by the class of their syntax node.
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
#: The functions that a guard may call, by name.
_FUNCTIONS: dict[str, Callable[..., Any]] = {"sym_max": max, "sym_min": min}


class Conditions:
    """The conditions on the inputs of a traced model."""

    def __init__(self, inputs: TracedInputs, guards: tuple[str, ...]) -> None:
        """Take over the conditions of a trace.

        Args:
            inputs: gives the sizes of the tensors, and the values of all other inputs.
            guards: further conditions, as `guards_of` returns them.
        """
        self.guards = guards
        self._inputs = list(zip(inputs.values, inputs.sizes, strict=True))
        self._constants = [(index, value) for index, (value, sizes) in enumerate(self._inputs) if sizes is None]
        self._names = _names(inputs)
        self._met: set[tuple[torch.Size, ...]] = set()

    def refusal(self, leaves: Sequence[Any]) -> str:
        """Return the reason why the model cannot be called with inputs, or "" if it can.

        Guards are not checked while `torch.compile` traces the call. Shapes that met all conditions are remembered.

        Args:
            leaves: the inputs in flat order, as many as the trace has.
        """
        is_compiling = torch.compiler.is_compiling()
        shapes = () if is_compiling else tuple([leaf.shape for leaf in leaves if isinstance(leaf, Tensor)])
        if shapes in self._met and all(is_same(leaves[index], value) for index, value in self._constants):
            return ""
        for leaf, name, (constant, sizes) in zip(leaves, self._names, self._inputs, strict=True):
            if sizes is None and not is_same(leaf, constant):
                return f"{name} {_describe(leaf)}, but this model was fused for {constant!r}; fuse it again"
            if sizes is not None and not fits(leaf, sizes):
                wanted = [low if high == low + 1 else "any" for low, high in sizes]
                return f"{name} {_describe(leaf)}, but this model was fused for {wanted}; fuse it again"
        if is_compiling:
            return ""
        for guard in self.guards:
            if not holds(guard, leaves):
                given = ", ".join(str(list(shape)) for shape in shapes)
                return f"for inputs of the sizes {given} the model may take another branch ({guard} is false); fuse it again"
        self._met.add(shapes)
        return ""


def _names(inputs: TracedInputs) -> list[str]:
    """Return what an error message calls each input of a trace, in flat order: keyword inputs have names."""
    _, _, (args, kwargs) = tree_node(inputs.structure)
    _, names, parts = tree_node(kwargs)
    keywords = [f"the input {name!r}" for name, part in zip(names or (), parts, strict=True) for _ in range(part.num_leaves)]
    return ["an input"] * args.num_leaves + keywords


def _describe(value: Any) -> str:
    """Return what an error message says of an input: its shape, or its value if it is not a tensor."""
    if isinstance(value, Tensor):
        return f"has shape {list(value.shape)}"
    hint = " (the values of a mapping are given by their names: **inputs)" if isinstance(value, Mapping) else ""
    return f"is {value!r}" if isinstance(value, bool | int | float | str) else f"is {described(value)}{hint}"


def guards_of(program: ExportedProgram, model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return the guards of a trace: the conditions on input sizes under which it computes the same as the model.

    If `holds` cannot evaluate one of them, other conditions are returned instead: every size except the batch size (axis 0)
    must be that of the inputs.

    Args:
        program: the trace.
        model: the model that was traced.
        inputs: the inputs with which it was traced.

    Returns:
        The conditions as Python expressions, in which `leaf_i` stands for input i in flat order.

    Raises:
        RuntimeError: this release of PyTorch does not give the conditions of a trace.
    """
    leaves = inputs.leaves
    args, kwargs = tree_unflatten(list(range(len(leaves))), program.call_spec.in_spec)
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    paths = {keystr(path): index for path, index in tree_flatten_with_path(bound)[0]}
    guards = []
    for guard in export_guards(program):
        for path in sorted(paths, key=len, reverse=True):
            guard = guard.replace(f"L{path}", f"leaf_{paths[path]}")
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
    """Return whether a guard is true for inputs.

    Args:
        guard: the condition, as `guards_of` returns it.
        leaves: the inputs in flat order.

    Raises:
        ValueError: the guard contains anything but arithmetic and comparisons of sizes. It may come from a file, and must not
            be able to run code.
    """
    try:
        return bool(_value(ast.parse(guard, mode="eval").body, leaves))
    except (SyntaxError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{guard!r} is not a condition on sizes") from error


def _value(node: ast.AST, leaves: Sequence[Any]) -> Any:
    """Return the value of a part of a guard, given as a syntax node."""
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
    """Return the size of an axis of the input with the name `leaf_i`; raise TypeError if it is not a tensor."""
    value = leaves[int(leaf.removeprefix("leaf_"))]
    if not isinstance(value, Tensor):
        raise TypeError(f"{leaf} is not a tensor")
    return value.shape[axis]
