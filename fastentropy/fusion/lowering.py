"""Write chains of affine operators back into a graph of ATen operators."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fastentropy.fusion.affine import AffineOperator, Chain, Sum

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)


def lower(chain: Chain, graph: Graph, value: Node, tensors: dict[str, Tensor], like: Tensor, prefix: str) -> Node:
    """Append the operators of a chain to a graph at its insertion point and return the node of the result.

    Their weights, in the dtype and on the device of `like`, are added to `tensors` under names that begin with `prefix`.
    """
    for index, element in enumerate(chain):
        name = f"{prefix}_{index}"
        if isinstance(element, Sum):
            branches = [lower(branch, graph, value, tensors, like, f"{name}_{n}") for n, branch in enumerate(element.branches)]
            value = branches[0]
            for branch in branches[1:]:
                value = graph.call_function(_aten.add.Tensor, (value, branch))
        else:
            value = _lower_operator(element, graph, value, tensors, like, name)
    return value


def compile_chain(chain: Chain, like: Tensor) -> GraphModule:
    """A chain as a module of its own that runs just as it will inside a fused model."""
    graph, tensors = Graph(), dict[str, Tensor]()
    graph.output(lower(chain, graph, graph.placeholder("x"), tensors, like, "operator"))
    return GraphModule(tensors, graph)


def _lower_operator(
    operator: AffineOperator, graph: Graph, value: Node, tensors: dict[str, Tensor], like: Tensor, name: str
) -> Node:
    def constant(suffix: str, tensor: Tensor) -> Node:
        tensors[f"{name}_{suffix}"] = tensor.to(like).contiguous()
        return graph.create_node("get_attr", f"{name}_{suffix}")

    axes = len(operator.kernel)
    if operator.is_channelwise and operator.bias.ndim == 1:
        # A batch norm with nothing to fold into: one pass over the values.
        scale, shift = (t.reshape(-1, *(1,) * axes) for t in (operator.weight, operator.bias))
        return graph.call_function(_aten.addcmul.default, (constant("bias", shift), value, constant("weight", scale)))
    if not axes:
        weight = operator.dense_weight()
        return graph.call_function(_aten.linear.default, (value, constant("weight", weight), constant("bias", operator.bias)))
    everywhere = operator.bias.ndim == 1
    geometry: list[Any] = [list(operator.stride), list(operator.padding), list(operator.dilation), operator.groups]
    bias = constant("bias", operator.bias) if everywhere else None
    output = graph.call_function(_CONVOLUTIONS[axes - 1], (value, constant("weight", operator.weight), bias, *geometry))
    # The map is added in place: the convolution's output is this graph's own.
    return output if everywhere else graph.call_function(_aten.add_.Tensor, (output, constant("bias", operator.bias)))
