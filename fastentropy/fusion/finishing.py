"""Finish a rewritten graph: linear layers read dense values, activations cost no pass of their own, outputs keep their strides.

None of this changes a value that the graph computes.
"""

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fastentropy._compat import tree_leaves
from fastentropy.fusion.inputs import Inputs, clone
from fastentropy.fusion.memory_format import is_matrix, lost_order

_aten = torch.ops.aten

#: Layers that fold all axes but the last of their input into one matrix product.
_LINEAR_LAYERS = {_aten.linear.default, _aten.matmul.default}

#: Operators whose output is newly allocated, and not needed after an activation has read it.
_DENSE_OPERATORS = {
    *(getattr(_aten, f"conv{axes}d").default for axes in (1, 2, 3)),
    *(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input),
    *(_aten.linear.default, _aten.addmm.default, _aten.batch_norm.default, _aten.addcmul.default, _aten.add.Tensor),
    *(_aten.clamp_min.Tensor, _aten.clamp_min_.Tensor),
}

#: Activations by their form that overwrites its operand.
_IN_PLACE = {
    _aten.relu.default: _aten.relu_.default,
    _aten.relu6.default: _aten.relu6_.default,
    _aten.hardtanh.default: _aten.hardtanh_.default,
    _aten.mish.default: _aten.mish_.default,
    _aten.hardswish.default: _aten.hardswish_.default,
    _aten.silu.default: _aten.silu_.default,
    _aten.gelu.default: _aten.gelu_.default,
    _aten.leaky_relu.default: _aten.leaky_relu_.default,
    _aten.elu.default: _aten.elu_.default,
    _aten.clamp_min.Tensor: _aten.clamp_min_.Tensor,
    _aten.clamp_max.Tensor: _aten.clamp_max_.Tensor,
}

#: The position of the argument that names the activation, for each kernel of a chain.
_ACTIVATION_ARGUMENT = {
    "fastentropy_kernels.conv_pointwise.default": 10,
    "fastentropy_kernels.conv_bordered.default": 9,
    "fastentropy_kernels.linear_pair.default": 6,
}

#: Activations that these kernels compute too, by operator and further arguments: their names in `fastentropy_kernels`.
_ACTIVATIONS: dict[Any, str] = {
    (_aten.relu.default,): "relu",
    (_aten.relu6.default,): "relu6",
    (_aten.hardtanh.default, 0.0, 6.0): "relu6",
    (_aten.hardswish.default,): "hardswish",
    (_aten.silu.default,): "silu",
    (_aten.mish.default,): "mish",
    (_aten.gelu.default,): "gelu",
    (_aten.gelu.default, "none"): "gelu",
    (_aten.gelu.default, "tanh"): "gelu_tanh",
}


class _Watch(Interpreter):
    """Runs a graph and keeps what `finish` needs to know about its values.

    Attributes:
        strided: the linear layers whose input cannot be viewed as a matrix.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.strided: list[Node] = []

    def run_node(self, n: Node) -> Any:
        if n.target in _LINEAR_LAYERS:
            x, weight = (self.env.get(node) if isinstance(node, Node) else None for node in n.args[:2])
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.ndim == 2 and not is_matrix(x):
                self.strided.append(n)
        return super().run_node(n)


def finish(graph: GraphModule, inputs: Inputs, expected: Any) -> GraphModule:
    """Change a graph in place so that it runs as fast as its operators allow, and returns outputs of the model's strides.

    A linear layer multiplies by its weight once only if its input can be viewed as a matrix. PyTorch makes other inputs dense
    if the weight requires a gradient, and otherwise multiplies sample by sample, which is up to 13 times as slow.

    Args:
        graph: the graph.
        inputs: the inputs of one call.
        expected: the outputs of the model on these inputs.

    Returns:
        The graph.
    """
    watch = _Watch(graph)
    actual = watch.run(*clone(inputs).leaves, enable_io_processing=False)
    for node in watch.strided:
        with graph.graph.inserting_before(node):
            dense = graph.graph.call_function(_aten.contiguous.default, (node.args[0],))
        node.replace_input_with(node.args[0], dense)  # type: ignore[arg-type]
    for node in list(graph.graph.nodes):
        if node.target in _IN_PLACE and not _absorbed(node) and _is_free(node.args[0]):
            node.target = _IN_PLACE[node.target]
    _restore_orders(graph, tree_leaves(actual), tree_leaves(expected))
    graph.recompile()
    return graph


def _absorbed(node: Node) -> bool:
    """Let the kernel of the chain before an activation compute it, and return whether there is such a kernel."""
    name = _ACTIVATIONS.get((node.target, *node.args[1:], *node.kwargs.values()))
    kernel = output = node.args[0]
    if isinstance(output, Node) and output.target is getitem and output.args[1] == 0:
        kernel = output.args[0]
    if name is None or not isinstance(output, Node) or not isinstance(kernel, Node) or len(output.users) > 1:
        return False
    position = _ACTIVATION_ARGUMENT.get(str(kernel.target))
    if position is None or len(kernel.users) > 1 or kernel.args[position] != "identity":
        return False
    kernel.update_arg(position, name)
    node.replace_all_uses_with(output)
    node.graph.erase_node(node)
    return True


def _is_free(operand: Any) -> bool:
    """Return whether an operand may be overwritten: a layer has just allocated it, and one node reads it."""
    return isinstance(operand, Node) and operand.target in _DENSE_OPERATORS and len(operand.users) == 1


def _restore_orders(graph: GraphModule, actual: Sequence[Any], expected: Sequence[Any]) -> None:
    """Append to each output of a graph that has another order of axes in memory what gives it that of the model."""
    (output,) = graph.graph.find_nodes(op="output")
    nodes = tree_leaves(output.args[0])
    for node, value, wanted in zip(nodes, actual, expected, strict=True):
        order = lost_order(value, wanted)
        if order is not None and isinstance(node, Node):
            with graph.graph.inserting_before(output):
                permuted = graph.graph.call_function(_aten.permute.default, (node, order))
                dense = graph.graph.call_function(_aten.contiguous.default, (permuted,))
                inverse = [order.index(axis) for axis in range(len(order))]
                restored = graph.graph.call_function(_aten.permute.default, (dense, inverse))
            output.replace_input_with(node, restored)
