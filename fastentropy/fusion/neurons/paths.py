"""Give the linear neurons between two layers a path of their own, around the activation of the others."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastentropy.fusion.neurons.channels import Channels
from fastentropy.fusion.neurons.cutting import SITE, Cutting, Following, note_values
from fastentropy.fusion.neurons.operators import Dense, Grouped

_aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class LinearPath:
    """The linear neurons that one layer reads, and that nothing else needs.

    Attributes:
        reader: the layer.
        nodes: the nodes that compute its input, from the layers before on, in call order.
        members: the numbers of the neurons in `Links`, as bool by number.
        count: the number of its input channels that are on the path.
        sources: the nodes that the first layers of the path read.
    """

    reader: Dense
    nodes: tuple[Node, ...]
    sources: tuple[Node, ...]
    members: Tensor
    count: int

    def multiplications(self, following: Following) -> tuple[float, float]:
        """Return the multiplications per position as the path is, and as one operator.

        For n neurons and kernels of a single position, these are n · (d_in + d_out) and d_in · d_out. The second number is
        infinite if the path cannot be one operator.
        """
        steps = [following.steps[node] for node in self.nodes]
        layers = [step.operator for step in steps if isinstance(step, Dense)]
        between = [step.operator for step in steps if isinstance(step, Grouped)]
        apart, merged = 0.0, 0.0
        for first in layers:
            run = [first, *between, self.reader.operator]
            sizes = [first.in_channels, *(1 for _ in between), self.reader.operator.out_channels]
            apart += self.count * sum(size * math.prod(each.kernel) for size, each in zip(sizes, run, strict=True))
            kernel = math.prod(1 + sum(size - 1 for size in taps) for taps in zip(*(each.kernel for each in run), strict=False))
            merged += first.in_channels * self.reader.operator.out_channels * kernel
            if len({len(each.kernel) for each in run}) > 1:
                merged = math.inf
        return apart, math.inf if len(layers) > 1 else merged

    def sites(self, following: Following) -> dict[str, int]:
        """Return how many neurons of each activation are on the path."""
        sites = {node.meta[SITE]: following.channels[node] for node in self.nodes if SITE in node.meta}
        return {name: int(self.members[channels.numbers].sum()) for name, channels in sites.items()}


def linear_paths(following: Following) -> Iterator[LinearPath]:
    """Yield the linear paths to each layer that also reads other neurons, in call order.

    Args:
        following: the channels of a graph.
    """
    for step in following.steps.values():
        channels = following.channels.get(step.operand) if isinstance(step, Dense) else None
        if isinstance(step, Dense) and channels is not None and (path := _path_to(step, channels, following)):
            yield path


def _path_to(reader: Dense, channels: Channels, following: Following) -> LinearPath | None:
    """Return the linear path to a layer; None if it reads no linear neurons that others do not need, or no others.

    Args:
        reader: the layer.
        channels: the channels of its input.
        following: the channels of the graph.
    """
    links, others = following.links, ~(channels.linear | channels.constant)
    chosen = channels.linear & ~channels.constant
    if not bool(others.any()) or not bool(chosen.any()):
        return None
    needed = links.kept(but_for=reader) | links.with_sets([channels.numbers[others]])
    chosen = chosen & ~needed[channels.numbers]
    if not bool(chosen.any()):
        return None
    members, nodes, left = links.with_sets([channels.numbers[chosen]]), set[Node](), [reader.operand]
    while left:
        node = left.pop()
        if node not in nodes:
            nodes.add(node)
            if not isinstance(following.steps[node], Dense):
                left += [each for each in following.operands(node) if each in following.channels]
    for node in nodes:
        on_path = members[following.channels[node].numbers]
        if not bool(on_path.any()) or bool(on_path.all()):
            return None
    inside = tuple(node for node in reader.node.graph.nodes if node in nodes)
    read = [operand for node in inside for operand in following.operands(node) if operand.op != "get_attr"]
    sources = tuple(operand for operand in dict.fromkeys(read) if operand not in nodes)
    return LinearPath(reader, inside, sources, members, int(chosen.sum()))


class _Path:
    """A graph to which the nodes of a linear path are appended; see `Rewriting`.

    Attributes:
        copies: the nodes of the path in the graph.
    """

    def __init__(self, cutting: Cutting, members: Tensor, own: Mapping[Node, Channels], copies: dict[Node, Node]) -> None:
        """Take over a graph from which the channels of the path are cut out.

        Args:
            cutting: the graph.
            members: the channels of the path, as bool by number.
            own: the channels of the values that are on the path.
            copies: their nodes in the graph.
        """
        self.graph, self.constants, self.copies = cutting.graph, cutting.constants, copies
        self._cutting, self._members, self._own = cutting, members, set(map(id, own.values()))

    def kept(self, channels: Channels) -> Tensor | None:
        """Return the indices of the channels that are on the path, or of those that are left of a value outside of it."""
        if id(channels) not in self._own:
            return self._cutting.kept(channels)
        return self._members[channels.numbers].nonzero().flatten()

    def copied(self, node: Node) -> Node:
        """Return the node of a value in the new graph: on the path if it belongs to it."""
        return self.copies[node] if node in self.copies else self._cutting.copied(node)

    def constant(self, value: Tensor) -> Node:
        """Add a constant and return the node that reads it."""
        return self._cutting.constant(value)

    def new_name(self) -> str:
        """Return how the names of further constants may begin."""
        return self._cutting.new_name()


def split(module: GraphModule, following: Following, path: LinearPath) -> tuple[GraphModule, str]:
    """Return a copy of a graph in which a linear path runs by itself, and is added behind the layer that reads it.

    Args:
        module: the graph. Each of its nodes knows an example of its value.
        following: its channels.
        path: the path.

    Returns:
        The graph, and the name of the node of the sum.
    """
    cutting = Cutting(module, ~path.members)
    touched = {node for node, each in following.channels.items() if bool(path.members[each.numbers].any())}
    for node, step in following.steps.items():
        if node is path.reader.node:
            cutting.replace(node, lambda: _sum(cutting, following, path))
        elif node in touched or not touched.isdisjoint(following.operands(node)):
            cutting.rewrite(node, step, following.channels)
    result = cutting.finished(module)
    note_values(result)
    return result, cutting.copied(path.reader.node).name


def _sum(cutting: Cutting, following: Following, path: LinearPath) -> Node:
    """Append the layer that reads a path without it, then the path and the layer's part for it, and the sum of both."""
    rest = path.reader.cut(following.channels, cutting)
    varying = {node: following.channels[node] for node in path.nodes}
    own = {node: replace(each, constant=each.constant & False, values=0 * each.values) for node, each in varying.items()}
    channels, copies = {**following.channels, **own}, dict[Node, Node]()
    for node in path.nodes:
        if isinstance(step := following.steps[node], Dense):  # it reads what is not on the path
            outside = {**following.channels, node: own[node]}
            copies[node] = step.cut(outside, _Path(cutting, path.members, {node: own[node]}, {}))
        else:
            copies[node] = step.cut(channels, _Path(cutting, path.members, own, copies))
    operator = replace(path.reader.operator, bias=torch.zeros_like(path.reader.operator.bias))
    linear = replace(path.reader, operator=operator).cut(channels, _Path(cutting, path.members, own, copies))
    return cutting.graph.call_function(_aten.add.Tensor, (rest, linear))


def region(module: GraphModule, sources: tuple[Node, ...], end: str) -> GraphModule | None:
    """Return the part of a graph between some values and another one, as a graph of its own.

    Args:
        module: the graph.
        sources: the nodes of the values in this graph, or in one of which it is a copy. They become the inputs.
        end: the name of the node whose value is the output.

    Returns:
        The part; None if the output depends on other inputs, too, or the graph computes one of the values with fewer channels.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    if not all(source.name in nodes for source in sources):
        return None
    starts, needed, left = [nodes[source.name] for source in sources], set[Node](), [nodes[end]]
    while left:
        node = left.pop()
        if node not in needed and node not in starts:
            needed.add(node)
            left += node.all_input_nodes
    if any(node.op == "placeholder" for node in needed):
        return None
    graph, copies = Graph(), dict[Node, Node]()
    for node in starts:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[nodes[end]],))
    names = {str(node.target) for node in needed if node.op == "get_attr"}
    return GraphModule({name: attrgetter(name)(module) for name in names}, graph)
