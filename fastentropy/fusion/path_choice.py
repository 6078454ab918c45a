"""Choose where linear neurons get a path of their own: where it is faster than the activation of all neurons.

The linear neurons between two layers are a chain, which may become one operator.
"""

import functools
from collections import Counter

from torch import Tensor, nn
from torch.fx import GraphModule

from fastentropy._utils.timing import measure_times
from fastentropy.fusion.forms import Plan, make_forms
from fastentropy.fusion.inputs import Inputs, clone
from fastentropy.fusion.neurons.cutting import Following, note_values
from fastentropy.fusion.neurons.masks import is_cheap, lower_masks
from fastentropy.fusion.neurons.paths import LinearPath, linear_paths, region, split
from fastentropy.fusion.planner import MAX_COST_RATIO, TIE
from fastentropy.fusion.pricing import BUDGET_SECONDS
from fastentropy.fusion.tracing import values_of


def split_linear_paths(network: GraphModule, inputs: Inputs, plan: Plan, measure: bool) -> tuple[GraphModule, dict[str, int]]:
    """Return a graph in which linear neurons have a path of their own wherever that is faster.

    Args:
        network: the graph, whose activations have masks. Each of its nodes knows an example of its value.
        inputs: the inputs of one call.
        plan: chooses the form of a chain.
        measure: compare measured times. False compares numbers of multiplications.

    Returns:
        The graph, and how many neurons of each activation have such a path.
    """
    tried, neurons = set[str](), Counter[str]()

    def with_next_path() -> GraphModule | None:
        following = Following(network)
        for path in linear_paths(following):
            name = path.reader.node.name
            if name in tried:
                continue
            tried.add(name)
            if not _is_promising(path, following, measure):
                continue
            candidate, end = split(network, following, path)
            if not measure or _is_faster(candidate, end, network, path, inputs, plan):
                neurons.update(path.sites(following))
                return candidate
        return None

    while (longer := with_next_path()) is not None:
        network = longer
    return network, dict(neurons)


def _is_promising(path: LinearPath, following: Following, measure: bool) -> bool:
    """Return whether a path may be faster by itself: as one operator, or without an activation that is not cheap.

    Without a measurement, only one operator with fewer multiplications counts as faster.
    """
    apart, merged = path.multiplications(following)
    return merged < apart if not measure else merged <= MAX_COST_RATIO * apart or not all(map(is_cheap, path.nodes))


def _is_faster(candidate: GraphModule, end: str, network: GraphModule, path: LinearPath, inputs: Inputs, plan: Plan) -> bool:
    """Return whether the part of a graph with a linear path is faster with the path than without.

    Args:
        candidate: the graph with the path.
        end: the name of the node of the path's sum in it.
        network: the graph without the path.
        path: the path.
        inputs: the inputs of one call.
        plan: chooses the form of a chain.
    """
    parts = region(network, path.sources, path.reader.node.name), region(candidate, path.sources, end)
    if parts[0] is None or parts[1] is None:
        return False
    values = values_of(network, path.sources, clone(inputs))
    given = Inputs(tuple(values[source] for source in path.sources))
    forms = [_fused(part, given, plan) for part in parts if part is not None]
    gpu = next((value.device for value in given.leaves if isinstance(value, Tensor) and value.is_cuda), None)
    calls = {index: functools.partial(form, *given.args) for index, form in enumerate(forms)}
    times = measure_times(calls, graphs_on=gpu, budget_seconds=BUDGET_SECONDS)
    return times[1] <= (1 - TIE) * times[0]


def _fused(part: GraphModule, given: Inputs, plan: Plan) -> nn.Module:
    """Return a part of a graph as fast as its chains and activations can be."""
    lower_masks(part)
    note_values(part)
    part.recompile()
    return make_forms(part, part, given, plan, channels_last=False)[0]["fused", "contiguous"]
