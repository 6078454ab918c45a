"""Write the borders of convolutions as new values instead of overwriting slices, for runtimes that overwrite nothing.

ONNX would scatter each slice into a transposed copy of the whole value, which takes longer than most convolutions. Inductor
refuses a convolution of such a value together with the ReLU6 behind it (pytorch#164920).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fastentropy.fusion.chains.aten import CONVOLUTIONS
from fastentropy.fusion.chains.nodes import is_overwritten
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import export_again, inference_module

_aten = torch.ops.aten

#: Adds to a value, or replaces it.
_WRITES = {_aten.add_.Tensor, _aten.copy_.default}


def writing_new_values(network: nn.Module, inputs: TracedInputs) -> nn.Module:
    """Return a network that writes borders as new values; the network itself if it overwrites no slices.

    Args:
        network: the network.
        inputs: the inputs with which it was traced.
    """
    if not isinstance(network, GraphModule) or not any(map(_overwrites_slice, network.graph.nodes)):
        return network
    program = export_again(network, inputs)
    write_new_values(program.graph)
    return inference_module(program)


def _overwrites_slice(node: Node) -> bool:
    """Return whether a node overwrites a slice."""
    return node.target in _WRITES and node.all_input_nodes[0].target is _aten.slice.Tensor


def write_new_values(graph: Graph) -> None:
    """Change a graph so that no slice of a convolution's output is overwritten.

    What is added to slices is padded with zeros to the size of the output, and added to all of it. If it is a constant, the
    runtime pads it only once. A slice that is replaced is concatenated with the rest of the output.

    Args:
        graph: a graph of ATen operators whose nodes have an example of their value. It is changed in place.
    """
    for whole in [node for node in graph.nodes if node.target in CONVOLUTIONS]:
        writes = sorted(write for view in whole.users if (write := _write_to(view)))
        readers = [user for user in whole.users if not _write_to(user)]
        if not writes or any(reader < writes[-1] for reader in readers):
            continue
        with graph.inserting_before(writes[-1].next):
            value = _written(graph, whole, writes)
        for reader in readers:
            reader.replace_input_with(whole, value)
        for write in reversed(writes):
            view = write.all_input_nodes[0]
            graph.erase_node(write)
            graph.erase_node(view)


def _write_to(view: Node) -> Node | None:
    """Return the node that overwrites a slice along one axis, if that is all that is done with the slice."""
    if view.target is not _aten.slice.Tensor or len(view.args) != 4 or len(view.users) != 1:
        return None
    (write,) = view.users
    if write.target not in _WRITES or write.args[0] is not view or len(write.args) != 2 or write.kwargs or write.users:
        return None
    values = write.args[1]
    if not isinstance(values, Node) or is_overwritten(values):
        return None
    return write if _fits(values.meta["val"], view, write) else None


def _fits(values: Tensor, view: Node, write: Node) -> bool:
    """Return whether values fill a slice of known positions without being repeated (if they are added, along its axis)."""
    whole, axis, start, stop = view.args
    shape: Sequence[int] = view.meta["val"].shape
    if not isinstance(whole, Node) or not isinstance(axis, int) or not isinstance(start, int) or not isinstance(stop, int):
        return False
    if start < 0 or stop - start != shape[axis] or values.dtype != view.meta["val"].dtype:
        return False
    behind = len(shape) - axis
    is_sum = write.target is _aten.add_.Tensor
    return bool(values.ndim >= behind and values.shape[-behind] == shape[axis]) if is_sum else bool(values.shape == shape)


def _written(graph: Graph, whole: Node, writes: list[Node]) -> Node:
    """Append what computes a value with its slices overwritten, and return the node of the result."""
    value, added = whole, cast("Node | None", None)
    for write in writes:
        view, values = cast("tuple[Node, Node]", write.args)
        _, axis, start, stop = cast("tuple[Node, int, int, int]", view.args)
        shape = whole.meta["val"].shape
        if write.target is _aten.add_.Tensor:
            padding = [0, 0] * (len(shape) - 1 - axis) + [start, shape[axis] - stop]
            padded = graph.call_function(_aten.constant_pad_nd.default, (values, padding))
            added = graph.call_function(_aten.add.Tensor, (added, padded)) if added else padded
            continue
        value, added = _sum(graph, value, added), None
        before = [graph.call_function(_aten.slice.Tensor, (value, axis, 0, start))] if start else []
        after = [graph.call_function(_aten.slice.Tensor, (value, axis, stop, shape[axis]))] if stop < shape[axis] else []
        value = graph.call_function(_aten.cat.default, ([*before, values, *after], axis))
    return _sum(graph, value, added)


def _sum(graph: Graph, value: Node, added: Node | None) -> Node:
    """Append the sum of a value and what is added to it, if anything is."""
    return value if added is None else graph.call_function(_aten.add.Tensor, (value, added))
