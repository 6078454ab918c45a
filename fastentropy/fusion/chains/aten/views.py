"""Read views: operators that move the values of their operand to other axes and change none of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fastentropy.fusion.chains.layouts import Layout, permuted, reshaped
from fastentropy.fusion.chains.nodes import same_size, same_sizes, shape_of

_aten = torch.ops.aten

#: Reshapes. They keep the order of the values.
_RESHAPES = {
    *(_aten.view.default, _aten.reshape.default, _aten.view_as.default, _aten.reshape_as.default),
    *(_aten.flatten.using_ints, _aten.unflatten.int, _aten.ravel.default),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
}

#: Operators that return all of their operand if the result has its shape.
_SELECTIONS = {
    *(_aten.slice.Tensor, _aten.narrow.default),
    *(_aten.expand.default, _aten.expand_as.default, _aten.broadcast_to.default),
}

#: Permutations of axes.
_PERMUTATIONS = {
    *(_aten.permute.default, _aten.transpose.int, _aten.swapaxes.default, _aten.swapdims.default),
    *(_aten.movedim.int, _aten.movedim.intlist, _aten.moveaxis.int, _aten.moveaxis.intlist),
    *(_aten.t.default, _aten.numpy_T.default, _aten.mT.default),
}


def read_view(node: Node) -> Callable[[Layout], Layout | None] | None:
    """Read a node as a view of its first argument.

    Args:
        node: a node of a traced graph.

    Returns:
        A function from the layout of the argument to that of the node, which returns None if it cannot follow the axes. None if
        the node is no view.
    """
    operand = node.args[0] if node.op == "call_function" and node.args else None
    before, after = shape_of(operand), shape_of(node)
    if before is None or after is None:
        return None
    if node.target in _PERMUTATIONS:
        order = _order(node, len(before))
        return lambda layout: permuted(layout, order)
    selects_all = node.target in _SELECTIONS and same_sizes(before, after)
    drops_an_axis = node.target == _aten.select.int and same_size(before[_axis(node)], 1)
    if node.target in _RESHAPES or selects_all or drops_an_axis:
        return lambda layout: reshaped(layout, after)
    return None


def _axis(node: Node) -> int:
    """Return the second argument of a node, an axis."""
    axis: Any = node.args[1]
    return int(axis)


def _order(node: Node, dimensions: int) -> list[int]:
    """Return which axis of its operand each axis of a permutation is, as seen from the sizes of an example."""
    operator: Any = node.target
    example: Tensor = operator(torch.empty(list(range(2, 2 + dimensions)), device="meta"), *node.args[1:], **node.kwargs)
    return [size - 2 for size in example.shape]
