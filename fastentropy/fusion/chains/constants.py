"""Compute once what a traced graph computes from constants alone, such as a weight under weight norm or a pruning mask.

Chains (stretches of linear operators) have constant weights. Once such a weight is folded into one constant, its operator can
be part of a chain.
"""

import math
from collections.abc import Iterator
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastentropy._compat import operator_schema
from fastentropy.fusion.chains.nodes import WEIGHT_OF, base_of, fixed_size, is_view, module_path, mutates, weight_owner

#: The prefixes of the names of the constants that the folding makes. Those of the second kind depend on a parameter.
CONSTANT_PREFIX = "fastentropy_constant_"
PARAMETER_PREFIX = "fastentropy_parameter_"

#: The folding makes no constant with more elements than this number, unless the largest tensor of the model has as many. An
#: expanded bias, for example, would take more time to read than to compute.
MAX_ELEMENTS = 2**20

#: Arguments that make an operator update statistics or draw random numbers.
_TRAINING = {"training", "train", "use_input_stats"}


def fold_constants(module: GraphModule) -> None:
    """Replace all that a graph computes from constants by new buffers, in place.

    Random and mutating operators stay, and so do the values that they read or write. Values that the model returns stay too,
    because each call must return new memory. Nodes that are not needed any more are left in the graph.

    Args:
        module: the graph, with its parameters and buffers. The new buffers share no memory with them.
    """
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach_.default):
        node.target = torch.ops.aten.detach.default  # torch.tensor(…) in a forward; it overwrites nothing
    folding = _Folding(module)
    for node in list(module.graph.nodes):
        folding.visit(node)
    folding.replace()


class _Folding:
    """The constants of a graph, computed node by node."""

    def __init__(self, module: GraphModule) -> None:
        """Find out what must not be folded: values that are overwritten, and values that are too large."""
        self._module = module
        nodes = module.graph.nodes
        self._written = {each for node in nodes for written in _written_by(node) for each in (written, base_of(written))}
        self._last_reader = {read: node for node in nodes for read in node.all_input_nodes}
        tensors = [*module.parameters(), *module.buffers()]
        self._most = max([MAX_ELEMENTS, *(tensor.numel() for tensor in tensors)])
        self._sources: dict[Node, tuple[str, ...]] = {}  # the names of the tensors that each constant depends on
        self._values: dict[Node, Any] = {}  # the constants that are still needed
        self._reads: dict[Node, list[Node]] = {}  # for each folded constant, the nodes that are to read it

    def visit(self, node: Node) -> None:
        """Compute the value of a node if it is constant. All nodes before it have been visited."""
        if node not in self._written and base_of(node) not in self._written:
            if node.op == "get_attr":
                self._read(node)
            elif self._is_foldable(node):
                self._compute(node)
        replaces = node not in self._sources and not _is_returned(node)
        for read in node.all_input_nodes:
            if replaces and read.op == "call_function" and isinstance(self._values.get(read), Tensor | float):
                self._reads.setdefault(read, []).append(node)
            if self._last_reader[read] is node and read not in self._reads:
                self._values.pop(read, None)

    def _read(self, node: Node) -> None:
        """Take over a tensor of the model."""
        value = attrgetter(str(node.target))(self._module)
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            self._values[node] = value.detach()
            self._sources[node] = (str(node.target),)

    def _is_foldable(self, node: Node) -> bool:
        """Return whether an operator reads constants only and always computes the same value, which is not too large."""
        if node.op != "call_function" or any(read not in self._sources for read in node.all_input_nodes):
            return False
        if (schema := operator_schema(node.target)) is None:
            return node.target is getitem
        named = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
        name = schema.name.removeprefix("aten::")
        return (
            name != schema.name
            and not name.startswith(("empty", "new_empty"))
            and not mutates(node)
            and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]
            and not any(named.get(argument) for argument in _TRAINING)
            and all(size <= self._most for size in _sizes(node.meta.get("val")))
        )

    def _compute(self, node: Node) -> None:
        """Compute the value of an operator. It is not constant if it is not what the trace says, under autocast for example."""
        assert callable(node.target)
        value = node.target(*map_arg(node.args, self._values.__getitem__), **map_arg(node.kwargs, self._values.__getitem__))
        if isinstance(value, tuple | list | float) or _is_as_traced(value, node.meta.get("val")):
            self._values[node] = value
            self._sources[node] = tuple(dict.fromkeys(name for read in node.all_input_nodes for name in self._sources[read]))

    def replace(self) -> None:
        """Make a buffer of each constant that is a tensor, and let the other nodes read the constants."""
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        for index, (node, readers) in enumerate(self._reads.items()):
            value = self._values[node]
            if isinstance(value, Tensor):
                name = f"{CONSTANT_PREFIX if parameters.isdisjoint(self._sources[node]) else PARAMETER_PREFIX}{index}"
                self._module.register_buffer(name, _owned(value) if is_view(node) else value)
                with self._module.graph.inserting_after(node):
                    value = self._module.graph.create_node("get_attr", name)
                value.meta = {**node.meta, WEIGHT_OF: self._path(node)}
            for reader in readers:
                _replace_operand(reader, node, value)

    def _path(self, node: Node) -> str:
        """Return the path of the module whose weight a constant is computed from: that of the largest of its tensors."""
        names = [name for name in self._sources[node] if not name.rpartition(".")[2].startswith("lifted_tensor_")]
        sizes = {name: attrgetter(name)(self._module).numel() for name in names}  # without the literals of a forward
        return weight_owner(max(sizes, key=lambda name: sizes[name])) if sizes else module_path(node) or node.name


def _written_by(node: Node) -> Iterator[Node]:
    """Yield the values that a node overwrites, or may overwrite if its operator has no schema."""
    if node.op in ("placeholder", "get_attr", "output"):
        return
    schema = operator_schema(node.target)
    if schema is not None and not mutates(node):
        return
    if schema is None:
        yield from node.all_input_nodes if node.target is not getitem else ()
        return
    for index, argument in enumerate(schema.arguments):
        value: Any = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from (each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Node))


def _is_returned(node: Node) -> bool:
    """Return whether the model returns the value of a node, or whether a node is the output or a view that it returns."""
    return node.op == "output" or (is_view(node) and any(map(_is_returned, node.users)))


def _sizes(value: Any) -> Iterator[float]:
    """Yield the number of elements of each tensor that a trace notes of a node; infinity for a tensor of a free size."""
    for each in value if isinstance(value, tuple | list) else [value]:
        if isinstance(each, Tensor):
            sizes = [fixed_size(size) for size in each.shape]
            yield math.inf if None in sizes else math.prod(size or 0 for size in sizes)


def _is_as_traced(value: Any, traced: Any) -> bool:
    """Return whether a value is a dense tensor of the shape and the dtype that the trace notes."""
    if type(value) is not Tensor or not isinstance(traced, Tensor) or value.layout is not torch.strided:
        return False
    return value.dtype == traced.dtype and tuple(value.shape) == tuple(map(fixed_size, traced.shape))


def _owned(view: Tensor) -> Tensor:
    """Return a view in memory of its own. It keeps the order of its axes if it has neither gaps nor repetitions."""
    is_dense = view.untyped_storage().nbytes() == view.nbytes
    return view.clone() if is_dense else view.clone(memory_format=torch.contiguous_format)


def _replace_operand(reader: Node, old: Node, new: Any) -> None:
    """Let a node read another node, or a number, in the place of an operand."""

    def replaced(operand: Node) -> Any:
        return new if operand is old else operand

    reader.args, reader.kwargs = map_arg(reader.args, replaced), map_arg(reader.kwargs, replaced)
