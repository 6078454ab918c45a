"""Read a node of a traced graph as an affine operator, with the reader of its family."""

from collections.abc import Mapping
from typing import Any

from torch.fx import GraphModule, Node

from fastentropy._compat import operator_schema
from fastentropy.fusion.chains.aten import convolutions, elementwise, identities, pooling, products, scaling
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader

_READERS: Mapping[Any, Reader] = {
    target: reader
    for family in (convolutions, elementwise, identities, pooling, products, scaling)
    for target, reader in family.readers().items()
}


def read_node(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a node as an affine operator with constant weights.

    Args:
        node: a node of the graph of `module`.
        module: a traced model in eval mode, which holds the constants.

    Returns:
        The affine node, or None if the node is not affine in one operand.
    """
    if node.op != "call_function" or operator_schema(node.target) is None:
        return None
    reader = _READERS.get(node.target)
    return reader and reader(node, module)
