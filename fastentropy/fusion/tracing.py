"""Trace a model into a graph of ATen operators, run the graph, and rewrite its chains (stretches of linear operators)."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule, Interpreter, Node

from fastentropy._compat import asserts_metadata, storage_id
from fastentropy._utils.errors import one_line
from fastentropy.fusion.chains.constants import fold_constants
from fastentropy.fusion.chains.elements import Chain
from fastentropy.fusion.chains.finding import FoundChain
from fastentropy.fusion.chains.layouts import append_view
from fastentropy.fusion.chains.lowering import Lowering
from fastentropy.fusion.chains.nodes import overwrites
from fastentropy.fusion.inputs import Inputs, clone, has_batch, with_batch_size
from fastentropy.fusion.memory_format import CHANNELS_LAST
from fastentropy.fusion.shared_tensors import SharedTensors
from fastentropy.fusion.traced_inputs import TracedInputs

#: The new form of each chain of a graph. None stands for the chain with batch norm folded, which is built when it is needed.
ChainForms: TypeAlias = "Mapping[FoundChain, Chain | None]"

#: The prefix of the names of the constants of rewritten chains.
CHAIN_PREFIX = "fastentropy_chain_"


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
        hint = "; it takes a branch by the value of a tensor, see torch.cond" if "data-dependent" in str(error) else ""
        raise ValueError(f"torch.export cannot trace {type(model).__name__}: {one_line(error)}{hint}") from error


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
        if TracedInputs.of(program).free_axes():
            return program
    except Exception:  # whatever a model raises for another batch size
        pass
    return torch.export.export(model, inputs.args, inputs.kwargs)


def export_again(network: nn.Module, inputs: TracedInputs) -> ExportedProgram:
    """Trace a network that computes what an earlier trace computes, with the same free sizes.

    Args:
        network: the network, such as a rewritten graph of that trace.
        inputs: the inputs of that trace.

    Returns:
        The exported program. It owns its constants, and shares the weights with the network.

    Raises:
        ValueError: torch.export cannot trace the network.
    """
    sample = inputs.sample()
    # The constructor of ShapesCollection has no annotations.
    shapes, leaves = ShapesCollection(), sample.leaves  # type: ignore[no-untyped-call]
    free: dict[int, dict[int, Any]] = {}
    for leaf, axis in inputs.free_axes():
        free.setdefault(leaf, {})[axis] = Dim.AUTO
    for leaf, axes in free.items():
        shapes[leaves[leaf]] = axes
    try:
        return own_constants(torch.export.export(network, sample.args, sample.kwargs, dynamic_shapes=shapes if free else None))
    except Exception as error:
        raise ValueError(f"torch.export cannot trace the fused network: {one_line(error)}") from error


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


def prepared_module(program: ExportedProgram) -> GraphModule:
    """Return the graph of a program as `inference_module` does, with all that is computed from constants alone folded.

    Checks of the dtype and the device of intermediate values are left out: they follow from the inputs.
    """
    module = program.module(check_guards=False)
    for node in list(module.graph.nodes):
        if asserts_metadata(node.target) and node.args[0].op != "placeholder":
            module.graph.erase_node(node)
    fold_constants(module)
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


def rewrite(
    traced: GraphModule, forms: ChainForms, sources: Mapping[Node, Tensor], known: SharedTensors | None = None
) -> GraphModule:
    """Return a copy of a graph with chains rewritten.

    Args:
        traced: the graph, which is not changed.
        forms: the new form of each chain, in the order of the graph.
        sources: an example of each chain's input, by its node. The constants of a new form get its dtype, memory format and
            device. Its values are not read.
        known: the constants of other graphs, which the copy shares where it has equal ones.
    """
    graph = copy.deepcopy(traced.graph)
    copies = {node.name: node for node in graph.nodes}
    constants: dict[str, Tensor] = {}
    known = known or SharedTensors()
    taken = _storages_outside(traced, forms)
    for index, (chain, form) in enumerate(forms.items()):
        end = copies[chain.end.name]
        with graph.inserting_before(end):
            result, tensors = _insert_form(graph, chain, form, copies, sources[chain.source], f"{CHAIN_PREFIX}{index}")
        constants |= {name: known.shared(tensor, taken) for name, tensor in tensors.items()}
        end.replace_all_uses_with(result)
        for node in reversed(chain.members):
            graph.erase_node(copies[node.name])
        copies[chain.end.name] = result  # the next chain may begin here
    _allow_all_strides(graph)
    return _with_constants(traced, graph, constants)


def _storages_outside(traced: GraphModule, forms: ChainForms) -> set[int]:
    """Return the storages of the constants of a graph that nodes outside of the given chains read."""
    members = {node for chain in forms for node in chain.members}
    read = [node for node in traced.graph.find_nodes(op="get_attr") if not members.issuperset(node.users)]
    values = [attrgetter(str(node.target))(traced) for node in read]
    return {storage_id(value) for value in values if isinstance(value, Tensor)}


class AddedForms(NamedTuple):
    """A graph that also computes forms of its chains.

    Attributes:
        module: the graph. The outputs of the forms are further outputs.
        owners: the chain of each added node, by the name of the node.
        results: the node with the output of each chain's form.
        last: the last node of each form, by the name of the node. Its output is complete only then, because border strips are
            written into it. A form that returns its input has no node.
    """

    module: GraphModule
    owners: dict[str, FoundChain]
    results: dict[FoundChain, Node]
    last: dict[str, FoundChain]


def add_forms(traced: GraphModule, forms: ChainForms, sources: Mapping[Node, Tensor], known: SharedTensors) -> AddedForms:
    """Return a copy of a graph that also computes forms of its chains, each from the values that the chain itself gets.

    The arguments are as in `rewrite`.
    """
    graph = copy.deepcopy(traced.graph)
    copies = {node.name: node for node in graph.nodes}
    constants: dict[str, Tensor] = {}
    owners: dict[str, FoundChain] = {}
    results: dict[FoundChain, Node] = {}
    for index, (chain, form) in enumerate(forms.items()):
        end = copies[chain.end.name]
        after = end.next
        with graph.inserting_before(after):
            results[chain], tensors = _insert_form(graph, chain, form, copies, sources[chain.source], f"{CHAIN_PREFIX}{index}")
        constants |= {name: known.shared(tensor) for name, tensor in tensors.items()}
        added = after.prev
        while added is not end:
            owners[added.name], added = chain, added.prev
    output = graph.output_node()
    output.args = ((*output.all_input_nodes, *results.values()),)
    _allow_all_strides(graph)
    module = _with_constants(traced, graph, constants)
    copied = {node.name: node for node in module.graph.nodes}
    last = {owners[name]: name for name in copied if name in owners}
    outputs = {chain: copied[node.name] for chain, node in results.items()}
    return AddedForms(module, owners, outputs, {name: chain for chain, name in last.items()})


def _insert_form(
    graph: torch.fx.Graph, chain: FoundChain, form: "Chain | None", copies: Mapping[str, Node], like: Tensor, prefix: str
) -> tuple[Node, dict[str, Tensor]]:
    """Insert a form of a chain into a graph, at the place where the graph inserts nodes.

    Args:
        graph: a copy of the graph in which the chain was found.
        chain: the chain.
        form: its form; None for the chain with batch norm folded.
        copies: the nodes of `graph`, by their names in the original graph.
        like: an example of the chain's input.
        prefix: how the names of the constants begin.

    Returns:
        The node of the form's output, and the constants that the form reads, by name.
    """
    form = chain.folded if form is None else form
    lowering = Lowering(graph, like, prefix, chain.has_fixed_size)
    result = lowering.lower(form, lowering.begin(form, copies[chain.source.name]), like.shape)
    if chain.view:
        result = append_view(graph, chain.view, result, chain.shape)
    return result, lowering.tensors


def _allow_all_strides(graph: torch.fx.Graph) -> None:
    """Replace each `view` of a graph by a reshape, since a new form may return other strides than its chain.

    A view stays if the graph overwrites its values, which are those of its operand.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        if not any(overwrites(user, node) for user in node.users):
            node.target = torch.ops.aten.reshape.default


def in_channels_last(traced: GraphModule, known: SharedTensors | None = None) -> GraphModule | None:
    """Return a copy of a graph with the weights of its 2-d and 3-d convolutions in channels-last.

    The outputs of these convolutions are then in channels-last too. Returns None if the graph has no such convolution, or only
    convolutions that cut an image into patches, which are no faster in channels-last.

    Args:
        traced: the graph.
        known: tensors that the copy shares where it has equal ones.
    """
    convolutions = [node for node in traced.graph.nodes if _is_spatial_convolution(node, traced)]
    values = {str(node.args[1].target): attrgetter(str(node.args[1].target))(traced) for node in convolutions}
    if all(_cuts_into_patches(node, values[str(node.args[1].target)]) for node in convolutions):
        return None
    known, taken = known or SharedTensors(), set[int]()
    last = {name: value.contiguous(memory_format=CHANNELS_LAST[value.ndim]) for name, value in values.items()}
    added = {name: known.shared(value, taken) for name, value in last.items()}
    return _with_constants(traced, copy.deepcopy(traced.graph), added)


def _is_spatial_convolution(node: Node, traced: GraphModule) -> bool:
    """Return whether a node is a 2-d or 3-d convolution with a constant weight."""
    if node.op != "call_function" or ".conv" not in f".{str(node.target).removeprefix('aten')}":
        return False
    weight = node.args[1]
    is_constant = isinstance(weight, Node) and weight.op == "get_attr"
    # mypy does not see that `is_constant` implies a Node.
    return is_constant and attrgetter(str(weight.target))(traced).ndim in CHANNELS_LAST  # type: ignore[union-attr]


def _cuts_into_patches(node: Node, weight: Tensor) -> bool:
    """Return whether the kernel of a convolution, larger than one position, is as large as its stride."""
    if "transpose" in str(node.target):
        return False
    stride = node.args[3] if len(node.args) > 3 else 1
    kernel = list(weight.shape[2:])
    return max(kernel) > 1 and kernel == (list(stride) if isinstance(stride, Sequence) else [stride] * len(kernel))


class _Visitor(Interpreter):
    """Runs a graph, and hands the values of some of its nodes to a function. What no node reads any more is freed."""

    def __init__(self, module: GraphModule, nodes: Iterable[Node], visit: Callable[[Node, Tensor], object]) -> None:
        super().__init__(module)
        self.extra_traceback = False  # an error of `visit` is no error of the graph
        self._nodes, self._visit = {node.name: node for node in nodes}, visit

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self._nodes:
            self._visit(self._nodes[n.name], value)
        return value


def visit_values(traced: GraphModule, nodes: Sequence[Node], inputs: Inputs, visit: Callable[[Node, Tensor], object]) -> None:
    """Run a graph and call `visit(node, value)` for some nodes as soon as each is computed, so that not all values are kept.

    The other arguments are those of `values_of`.
    """
    _Visitor(traced, nodes, visit).run(*inputs.leaves, enable_io_processing=False)


def values_of(traced: GraphModule, nodes: Sequence[Node], inputs: Inputs) -> dict[Node, Tensor]:
    """Run a graph and return the values of some nodes.

    Args:
        traced: the graph.
        nodes: nodes of the graph, or nodes with the same names in a graph of which it is a copy.
        inputs: the inputs of the call.
    """
    values: dict[Node, Tensor] = {}
    visit_values(traced, nodes, inputs, values.__setitem__)
    return values
