"""Cut constant channels out of a traced graph: their rows of the operator before, and their columns of the one behind."""

import copy
import itertools
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastentropy._compat import in_trace_of
from fastentropy.fusion.chains.nodes import SPLITS, shape_of
from fastentropy.fusion.neurons.channels import Channels, Step
from fastentropy.fusion.neurons.elementwise import read_elementwise
from fastentropy.fusion.neurons.links import Links
from fastentropy.fusion.neurons.operators import read_operator
from fastentropy.fusion.neurons.shuffles import Shuffles

_aten = torch.ops.aten

#: The key of the name of an activation with masks, in the notes on the node of its output.
SITE = "fastentropy_site"

#: How the names of the constants of operators begin that have fewer channels.
NEURONS_PREFIX = "fastentropy_neurons_"


class Following:
    """The channels of a traced graph.

    Attributes:
        channels: the channels of each value that can be followed, by its node.
        steps: the operators that compute them, by their node.
        links: which channels can only be cut out together, and which must stay.
    """

    def __init__(self, module: GraphModule) -> None:
        """Follow the channels through a graph."""
        self.channels: dict[Node, Channels] = {}
        self.steps: dict[Node, Step] = {}
        self.links = Links()
        self._shuffles = Shuffles()
        for node in module.graph.nodes:
            self._visit(node, module)
        self._keep_one_of_each()

    def _visit(self, node: Node, module: GraphModule) -> None:
        """Follow the channels through a node, or keep all of those that it reads."""
        if node.op in ("placeholder", "get_attr") or node.target in SPLITS or self._reads_other_size(node):
            return
        step = node.op == "call_function" and (read_elementwise(node, module) or read_operator(node, module, self.channels))
        channels = step and step.follow(self.channels, self.links)
        shuffle = None if step and channels else self._shuffles.read(node, module, self.channels)
        if shuffle:
            step, channels = shuffle, shuffle.follow(self.channels, self.links)
        if step and channels:
            self.channels[node], self.steps[node] = channels, step
        if shuffle or node in self._shuffles.sources:
            return
        for operand in self._read_values(node):
            value = self._shuffles.sources.get(operand)
            value = operand if value is None and node not in self.steps else value
            if value in self.channels:
                self.links.keep(self.channels[value].numbers)

    def operands(self, node: Node) -> Iterator[Node]:
        """Yield the values that the step of a node reads."""
        operand = getattr(self.steps[node], "operand", None)
        yield from self._read_values(node) if operand is None else (operand,)

    def _read_values(self, node: Node) -> Iterator[Node]:
        """Yield the operands of a node. Those of a part of a split value are those of the split."""
        for operand in node.all_input_nodes:
            yield from operand.all_input_nodes if operand.target in SPLITS else (operand,)

    def _reads_other_size(self, node: Node) -> bool:
        """Return whether a node reads the size of an axis that does not hold the channels."""
        operand = node.args[0] if node.target == _aten.sym_size.int else None
        if not isinstance(operand, Node) or operand not in self.channels:
            return False
        dimensions = len(shape_of(operand) or ())
        return int(node.args[1]) % dimensions != dimensions + self.channels[operand].axis  # type: ignore[arg-type]

    def _keep_one_of_each(self) -> None:
        """Keep at least one channel of each value, because operators need one."""
        while True:
            kept = self.links.kept()
            empty = [each.numbers[:1] for each in self.channels.values() if not bool(kept[each.numbers].any())]
            if not empty:
                return
            self.links.keep(torch.cat(empty))


class Cutting:
    """A copy of a graph from which channels are cut out; see `Rewriting`."""

    def __init__(self, module: GraphModule, kept: Tensor) -> None:
        """Copy a graph.

        Args:
            module: the graph.
            kept: which channels stay, bool, by their number.
        """
        self.graph = copy.deepcopy(module.graph)
        self.constants: dict[str, Tensor] = {}
        self._copies = {node.name: node for node in self.graph.nodes}
        self._kept, self._names = kept, itertools.count()
        self._taken = {str(node.target).rpartition("_")[0] for node in self.graph.find_nodes(op="get_attr")}

    def kept(self, channels: Channels) -> Tensor | None:
        """Return the indices of the channels that stay, int64, or None if all do."""
        kept = self._kept[channels.numbers]
        return None if bool(kept.all()) else kept.nonzero().flatten()

    def copied(self, node: Node) -> Node:
        """Return the node that computes a value of the original graph in the new one."""
        copied: Node = self._copies[node.name]
        return copied

    def constant(self, value: Tensor) -> Node:
        """Add a constant and return the node that reads it."""
        name = f"{self.new_name()}_0"
        self.constants[name] = value
        reader: Node = self.graph.create_node("get_attr", name)
        return reader

    def new_name(self) -> str:
        """Return how the names of further constants may begin."""
        names = (f"{NEURONS_PREFIX}{number}" for number in self._names)
        return next(name for name in names if name not in self._taken)

    def rewrite(self, node: Node, step: Step, channels: dict[Node, Channels]) -> None:
        """Put an operator with fewer channels in the place of a node of the original graph."""
        self.replace(node, lambda: step.cut(channels, self))

    def replace(self, node: Node, append: Callable[[], Node]) -> None:
        """Put what a function appends in the place of a node of the original graph."""
        old = self._copies[node.name]
        last = old.prev
        with self.graph.inserting_before(old):
            new = append()
        while last.next is not old:
            last = last.next
            last.meta = {key: value for key, value in {**old.meta, **last.meta}.items() if key != "val"}
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self._copies[node.name] = new

    def finished(self, module: GraphModule) -> GraphModule:
        """Return the new graph as a module; `module` holds the constants of the original one."""
        self.graph.eliminate_dead_code()
        names = {str(node.target) for node in self.graph.find_nodes(op="get_attr")} - set(self.constants)
        return GraphModule({**{name: attrgetter(name)(module) for name in names}, **self.constants}, self.graph)


class Cut(NamedTuple):
    """A graph without its constant channels.

    Attributes:
        network: the graph. Its new nodes have no example of their value.
        kept: how many channels are left of each value that has fewer, by its node in the graph as it was.
    """

    network: GraphModule
    kept: dict[Node, int]


def cut_constant_channels(module: GraphModule) -> Cut:
    """Return a copy of a graph without the channels that are constant wherever they are read.

    Args:
        module: the graph of a model in eval mode. Each of its nodes knows an example of its value.
    """
    following = Following(module)
    cutting = Cutting(module, following.links.kept())
    kept = {node: len(index) for node, each in following.channels.items() if (index := cutting.kept(each)) is not None}
    for node, step in following.steps.items():
        if node in kept or not kept.keys().isdisjoint(following.operands(node)):
            cutting.rewrite(node, step, following.channels)
    return Cut(cutting.finished(module), kept)


def note_values(module: GraphModule) -> None:
    """Note an example of its value at each node of a graph that has none: a tensor without values, as in the trace."""
    inputs = (node.meta.get("val") for node in module.graph.find_nodes(op="placeholder"))
    with in_trace_of(next(value for value in inputs if isinstance(value, Tensor))):
        for node in module.graph.nodes:
            if node.op == "get_attr" and "val" not in node.meta:
                value = attrgetter(node.target)(module)
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            elif node.op == "call_function" and "val" not in node.meta:
                args, keywords = (map_arg(each, lambda read: read.meta["val"]) for each in (node.args, node.kwargs))
                node.meta["val"] = node.target(*args, **keywords)
