"""Let exported programs count the states of their activations, and make statistics of these counts."""

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fastentropy._compat import tree_structure, tree_unflatten
from fastentropy.collector.compiled.forms import count_as_sums
from fastentropy.collector.site_statistics import SiteStatistics
from fastentropy.collector.statistics import Statistics
from fastentropy.collector.values import COUNTABLE
from fastentropy.sites.exported_calls import ExportedCall, activations_in_branches, exported_calls, exported_sites
from fastentropy.sites.inputs import described
from fastentropy.sites.site import Site

#: The counts of one call: by name of the site, and below it by name of the activation, int64 [neurons, 4].
Counts = Mapping[str, Mapping[str, Tensor]]


def instrument(
    program: ExportedProgram, *, channel_axis: Mapping[str, int] | None = None, exclude: Collection[str] = ()
) -> ExportedProgram:
    """Return a program that computes what an exported program computes, and counts the states of its activations.

    The new program returns (outputs, counts), where `outputs` are those of the program. `counts` maps the name of each site
    (call of an activation) to {activation: counts}, with int64 counts [neurons, 4]: how often each neuron's input was off
    (below 0), zero, on (above 0) and NaN in this call. `statistics_of` makes `Statistics` of them. The counts are operators of
    the program: it can be compiled by AOTInductor, saved, and run where fastentropy is not installed. All positions are
    counted, padding too.

    Args:
        program: what `torch.export.export` returned, before `run_decompositions`. It is not changed, and shares its weights
            with the new program. It runs once on its example inputs, to find out where the neurons lie.
        channel_axis: the axis of the activation's input whose entries are the neurons, by name of the site, where it should not
            be inferred.
        exclude: names of sites that are not counted, or patterns of names such as "encoder.*" (see `fnmatch`).

    Returns:
        The new program.

    Raises:
        TypeError: `program` is not an exported program.
        ValueError: the program was decomposed, has no example inputs or calls no known activation, or the input of an
            activation is not known.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
        >>> program = fe.instrument(torch.export.export(model, (torch.randn(5, 3),)))
        >>> y, counts = program.module()(torch.randn(5, 3))
        >>> fe.statistics_of(counts)["1"].observations
        20
    """
    _check(program)
    calls = exported_calls(program)
    sites = exported_sites(program, calls, dict(channel_axis or {}), exclude)
    if not sites:
        raise ValueError("the program calls no known activation that is not excluded; export the model before it is fused")
    if hidden := activations_in_branches(program):
        where = "in programs within the program, such as branches of torch.cond or code under torch.no_grad()"
        warnings.warn(f"not counted, because they are {where}: {', '.join(hidden)}", stacklevel=2)
    graph = Graph()
    copies: dict[Node, Node] = {}
    output = graph.output(graph.graph_copy(program.graph, copies))
    output.meta = dict(program.graph.output_node().meta)
    for node, copied in copies.items():
        copied.name = node.name  # copying renames a node such as "input", and the signature knows nodes by their names
    counts = [
        (call, _add_count(graph, copies[call.node], copies[call.x], sites[call.name]))
        for call in calls
        if call.name in sites and call.x is not None
    ]
    output.args = ((*output.args[0], *(node for _, node in counts)),)
    return _with_outputs(program, graph, counts)


def statistics_of(counts: Counts) -> Statistics:
    """Make statistics of the counts that a program of `instrument` has returned. Those of several calls can be added.

    Args:
        counts: the counts by name of the site and by activation, int64 [neurons, 4].

    Returns:
        The statistics of one call.

    Raises:
        TypeError: `counts` are no such counts.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> counts = {"act": {"relu": torch.tensor([[2, 0, 2, 0], [1, 1, 1, 1]])}}
        >>> statistics = fe.statistics_of(counts) + fe.statistics_of(counts)
        >>> statistics["act"].observations, statistics["act"].nan
        (14, 2)
    """
    sites: dict[str, SiteStatistics] = {}
    for name, by_activation in counts.items() if isinstance(counts, Mapping) else ():
        for activation, each in by_activation.items() if isinstance(by_activation, Mapping) else ():
            if not isinstance(each, Tensor) or each.dtype != torch.int64 or each.ndim != 2 or each.shape[1] != 4:
                raise TypeError(f"counts of {name!r}: got {described(each)}, expected int64 [neurons, 4]")
            sites[name] = SiteStatistics(activation, each[:, :3].cpu(), int(each[:, 3].sum()), batches=1)
    if not sites:
        raise TypeError(f"counts: got {described(counts)}, expected the second output of a program of fe.instrument")
    return Statistics(sites)


def _check(program: Any) -> None:
    """Raise if a program cannot be instrumented."""
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"program: got {described(program)}, expected an exported program; pass torch.export.export(model, example_inputs)"
        )
    if program.dialect != "TRAINING":
        raise ValueError("the program was decomposed, so that activations may be taken apart; instrument it before")
    if program.example_inputs is None:
        raise ValueError("the program has no example inputs; set program.example_inputs = (args, kwargs)")


def _add_count(graph: Graph, before: Node, x: Node, site: Site) -> Node:
    """Insert the count of one call into a graph, and return the node of the counts, int64 [neurons, 4].

    Args:
        graph: the graph.
        before: the first node of the call.
        x: the node of the activation's input.
        site: the site of the call.
    """
    traced = make_fx(lambda value: _count(value, site.channel_axis), tracing_mode="symbolic")(x.meta["val"])
    (given,) = traced.graph.find_nodes(op="placeholder")
    with graph.inserting_before(before):
        result = graph.graph_copy(traced.graph, {given: x})
    assert isinstance(result, Node)
    return result


def _count(x: Tensor, channel_axis: int | None) -> Tensor:
    """Return the counts of a value, int64 [neurons, 4]: off, zero, on and NaN."""
    x = x.detach() if x.dtype in COUNTABLE else x.detach().float()
    x, axis = (x.unsqueeze(-1), x.ndim) if channel_axis is None else (x, channel_axis)
    counts = torch.stack(count_as_sums(x, x, axis, None), 1)
    nan = x.numel() // x.shape[axis] - counts.sum(1)
    return torch.cat([counts, nan.unsqueeze(1)], 1)


def _with_outputs(program: ExportedProgram, graph: Graph, counts: list[tuple[ExportedCall, Node]]) -> ExportedProgram:
    """Return a program with a changed graph, which returns counts in addition to the outputs of the program."""
    specs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for _, node in counts]
    signature = program.graph_signature
    entry = program.module_call_graph[0]
    given = tree_unflatten([0] * entry.signature.out_spec.num_leaves, entry.signature.out_spec)
    structure = tree_structure((given, {call.name: {call.activation: 0} for call, _ in counts}))
    outputs = [*entry.signature.outputs, *(spec.arg for spec in specs)] if entry.signature.outputs else []
    called = dataclasses.replace(entry.signature, out_spec=structure, outputs=outputs)
    return ExportedProgram(
        program.graph_module,
        graph,
        ExportGraphSignature(signature.input_specs, [*signature.output_specs, *specs]),
        program.state_dict,
        dict(program.range_constraints),
        [dataclasses.replace(entry, signature=called)],
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
