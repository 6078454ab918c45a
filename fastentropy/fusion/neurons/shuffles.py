"""Read channel shuffles that a model writes as views: a reshape that splits the channels, a permutation, a reshape."""

from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten import read_view
from fastentropy.fusion.chains.layouts import Layout, natural_layout, same_layout
from fastentropy.fusion.chains.nodes import device_of, same_sizes, shape_of
from fastentropy.fusion.chains.rearrangements import rearrangement
from fastentropy.fusion.neurons.channels import Followed
from fastentropy.fusion.neurons.elementwise import returns_operand
from fastentropy.fusion.neurons.operators import Chosen


class Shuffles:
    """Views of values whose channels they split up, until they are put together again.

    Attributes:
        sources: the value that each view is made from, by the node of the view.
    """

    def __init__(self) -> None:
        """Begin without views."""
        self.sources: dict[Node, Node] = {}
        self._layouts: dict[Node, Layout] = {}

    def read(self, node: Node, module: GraphModule, followed: Followed) -> Chosen | None:
        """Read a node as a view in which all channels lie in their axis again, but in another order.

        Returns None if it is none. If it may become one with further views, it is noted in `sources`.

        Args:
            node: the node.
            module: the traced model.
            followed: the channels of the values before it.
        """
        operand = node.args[0] if node.op == "call_function" and node.args else None
        view = read_view(node) or (_same if returns_operand(node, module) else None)
        if not isinstance(operand, Node) or view is None:
            return None
        source = self.sources.get(operand, operand)
        before, after = shape_of(source), shape_of(node)
        if source not in followed or before is None or after is None:
            return None
        layout = view(self._layouts.get(operand, natural_layout(before)))
        if layout is None:
            return None
        found = rearrangement(layout, before, -followed[source].axis - 1)
        if found and same_sizes(before, after) and same_layout(found.layout, natural_layout(after)):
            selection = found.build(device_of(node))
            return Chosen(node, source, selection) if selection.groups == 1 else None
        self.sources[node], self._layouts[node] = source, layout
        return None


def _same(layout: Layout) -> Layout:
    """Return a layout as it is."""
    return layout
