"""Read a node of a traced graph as an affine operator, with the reader of its family."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten import convolutions, elementwise, identities, pooling, products, scaling, selecting
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader

_READERS: Mapping[Any, Reader] = {
    target: reader
    for family in (convolutions, elementwise, identities, pooling, products, scaling, selecting)
    for target, reader in family.readers().items()
}


def read_node(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a node as an affine operator with constant weights.

    Args:
        node: a node of the graph of `module`.
        module: a traced model in eval mode, which holds the constants.

    Returns:
        The affine node, or None if the node is not affine in one operand, or if one of its arguments is a number that the trace
        did not fix, such as a padding that depends on the size of the input.
    """
    if node.op != "call_function" or any(map(_is_number, node.all_input_nodes)):
        return None
    reader = _READERS.get(node.target)
    return reader and reader(node, module)


def _is_number(node: Node) -> bool:
    """Return whether a node computes a size or another number."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
