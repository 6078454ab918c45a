"""Define the affine node, and what the readers of all families of operators use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.nodes import WEIGHT_OF, weight_owner


@dataclass(frozen=True, eq=False)
class AffineNode:
    """A node of a graph whose operator is affine in one operand.

    Attributes:
        operand: the node of that operand.
        axes: number of spatial axes, or None if the operand may have any number of them.
        build: returns the operator for a given number of spatial axes; None if the node returns its operand. A weight that is
            a constant of the model is not copied, and keeps its dtype; all else is in float64.
        name: path of the module that holds the weight of a convolution or a linear layer; empty for other operators.
        flattens: whether the node also flattens channels and positions into one axis of features.
        is_view: whether the value of the node shares memory with the operand, although the two differ.
        number: the scale and the shift, if the node scales and shifts all values alike.
    """

    operand: Node
    axes: int | None
    build: Callable[[int], AffineOperator] | None = None
    name: str = ""
    flattens: bool = False
    number: tuple[Tensor, Tensor] | None = None
    is_view: bool = False


#: Reads a node of certain ATen operators as an affine node with constant weights, or returns None if it is not affine.
Reader: TypeAlias = Callable[[Node, GraphModule], AffineNode | None]


def affine_in(operand: Any, axes: int | None, *further: Any, **options: Any) -> AffineNode | None:
    """Return an `AffineNode` with these fields, or None if the operand is not a node."""
    return AffineNode(operand, axes, *further, **options) if isinstance(operand, Node) else None


def weight_path(node: Any) -> str:
    """Return the path of the module whose weight a node reads."""
    return str(node.meta.get(WEIGHT_OF)) if WEIGHT_OF in node.meta else weight_owner(str(node.target))


def bias_or_zeros(tensors: Mapping[str, Tensor], weight: Tensor, channels: int) -> Tensor:
    """Return the bias `[channels]` among the tensors in float64, or zeros on the device of the weight if there is no bias."""
    return tensors["bias"].double() if "bias" in tensors else weight.new_zeros(channels, dtype=torch.float64)


def per_axis(values: Any, axes: int) -> tuple[int, ...]:
    """Return one number per axis. `values` holds one number per axis, or one number for all axes."""
    entries = tuple(values) if isinstance(values, Sequence) else (values,)
    return entries * (axes // len(entries))


def channelwise(scale: Tensor, shift: Tensor, axes: int) -> AffineOperator:
    """Return the operator x · scale + shift, with scale and shift of shape `[channels]`."""
    ones = (1,) * axes
    return AffineOperator(scale.reshape(-1, 1, *ones), shift, ones, (0,) * axes, ones, groups=len(scale))
