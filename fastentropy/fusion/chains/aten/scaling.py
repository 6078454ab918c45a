"""Read normalisation layers that scale and shift each channel by constants."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, channelwise
from fastentropy.fusion.chains.nodes import arguments, shape_of

_aten = torch.ops.aten


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {_aten.batch_norm.default: _read_batch_norm, _aten.instance_norm.default: _read_batch_norm}


def _read_batch_norm(node: Node, module: GraphModule) -> AffineNode | None:
    """Read batch norm in eval mode: y = (x − mean) / sqrt(var + eps) · weight + bias (Ioffe and Szegedy, arXiv 1502.03167).

    Instance norm that uses running statistics computes the same.
    """
    named = arguments(node, "weight", "bias", "running_mean", "running_var", module=module)
    if (
        named is None
        or named[0].get("training")
        or named[0].get("use_input_stats")
        or not {"running_mean", "running_var"} <= set(named[1])
    ):
        return None
    values, constants = named

    def build(axes: int) -> AffineOperator:
        tensors = {name: value.double() for name, value in constants.items()}
        scale = torch.rsqrt(tensors["running_var"] + values["eps"])
        scale = scale * tensors["weight"] if "weight" in tensors else scale
        shift = -tensors["running_mean"] * scale
        return channelwise(scale, shift + tensors["bias"] if "bias" in tensors else shift, axes)

    return affine_in(values["input"], len(shape_of(values["input"]) or ()) - 2, build)
