"""Read means and sums over axes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fastentropy.fusion.chains.nodes import shape_of

_aten = torch.ops.aten


class Reduction(NamedTuple):
    """The mean or the sum over some axes of an operand.

    Attributes:
        operand: the node of the operand.
        axes: these axes.
        is_mean: whether it is the mean.
    """

    operand: Node
    axes: tuple[int, ...]
    is_mean: bool


def read_reduction(node: Node) -> Reduction | None:
    """Read a node as a mean or a sum over axes in the dtype of its operand, or return None."""
    if node.target not in (_aten.mean.dim, _aten.sum.dim_IntList) or node.kwargs:
        return None
    operand: Any = node.args[0]
    axes: Any = node.args[1]
    dimensions = len(shape_of(operand) or ())
    if not isinstance(axes, Sequence) or not axes or not all(isinstance(axis, int) for axis in axes):
        return None
    return Reduction(operand, tuple(sorted(axis % dimensions for axis in axes)), node.target == _aten.mean.dim)
