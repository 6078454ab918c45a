"""Trace a model into a graph of ATen operators, run the graph, and rewrite its chains."""

import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Interpreter, Node

from fastentropy._compat import tree_leaves, tree_unflatten
from fastentropy._utils.errors import one_line
from fastentropy.fusion.chains.aten import fixed_size
from fastentropy.fusion.chains.elements import Chain, output_shape
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.chains.lowering import Lowering
from fastentropy.fusion.inputs import Inputs, batch_size, clone, has_batch, with_batch_size
from fastentropy.fusion.memory_format import CHANNELS_LAST

#: The prefix of the names of the constants that a rewritten chain has.
CHAIN_PREFIX = "fastentropy_chain_"

#: The sizes that an axis may have: at least the first and below the second, None for no limit.
Sizes = tuple[int, int | None]


def export(model: nn.Module, example_inputs: Inputs, dynamic_sizes: bool = False) -> ExportedProgram:
    """Trace a model with a free batch size, or with that of the example if the model takes no other.

    With `dynamic_sizes`, the other sizes are free too, where the model allows it.
    Raises ValueError if torch.export cannot trace the model.
    """
    inputs = clone(example_inputs)
    try:
        if batch_size(inputs) == 1:
            return _trace_single(model, inputs, dynamic_sizes)
        return _trace(model, inputs, dynamic_sizes)
    except Exception as error:
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {one_line(error)}") from error


def _trace(model: nn.Module, inputs: Inputs, dynamic_sizes: bool) -> ExportedProgram:
    # The constructor of ShapesCollection has no annotations.
    shapes, batch = ShapesCollection(), batch_size(inputs)  # type: ignore[no-untyped-call]
    for value in tree_leaves(inputs):
        if not isinstance(value, Tensor):
            continue
        free = {0: Dim.AUTO} if has_batch(value, batch) else {}
        if dynamic_sizes:
            free |= dict.fromkeys(range(1, value.ndim), Dim.AUTO)
        if free:
            shapes[value] = free
    return torch.export.export(model, inputs, dynamic_shapes=shapes)


def _trace_single(model: nn.Module, inputs: Inputs, dynamic_sizes: bool) -> ExportedProgram:
    """Trace for a batch of one, at a batch of two where the model takes it: torch.export treats a size of one as constant."""
    try:
        program = _trace(model, with_batch_size(inputs, 2), dynamic_sizes)
        if free_axes(program):
            return program
    except Exception:  # whatever a model raises for another batch size
        pass
    return torch.export.export(model, inputs)


def free_axes(program: ExportedProgram) -> list[tuple[int, int]]:
    """Return each free size as the index of its input, in flat order, and its axis."""
    sizes = enumerate(input_sizes(program))
    return [
        (index, axis) for index, each in sizes for axis, (low, high) in enumerate(each or ()) if high is None or high > low + 1
    ]


def own_constants(program: ExportedProgram) -> ExportedProgram:
    """Give a program copies of its constants, which may be tensors that the code of the model refers to, and return it."""
    for name, value in program.constants.items():
        if isinstance(value, Tensor):
            program.constants[name] = value.clone()
    return program


def inference_module(program: ExportedProgram) -> GraphModule:
    """Return the graph of a program as a module with weights as buffers and without checks of the input shapes."""
    module = program.module(check_guards=False)
    return _with_constants(module, module.graph, {})


def _with_constants(module: nn.Module, graph: torch.fx.Graph, added: Mapping[str, Tensor]) -> GraphModule:
    """Return the graph as a module that owns the constants it reads: `added` by name, and the others of the given module."""
    graph.eliminate_dead_code()
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - set(added)
    constants: dict[str, Any] = {name: attrgetter(name)(module) for name in names}
    detached = {name: v.detach() if isinstance(v, Tensor) else v for name, v in constants.items()}
    return GraphModule({**detached, **added}, graph)


def rewrite(traced: GraphModule, forms: Mapping[FoundChain, Chain], sources: Mapping[Node, Tensor]) -> GraphModule:
    """Return the same graph with chains in other forms.

    Args:
        traced: the graph, which is left as it is.
        forms: the new form of each chain, in the order of the graph.
        sources: the value of each chain's source, which gives the dtype, memory format and device of the form.
    """
    graph = copy.deepcopy(traced.graph)
    copies = {node.name: node for node in graph.nodes}
    constants: dict[str, Tensor] = {}
    for index, (chain, form) in enumerate(forms.items()):
        end = copies[chain.end.name]
        like = sources[chain.source]
        with graph.inserting_before(end):
            lowering = Lowering(graph, like, f"{CHAIN_PREFIX}{index}", chain.has_fixed_size)
            result = lowering.lower(form, copies[chain.source.name], like.shape)
            for view in chain.views:
                result = _view_again(graph, view, copies, result, output_shape(form, like.shape)[-1])
        constants |= lowering.tensors
        end.replace_all_uses_with(result)
        for node in reversed(chain.members):
            graph.erase_node(copies[node.name])
        copies[chain.end.name] = result  # the next chain may begin here
    return _with_constants(traced, graph, constants)


def _view_again(graph: torch.fx.Graph, view: Node, copies: Mapping[str, Node], value: Node, features: int) -> Node:
    """Apply a view of a chain to the result of its new form: a permutation, or a reshape to its number of features."""
    if view.target is torch.ops.aten.permute.default:
        return graph.call_function(view.target, (value, view.args[1]))
    sizes = view.args[1]
    assert isinstance(sizes, Sequence)
    leading = [copies[size.name] if isinstance(size, Node) else size for size in sizes[:-1]]
    return graph.call_function(torch.ops.aten.reshape.default, (value, [*leading, features]))


def in_channels_last(traced: GraphModule) -> GraphModule | None:
    """Return the same graph with the weights of 2-d and 3-d convolutions in channels-last, which their outputs then are too.

    None if the graph has no such convolution.
    """
    weights = {str(node.args[1].target) for node in traced.graph.nodes if _is_spatial_convolution(node, traced)}
    if not weights:
        return None
    values = {name: attrgetter(name)(traced) for name in weights}
    added = {name: value.contiguous(memory_format=CHANNELS_LAST[value.ndim]) for name, value in values.items()}
    return _with_constants(traced, copy.deepcopy(traced.graph), added)


def _is_spatial_convolution(node: Node, traced: GraphModule) -> bool:
    if node.op != "call_function" or ".conv" not in f".{str(node.target).removeprefix('aten')}":
        return False
    weight = node.args[1]
    is_constant = isinstance(weight, Node) and weight.op == "get_attr"
    # mypy does not see that `is_constant` implies a Node.
    return is_constant and attrgetter(str(weight.target))(traced).ndim in CHANNELS_LAST  # type: ignore[union-attr]


class _Recorder(Interpreter):
    """Run a graph and keep the values of some of its nodes."""

    def __init__(self, module: GraphModule, nodes: Iterable[Node]) -> None:
        super().__init__(module)
        self.values: dict[str, Tensor] = {}
        self._names = {node.name for node in nodes}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._names:
            self.values[n.name] = value
        return value


def values_of(traced: GraphModule, nodes: Sequence[Node], inputs: Inputs) -> dict[Node, Tensor]:
    """Return the values of nodes for some inputs. The nodes may belong to the graph that the given one is a copy of."""
    recorder = _Recorder(traced, nodes)
    recorder.run(*tree_leaves(inputs), enable_io_processing=False)
    return {node: recorder.values[node.name] for node in nodes}


def input_sizes(program: ExportedProgram) -> list[tuple[Sizes, ...] | None]:
    """Return the sizes that the axes of each input may have, and None for an input that is no tensor."""
    return [_sizes(value, program) for value in user_inputs(program)]


def user_inputs(program: ExportedProgram) -> list[Any]:
    """Return each input as the trace knows it: a tensor without memory, or a constant."""
    placeholders = zip(program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True)
    return [node.meta.get("val") for spec, node in placeholders if spec.kind is InputKind.USER_INPUT]


def sample_inputs(program: ExportedProgram) -> Inputs:
    """Return positional inputs that a program takes: random floats, zeros for integers, and 2 or more for each free size."""
    generator = torch.Generator().manual_seed(0)

    def sample(value: Any, sizes: tuple[Sizes, ...] | None) -> Any:
        if sizes is None:
            return value
        shape = [low if high == low + 1 else max(low, 2) for low, high in sizes]
        drawn = torch.randn(shape, generator=generator) if value.is_floating_point() else torch.zeros(shape)
        return drawn.to(value.device, value.dtype)

    leaves = list(map(sample, user_inputs(program), input_sizes(program)))
    arguments, _ = tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(arguments)


def fits(value: Any, sizes: tuple[Sizes, ...] | None) -> bool:
    """Return whether an input has allowed sizes; any value has where `sizes` is None."""
    if sizes is None:
        return True
    if not isinstance(value, Tensor) or value.ndim != len(sizes):
        return False
    return all(low <= size and (high is None or size < high) for size, (low, high) in zip(value.shape, sizes, strict=True))


def _sizes(value: Any, program: ExportedProgram) -> tuple[Sizes, ...] | None:
    if not isinstance(value, Tensor):
        return None
    return tuple(_allowed(size, program) for size in value.shape)


def _allowed(size: int | torch.SymInt, program: ExportedProgram) -> Sizes:
    if (constant := fixed_size(size)) is not None:
        return constant, constant + 1
    assert isinstance(size, torch.SymInt)
    bounds = program.range_constraints.get(size.node.expr)
    lowest, highest = (int(bounds.lower), bounds.upper) if bounds else (0, None)
    limit = int(highest) + 1 if highest is not None and highest < sys.maxsize else None
    # A trace reports sizes from 2 on; its guards decide whether it also holds for 1.
    return 1 if lowest <= 2 else lowest, limit
