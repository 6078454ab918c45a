"""Add the counting of activations to a graph of torch.compile."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastentropy._compat import UncountableGraphError, add_input, bodies, is_checkpoint
from fastentropy.collector.compiled.forms import count_as_sums
from fastentropy.collector.compiled.masks import MaskInput, add_masks, spread
from fastentropy.collector.values import COUNTABLE
from fastentropy.sites.graphs import GraphCall


def add_counts(graph_module: fx.GraphModule, calls: Sequence[GraphCall]) -> tuple[list[MaskInput], list[Tensor]]:
    """Let a graph count the states of the inputs of activations, and return the counts as one more output.

    The output is int64, with a slot for each call as `Counters.add_slots` takes it: how many values of each neuron are off,
    then zero, then on, and the number of positions (values read per neuron). Calls with a padding mask add it to the inputs.

    Args:
        graph_module: the graph, which is changed. Its output is a tuple.
        calls: the calls of activations in it.

    Returns:
        The masks that the graph takes as its last inputs, and these inputs for the tracer.

    Raises:
        UncountableGraphError: an input cannot be counted in a graph.
    """
    if len({call.x.meta["example_value"].device for call in calls}) > 1:
        raise UncountableGraphError("its activations run on several devices")
    nodes, masks, values = add_masks(graph_module.graph, calls)
    _add_flat(graph_module, {call.node: call for call in calls}, nodes)
    return masks, values


def _add_flat(graph_module: fx.GraphModule, calls: Mapping[fx.Node, GraphCall], masks: Mapping[bool, fx.Node]) -> None:
    """Let a graph return the slots of the calls in it, one after the other. `masks` are inputs of it."""
    graph = graph_module.graph
    tracer, slots = fx.proxy.GraphAppendingTracer(graph), []
    proxies = {is_flat: fx.Proxy(node, tracer) for is_flat, node in masks.items()}
    for node in list(graph.nodes):
        if node in calls:
            with graph.inserting_before(node):
                slots += _slot(fx.Proxy(calls[node].x, tracer), calls[node], proxies)
        elif _runs_any(node, calls):
            slots.append(fx.Proxy(_add_flat_in_body(node, calls, masks), tracer))
    output = graph.output_node()
    with graph.inserting_before(output):
        flat: Any = torch.cat(slots) if len(slots) > 1 else slots[0]
    output.args = ((*_outputs(output), flat.node),)
    graph.lint()
    graph_module.recompile()


def _runs_any(node: fx.Node, calls: Mapping[fx.Node, GraphCall]) -> bool:
    """Return whether the graph of a checkpoint, or a checkpoint in it, makes any of the calls."""
    inner = (each for body in bodies(node) for each in body.graph.nodes)
    return is_checkpoint(node) and any(each in calls or _runs_any(each, calls) for each in inner)


def _add_flat_in_body(node: fx.Node, calls: Mapping[fx.Node, GraphCall], masks: Mapping[bool, fx.Node]) -> fx.Node:
    """Let the graph of a checkpoint return the slots of its calls, and return the node that has them in the outer graph."""
    (body,) = bodies(node)
    attribute: Any = node.args[0]
    if len(attribute.users) > 1:
        raise UncountableGraphError("several checkpoints share a graph")
    inner = {flat: add_input(body.graph, each.name, each.meta["example_value"]) for flat, each in masks.items()}
    node.args = (*node.args, *masks.values())
    number = len(_outputs(body.graph.output_node()))
    _add_flat(body, calls, inner)
    with node.graph.inserting_after(node):
        return node.graph.call_function(operator.getitem, (node, number))


def _slot(x: Any, call: GraphCall, masks: Mapping[bool, Any]) -> list[Any]:
    """Return the parts of the slot of a call: int64 [neurons] three times, and [1]."""
    like: Tensor = call.x.meta["example_value"]
    axis, axes = call.site.channel_axis, call.token_axes
    if axis is None or like.dtype not in COUNTABLE or like.layout is not torch.strided:
        raise UncountableGraphError(f"the input of {call.site.name!r} is of another kind")
    if axes is None:
        mask, positions = None, _filled(x.numel() // max(call.site.neurons, 1), like.device)
    else:
        mask = spread(masks[axes.batch == axes.tokens], like.ndim, axes)
        positions = mask.sum().reshape(1)
        for each in range(like.ndim):
            if each != axis and each not in axes:
                positions = positions * x.size(each)
    return [*count_as_sums(x.detach(), like, axis, mask), positions]


def _filled(number: Any, device: torch.device) -> Any:
    """Return a proxy of a tensor, int64 [1], that holds a number of which there is a proxy."""
    options = {"dtype": torch.int64, "device": device}
    return fx.Proxy(number.node.graph.call_function(torch.full, ((1,), number.node), options), number.tracer)


def _outputs(output: fx.Node) -> tuple[Any, ...]:
    """Return the outputs of a graph."""
    outputs = output.args[0]
    if not isinstance(outputs, tuple | list):
        raise UncountableGraphError("its output is no tuple")
    return tuple(outputs)
