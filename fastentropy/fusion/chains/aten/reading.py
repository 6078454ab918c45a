"""Read a node of a traced graph as an affine operator, with the reader of its family."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten import convolutions, elementwise, identities, padding, pooling, products, scaling, selecting
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader

_FAMILIES = (convolutions, elementwise, identities, padding, pooling, products, scaling, selecting)


def _readers() -> Mapping[Any, tuple[Reader, ...]]:
    """Return the readers of each operator: more than one if it may act on channels or on positions."""
    readers: dict[Any, tuple[Reader, ...]] = {}
    for family in _FAMILIES:
        for target, reader in family.readers().items():
            readers[target] = (*readers.get(target, ()), reader)
    return readers


_READERS = _readers()


def read_node(node: Node, module: GraphModule) -> tuple[AffineNode, ...]:
    """Read a node as an affine operator with constant weights.

    Args:
        node: a node of the graph of `module`.
        module: a traced model in eval mode, which holds the constants.

    Returns:
        The affine node. If the shapes do not tell channels from positions, as for a slice along the last of three axes, there
        is one for each. Empty if the node is not affine in one operand, or if one of its arguments is a number that the trace
        did not fix, such as a padding that depends on the size of the input.
    """
    if node.op != "call_function" or any(map(_is_number, node.all_input_nodes)):
        return ()
    readings = (reader(node, module) for reader in _READERS.get(node.target, ()))
    return tuple(reading for reading in readings if reading)


def _is_number(node: Node) -> bool:
    """Return whether a node computes a size or another number."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
