"""Follow the channels of the values of a traced graph: which are constant, and which can only be cut out together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fastentropy.fusion.neurons.links import Links


@dataclass(frozen=True, eq=False)
class Channels:
    """What is known of the channels of a value.

    Attributes:
        axis: their axis, counted from the end: -1 is the last one.
        numbers: the number of each channel in `Links`, int64 [channels]. Several channels have the same one if they come from
            one channel, such as the features of an image that was flattened.
        constant: bool [channels], True if the channel has one value that does not depend on the input or the position.
        values: float64 [channels], that value, and 0 for all other channels.
        linear: bool [channels], True if the channel is an affine function of the output of the convolution or the linear layer
            that it comes from.
    """

    axis: int
    numbers: Tensor
    constant: Tensor
    values: Tensor
    linear: Tensor

    def __len__(self) -> int:
        """Return the number of channels."""
        return len(self.numbers)

    def shape(self, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a value with that many axes that has a single position."""
        return (*(1,) * (dimensions + self.axis), len(self), *(1,) * (-self.axis - 1))

    def chosen(self, index: Tensor) -> "Channels":
        """Return the channels with the given indices."""
        return self.moved(self.axis, lambda each: each[index])

    def moved(self, axis: int, move: Callable[[Tensor], Tensor]) -> "Channels":
        """Return the channels in another axis, in the order that a function gives them."""
        return Channels(axis, *map(move, (self.numbers, self.constant, self.values, self.linear)))


#: The channels of the values that can be followed, by node.
Followed: TypeAlias = Mapping[Node, Channels]


def varying(axis: int, numbers: Tensor, linear: Tensor | None = None) -> Channels:
    """Return channels that are not constant. By default, all are linear."""
    constant = torch.zeros(len(numbers), dtype=torch.bool, device="cpu")
    return Channels(axis, numbers, constant, constant.double(), ~constant if linear is None else linear)


def constant_where(axis: int, numbers: Tensor, constant: Tensor, values: Tensor, linear: Tensor | None = None) -> Channels:
    """Return channels of which some are constant; `values` may hold anything for the others, and `linear` for these."""
    values = values.double()
    constant = constant & values.isfinite()
    linear = torch.ones_like(constant) if linear is None else linear | constant
    return Channels(axis, numbers, constant, values.where(constant, values.new_zeros(())), linear)


class Rewriting(Protocol):
    """A graph whose channels are being cut out.

    Attributes:
        graph: the graph, which inserts nodes in the place of the node that is being rewritten.
        constants: the constants that were added to it, by name.
    """

    graph: Graph
    constants: dict[str, Tensor]

    def kept(self, channels: Channels) -> Tensor | None:
        """Return the indices of the channels that stay, int64, or None if all do."""

    def copied(self, node: Node) -> Node:
        """Return the node that computes a value of the original graph in the new one, without the channels cut out."""

    def constant(self, value: Tensor) -> Node:
        """Add a constant and return the node that reads it."""

    def new_name(self) -> str:
        """Return how the names of further constants may begin."""


class Step(Protocol):
    """An operator of a graph through which channels can be followed."""

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return the channels of the output, and note in `links` which channels of the operands must stay.

        Args:
            followed: the channels of all values before it.
            links: the channels that belong together.

        Returns:
            The channels; None if they cannot be followed. All those of the operands must stay then.
        """

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the operator without the channels that are cut out to a graph, and return its node."""
