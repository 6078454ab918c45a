"""Make the forms of a network that `fuse` compares: original, with batch norm folded, and fused, in two memory formats."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fastentropy._compat import without_values
from fastentropy.fusion.chain_verification import rewrite_equal
from fastentropy.fusion.chains.elements import Chain, operators
from fastentropy.fusion.chains.finding import FoundChain, find_chains
from fastentropy.fusion.chains.passes import rounded
from fastentropy.fusion.finishing import finish
from fastentropy.fusion.inputs import Inputs, clone, outputs_of
from fastentropy.fusion.memory_format import InOrder, lost_order, with_channels_last_weights
from fastentropy.fusion.progress import Progress, ignore
from fastentropy.fusion.report import ChainReport
from fastentropy.fusion.shared_tensors import SharedTensors
from fastentropy.fusion.tracing import in_channels_last, rewrite, visit_values
from fastentropy.fusion.verification import EquivalenceCheck

#: The name of a form: "original", "folded" or "fused", and its memory format: "contiguous" or "channels_last".
Form: TypeAlias = tuple[str, str]

#: A function that chooses the form of a chain, given the chain and its input, and that returns the form and a report.
Plan: TypeAlias = Callable[[FoundChain, Tensor], tuple[Chain, ChainReport]]

#: The planned form of a chain, and the report.
_Planned: TypeAlias = tuple[Chain, ChainReport]


def make_forms(
    model: nn.Module,
    traced: GraphModule,
    example_inputs: Inputs,
    plan: Plan | None = None,
    check: EquivalenceCheck | None = None,
    *,
    channels_last: bool = True,
    progress: Progress = ignore,
) -> tuple[dict[Form, nn.Module], dict[str, tuple[ChainReport, ...]]]:
    """Make every form of a model. All of them return outputs with the strides of the model's.

    The original and the folded form are made in both memory formats too. Fusing thus gets no credit for a gain that comes from
    the memory format alone.

    Args:
        model: the model in eval mode.
        traced: its trace, as `prepared_module` returns it.
        example_inputs: the inputs of one call.
        plan: chooses the form of a chain (stretch of linear operators). Without it, no fused form is made.
        check: compares rewritten networks with the model; chains that do not hold stay as they are in the trace. Without it,
            all chains are rewritten.
        channels_last: whether to make the forms in channels-last too. This needs a convolution of images or volumes.
        progress: is told the number of chains planned so far.

    Returns:
        The forms, and the reports on all chains by memory format. The folded form is the original one if there is nothing to
        fold, and otherwise the fused one if no chain is faster in another form.
    """
    chains = [chain for chain in find_chains(traced) if len(operators(chain.elements)) > 1]
    known = SharedTensors(traced.buffers())
    plan = plan and _plan_once(plan, known)
    graphs = {"contiguous": traced, "channels_last": in_channels_last(traced, known) if channels_last else None}
    forms: dict[Form, nn.Module] = {}
    outputs = outputs_of(model, example_inputs)
    reports: dict[str, tuple[ChainReport, ...]] = {}
    for memory_format, graph in graphs.items():
        if graph is None:
            continue
        if memory_format == "channels_last" and not _runs(graph, example_inputs):
            continue
        forms["original", memory_format] = (
            model if memory_format == "contiguous" else _in_channels_last(model, example_inputs, outputs, known)
        )
        show = functools.partial(progress, f"plan chains, {memory_format.replace('_', '-')}")
        plans, sources = _planned(graph, chains, example_inputs, plan, show)
        if plan is None:
            folds = dict.fromkeys(chain for chain in chains if chain.has_folds)
            made = {"folded": rewrite(graph, folds, sources, known)} if folds else {}
        else:
            progress("compare with the model", len(chains), len(chains))
            made, reports[memory_format] = _rewritten(graph, plans, sources, check, known)
        finished = {id(form): finish(form, example_inputs, outputs) for form in made.values()}
        forms["folded", memory_format] = forms["original", memory_format]
        forms |= {(name, memory_format): finished[id(form)] for name, form in made.items()}
    return forms, reports


def _plan_once(plan: Plan, known: SharedTensors) -> Plan:
    """Return a function that plans each chain once for each layout of its input, and rounds the weights of its form.

    The inputs of many chains have the same layout in both memory formats of the network.

    Args:
        plan: chooses the form of a chain.
        known: the constants of all forms of the network so far.
    """
    planned: dict[tuple[Any, ...], _Planned] = {}

    def plan_once(chain: FoundChain, x: Tensor) -> _Planned:
        key = chain, x.shape, x.stride(), x.dtype
        if key not in planned:
            form, report = plan(chain, x)
            planned[key] = rounded(form, x.dtype, known.shared), report
        return planned[key]

    return plan_once


def _runs(graph: GraphModule, inputs: Inputs) -> bool:
    """Return whether a graph runs. In channels-last it does not if it has a view that was traced on contiguous values."""
    try:
        visit_values(graph, (), clone(inputs), lambda node, value: None)
    except RuntimeError:
        return False
    return True


def _planned(
    graph: GraphModule, chains: Sequence[FoundChain], inputs: Inputs, plan: Plan | None, show: Callable[[int, int], None]
) -> tuple[dict[FoundChain, _Planned], dict[Node, Tensor]]:
    """Plan each chain of a graph when the graph has computed its input. The inputs of all chains would take much memory.

    Args:
        graph: the graph.
        chains: its chains.
        inputs: the inputs of the graph.
        plan: chooses the form of a chain; None to plan nothing.
        show: is told the number of chains planned so far, and that of all.

    Returns:
        The plan of each chain, and a tensor without values like the input of each chain, by its node.
    """
    plans: dict[FoundChain, _Planned] = {}
    sources: dict[Node, Tensor] = {}

    def visit(source: Node, x: Tensor) -> None:
        sources[source] = without_values(x)
        for chain in chains:
            if plan is not None and chain.source is source:
                show(len(plans), len(chains))
                plans[chain] = plan(chain, x)

    visit_values(graph, [chain.source for chain in chains], clone(inputs), visit)
    return {chain: plans[chain] for chain in chains if chain in plans}, sources


def _rewritten(
    graph: GraphModule,
    plans: Mapping[FoundChain, _Planned],
    sources: Mapping[Node, Tensor],
    check: EquivalenceCheck | None,
    known: SharedTensors,
) -> tuple[dict[str, GraphModule], tuple[ChainReport, ...]]:
    """Return the fused form of a graph and the folded one if anything is folded, by name, and the reports on the chains.

    Args:
        graph: the graph.
        plans: the chosen form of each chain, and its report.
        sources: an example of each chain's input, by its node.
        check: as in `make_forms`.
        known: the constants of all forms of the network so far.
    """
    forms = {chain: form for chain, (form, report) in plans.items() if report.choice != "keep" or chain.has_folds}
    fused, left, amplifies = rewrite_equal(graph, forms, sources, check, known)
    reports = tuple(_kept(report, left[chain]) if chain in left else report for chain, (_, report) in plans.items())
    if forms and all(report.choice == "keep" for report in reports):
        return {"folded": fused, "fused": fused}, reports
    folds = [chain for chain in forms if chain.has_folds and chain not in left]
    kept = {chain: forms[chain] if plans[chain][1].choice == "keep" else None for chain in folds}
    if not kept:
        return {"fused": fused}, reports
    # The folded chains are judged by themselves too, where comparing the outputs of networks does not suffice.
    folded = rewrite_equal(graph, kept, sources, check if amplifies else None, known).module
    return {"folded": folded, "fused": fused}, reports


def _in_channels_last(model: nn.Module, inputs: Inputs, expected: list[Any], known: SharedTensors) -> nn.Module:
    """Return a copy of a model with its weights in channels-last, whose outputs have the strides of the expected ones."""
    last = with_channels_last_weights(model, known)
    actual = outputs_of(last, inputs)
    if any(lost_order(value, wanted) for value, wanted in zip(actual, expected, strict=True)):
        return InOrder(last, actual, expected)
    return last


def _kept(report: ChainReport, reason: str) -> ChainReport:
    """Return the report on a chain that stays as it is, for the given reason."""
    return dataclasses.replace(report, choice="keep", note=reason)
