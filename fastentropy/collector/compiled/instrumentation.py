"""Add the counting of activations to a graph of torch.compile."""

from typing import Any

import torch
from torch import Tensor, fx

from fastentropy._compat import UncountableGraphError
from fastentropy.collector.compiled.forms import count_as_sums
from fastentropy.collector.values import COUNTABLE
from fastentropy.sites.graphs import GraphCall


def add_counts(graph_module: fx.GraphModule, calls: list[GraphCall]) -> None:
    """Let a graph count the states of the inputs of activations, and return the counts as one more output.

    The output is int64, with a slot for each call as in the buffers of `Counters`: 3 * neurons counts, then the number of
    positions (values read per neuron).

    Args:
        graph_module: the graph, which is changed. Its output is a tuple.
        calls: the calls of activations in it.

    Raises:
        UncountableGraphError: an input cannot be counted in a graph.
    """
    graph = graph_module.graph
    tracer = fx.proxy.GraphAppendingTracer(graph)
    slots = []
    for call in calls:
        with graph.inserting_before(call.node):
            slots.append(_slot(fx.Proxy(call.x, tracer), call))
    output = graph.output_node()
    with graph.inserting_before(output):
        flat: Any = torch.cat(slots) if len(slots) > 1 else slots[0]
    output.args = ((*_outputs(output), flat.node),)
    graph.lint()
    graph_module.recompile()


def _slot(x: Any, call: GraphCall) -> Any:
    """Return the slot of a call: int64 [3 * neurons + 1]."""
    like: Tensor = call.x.meta["example_value"]
    axis = call.site.channel_axis
    if axis is None or like.dtype not in COUNTABLE or like.layout is not torch.strided:
        raise UncountableGraphError(f"the input of {call.site.name!r} is of another kind")
    counts = count_as_sums(x.detach(), like, axis)
    return torch.cat([counts.flatten(), _positions(x, like, call.site.neurons)])


def _positions(x: Any, like: Tensor, neurons: int) -> Any:
    """Return how many values of each neuron are read, int64 [1]."""
    function = {"dtype": torch.int64, "device": like.device}
    number = x.numel() // neurons
    return fx.Proxy(x.node.graph.call_function(torch.full, ((1,), getattr(number, "node", number)), function), x.tracer)


def _outputs(output: fx.Node) -> tuple[Any, ...]:
    """Return the outputs of a graph."""
    outputs = output.args[0]
    if not isinstance(outputs, tuple | list):
        raise UncountableGraphError("its output is no tuple")
    return tuple(outputs)
