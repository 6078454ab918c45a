"""Trace a model into a graph of ATen operators, run the graph, and rewrite its chains (stretches of linear operators)."""

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

from fastentropy._compat import tree_unflatten
from fastentropy._utils.errors import one_line
from fastentropy.fusion.chains.elements import Chain, output_shape
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.chains.lowering import Lowering
from fastentropy.fusion.chains.nodes import fixed_size
from fastentropy.fusion.inputs import Inputs, clone, has_batch, with_batch_size
from fastentropy.fusion.memory_format import CHANNELS_LAST

#: The prefix of the names of the constants of rewritten chains.
CHAIN_PREFIX = "fastentropy_chain_"

#: The sizes that an axis may have: at least the first number and less than the second. None as the second means no limit.
Sizes = tuple[int, int | None]


def export(model: nn.Module, example_inputs: Inputs, dynamic_sizes: bool = False) -> ExportedProgram:
    """Trace a model with a free batch size, or with the batch size of the example if the model allows no other.

    Args:
        model: the model.
        example_inputs: the inputs of one call. Axis 0 of each tensor of the batch size is the batch.
        dynamic_sizes: leave the other sizes free too, as far as the model allows it.

    Returns:
        The exported program.

    Raises:
        ValueError: torch.export cannot trace the model.
    """
    inputs = clone(example_inputs)
    try:
        if inputs.batch == 1:
            return _trace_single(model, inputs, dynamic_sizes)
        return _trace(model, inputs, dynamic_sizes)
    except Exception as error:
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {one_line(error)}") from error


def _trace(model: nn.Module, inputs: Inputs, dynamic_sizes: bool) -> ExportedProgram:
    """Trace a model on these inputs; the arguments are as in `export`."""
    # The constructor of ShapesCollection has no annotations.
    shapes, batch = ShapesCollection(), inputs.batch  # type: ignore[no-untyped-call]
    for value in inputs.leaves:
        if not isinstance(value, Tensor):
            continue
        free = {0: Dim.AUTO} if has_batch(value, batch) else {}
        if dynamic_sizes:
            free |= dict.fromkeys(range(1, value.ndim), Dim.AUTO)
        if free:
            shapes[value] = free
    return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes)


def _trace_single(model: nn.Module, inputs: Inputs, dynamic_sizes: bool) -> ExportedProgram:
    """Trace a model whose example inputs are a batch of one.

    torch.export treats a size of one as a constant. The model is therefore traced on a batch of two, unless it allows no other
    batch size than one.
    """
    try:
        program = _trace(model, with_batch_size(inputs, 2), dynamic_sizes)
        if free_axes(program):
            return program
    except Exception:  # whatever a model raises for another batch size
        pass
    return torch.export.export(model, inputs.args, inputs.kwargs)


def free_axes(program: ExportedProgram) -> list[tuple[int, int]]:
    """Return the axes with free sizes, each as the index of an input in flat order and the index of its axis."""
    sizes = enumerate(input_sizes(program))
    return [
        (index, axis) for index, each in sizes for axis, (low, high) in enumerate(each or ()) if high is None or high > low + 1
    ]


def own_constants(program: ExportedProgram) -> ExportedProgram:
    """Replace the constants of a program by copies and return the program.

    A constant may be a tensor that the code of the model refers to, and the result must not share memory with it.
    """
    for name, value in program.constants.items():
        if isinstance(value, Tensor):
            program.constants[name] = value.clone()
    return program


def inference_module(program: ExportedProgram) -> GraphModule:
    """Return the graph of a program as a module. Its weights are buffers, and it does not check the shapes of its inputs."""
    module = program.module(check_guards=False)
    return _with_constants(module, module.graph, {})


def _with_constants(module: nn.Module, graph: torch.fx.Graph, added: Mapping[str, Tensor]) -> GraphModule:
    """Return a graph as a module with the constants that it reads.

    Args:
        module: holds the constants that are not in `added`.
        graph: the graph. Nodes whose values are not used are removed from it.
        added: further constants by name.
    """
    graph.eliminate_dead_code()
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"} - set(added)
    constants: dict[str, Any] = {name: attrgetter(name)(module) for name in names}
    detached = {name: v.detach() if isinstance(v, Tensor) else v for name, v in constants.items()}
    return GraphModule({**detached, **added}, graph)


def rewrite(traced: GraphModule, forms: Mapping[FoundChain, Chain], sources: Mapping[Node, Tensor]) -> GraphModule:
    """Return a copy of a graph with chains rewritten.

    Args:
        traced: the graph, which is not changed.
        forms: the new form of each chain, in the order of the graph.
        sources: an example of each chain's input, by its node. The constants of a new form get its dtype, memory format and
            device.
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
    """Apply a view of a chain to the output of its new form.

    Args:
        graph: the graph that is rewritten.
        view: the node of the view in the original graph: a permutation, or a reshape of all axes but the last.
        copies: the nodes of `graph`, by their names in the original graph.
        value: the node of the output.
        features: the size of the last axis of the output. A reshape keeps it.
    """
    if view.target is torch.ops.aten.permute.default:
        return graph.call_function(view.target, (value, view.args[1]))
    sizes = view.args[1]
    assert isinstance(sizes, Sequence)
    leading = [copies[size.name] if isinstance(size, Node) else size for size in sizes[:-1]]
    return graph.call_function(torch.ops.aten.reshape.default, (value, [*leading, features]))


def in_channels_last(traced: GraphModule) -> GraphModule | None:
    """Return a copy of a graph with the weights of its 2-d and 3-d convolutions in channels-last.

    The outputs of these convolutions are then in channels-last too. Returns None if the graph has no such convolution.
    """
    weights = {str(node.args[1].target) for node in traced.graph.nodes if _is_spatial_convolution(node, traced)}
    if not weights:
        return None
    values = {name: attrgetter(name)(traced) for name in weights}
    added = {name: value.contiguous(memory_format=CHANNELS_LAST[value.ndim]) for name, value in values.items()}
    return _with_constants(traced, copy.deepcopy(traced.graph), added)


def _is_spatial_convolution(node: Node, traced: GraphModule) -> bool:
    """Return whether a node is a 2-d or 3-d convolution with a constant weight."""
    if node.op != "call_function" or ".conv" not in f".{str(node.target).removeprefix('aten')}":
        return False
    weight = node.args[1]
    is_constant = isinstance(weight, Node) and weight.op == "get_attr"
    # mypy does not see that `is_constant` implies a Node.
    return is_constant and attrgetter(str(weight.target))(traced).ndim in CHANNELS_LAST  # type: ignore[union-attr]


class _Recorder(Interpreter):
    """Runs a graph and keeps the values of some of its nodes.

    Attributes:
        values: the kept values by the name of their node.
    """

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
    """Run a graph and return the values of some nodes.

    Args:
        traced: the graph.
        nodes: nodes of the graph, or nodes with the same names in a graph of which it is a copy.
        inputs: the inputs of the call.
    """
    recorder = _Recorder(traced, nodes)
    recorder.run(*inputs.leaves, enable_io_processing=False)
    return {node: recorder.values[node.name] for node in nodes}


def input_sizes(program: ExportedProgram) -> list[tuple[Sizes, ...] | None]:
    """Return the sizes that each axis of each input may have; None for an input that is not a tensor.

    The inputs are in flat order.
    """
    return [_sizes(value, program) for value in user_inputs(program)]


def user_inputs(program: ExportedProgram) -> list[Any]:
    """Return the inputs of a trace in flat order. Each is a fake tensor (a shape without memory) or a constant."""
    placeholders = zip(program.graph_signature.input_specs, program.graph.find_nodes(op="placeholder"), strict=True)
    return [node.meta.get("val") for spec, node in placeholders if spec.kind is InputKind.USER_INPUT]


def sample_inputs(program: ExportedProgram) -> Inputs:
    """Return inputs with which a program can be called.

    Floating-point tensors are random, all other tensors are zeros, and each free size is the smallest allowed one from 2 on.
    """
    generator = torch.Generator().manual_seed(0)

    def sample(value: Any, sizes: tuple[Sizes, ...] | None) -> Any:
        if sizes is None:
            return value
        shape = [low if high == low + 1 else max(low, 2) for low, high in sizes]
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype, device=value.device)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(value.device, value.dtype)

    leaves = list(map(sample, user_inputs(program), input_sizes(program)))
    args, kwargs = tree_unflatten(leaves, program.call_spec.in_spec)
    return Inputs(args, kwargs)


def fits(value: Any, sizes: tuple[Sizes, ...] | None) -> bool:
    """Return whether an input is a tensor whose sizes are all allowed.

    Args:
        value: the input.
        sizes: the allowed sizes per axis, or None to allow every value.
    """
    if sizes is None:
        return True
    if not isinstance(value, Tensor) or value.ndim != len(sizes):
        return False
    return all(low <= size and (high is None or size < high) for size, (low, high) in zip(value.shape, sizes, strict=True))


def _sizes(value: Any, program: ExportedProgram) -> tuple[Sizes, ...] | None:
    """Return the sizes that each axis of one input of a trace may have; None if it is not a tensor."""
    if not isinstance(value, Tensor):
        return None
    return tuple(_allowed(size, program) for size in value.shape)


def _allowed(size: int | torch.SymInt, program: ExportedProgram) -> Sizes:
    """Return the values that a size of a trace may have."""
    if (constant := fixed_size(size)) is not None:
        return constant, constant + 1
    assert isinstance(size, torch.SymInt)
    bounds = program.range_constraints.get(size.node.expr)
    lowest, highest = (int(bounds.lower), bounds.upper) if bounds else (0, None)
    limit = int(highest) + 1 if highest is not None and highest < sys.maxsize else None
    # A trace reports sizes from 2 on. Its guards decide whether it is also correct for 1.
    return 1 if lowest <= 2 else lowest, limit
