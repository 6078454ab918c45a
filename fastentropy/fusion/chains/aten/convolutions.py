"""Read convolutions and transposed convolutions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in, bias_or_zeros, per_axis, weight_path
from fastentropy.fusion.chains.nodes import arguments

_aten = torch.ops.aten

#: ATen operators for 1, 2 and 3 spatial axes, in this order.
CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
TRANSPOSED_CONVOLUTIONS = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)

#: Convolutions with padding="same" or "valid", for 1, 2 and 3 spatial axes.
_CONVOLUTIONS_PADDED_BY_NAME = (_aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding)

#: The number of spatial axes of each operator above.
_AXES: dict[Any, int] = {
    target: axes
    for targets in (CONVOLUTIONS, _CONVOLUTIONS_PADDED_BY_NAME, TRANSPOSED_CONVOLUTIONS)
    for axes, target in enumerate(targets, 1)
}


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    plain = dict.fromkeys(CONVOLUTIONS + _CONVOLUTIONS_PADDED_BY_NAME, _read_convolution)
    return plain | dict.fromkeys(TRANSPOSED_CONVOLUTIONS, _read_transposed_convolution)


def _read_convolution(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a convolution with constant weight and bias."""
    if (named := arguments(node, "weight", "bias", module=module)) is None:
        return None
    (values, tensors), axes = named, _AXES[node.target]
    stride, dilation = (per_axis(values[name], axes) for name in ("stride", "dilation"))

    def build(_: int) -> AffineOperator:
        weight = tensors["weight"]
        padding = _padding(values["padding"], weight.shape[2:], dilation)
        return AffineOperator(weight, bias_or_zeros(tensors, weight, len(weight)), stride, padding, dilation, values["groups"])

    return affine_in(values["input"], axes, build, weight_path(values["weight"]))


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Any, ...]:
    """Return the padding of a convolution as one entry per axis.

    With "same", the zeros are divided between both ends. If their number is odd, the larger half is behind the input.

    Args:
        padding: "same", "valid", one number, or one number per axis.
        kernel: number of taps per axis.
        dilation: distance between two taps per axis.
    """
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        return tuple((each // 2, each - each // 2) for each in reach)
    return per_axis(padding, len(kernel))


def _read_transposed_convolution(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a transposed convolution as a convolution with upsampling, whose kernel is flipped."""
    if (named := arguments(node, "weight", "bias", module=module)) is None:
        return None
    (values, tensors), axes = named, _AXES[node.target]
    stride, padding, output_padding, dilation = (
        per_axis(values[name], axes) for name in ("stride", "padding", "output_padding", "dilation")
    )

    def build(_: int) -> AffineOperator:
        groups, weight = values["groups"], tensors["weight"]
        split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).transpose(1, 2)
        flipped = split.flatten(0, 1).flip(tuple(range(2, 2 + axes)))
        margins = [(k - 1) * d - p for k, d, p in zip(flipped.shape[2:], dilation, padding, strict=True)]
        both = tuple((margin, margin + more) for margin, more in zip(margins, output_padding, strict=True))
        bias = bias_or_zeros(tensors, weight, len(flipped))
        return AffineOperator(flipped, bias, (1,) * axes, both, dilation, groups, stride)

    return affine_in(values["input"], axes, build, weight_path(values["weight"]))
