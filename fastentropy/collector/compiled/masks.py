"""The padding mask of a pass as one more input of a compiled graph."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from fastentropy._compat import UncountableGraphError, add_input, in_fake_mode_of
from fastentropy.sites.graphs import GraphCall


class _Size(NamedTuple):
    """A size of a mask: a number, or the product of sizes of inputs of the graph."""

    number: int
    factors: tuple[tuple[int, int], ...]  # the index of an input, and an axis of it; -1 if the input is a number

    def of(self, inputs: Sequence[Any]) -> int:
        """Return the size for some inputs of the graph."""
        values = ((inputs[index], axis) for index, axis in self.factors)
        return self.number * math.prod(int(value if axis < 0 else value.shape[axis]) for value, axis in values)


class MaskInput(NamedTuple):
    """The mask that a graph takes as its last input.

    Attributes:
        is_flat: whether it is [batch * tokens]; otherwise it is [batch, tokens].
        sizes: its sizes, which are those of the inputs that it is for.
        device: the device of these inputs.
    """

    is_flat: bool
    sizes: tuple[_Size, ...]
    device: torch.device

    def of(self, mask: Tensor | None, inputs: Sequence[Any]) -> Tensor:
        """Return the mask for a run of the graph. All positions are counted if there is none, or if it does not fit.

        Args:
            mask: the mask of the pass, bool [batch, tokens]; None if it has none.
            inputs: the inputs of the graph.
        """
        sizes = [size.of(inputs) for size in self.sizes]
        if mask is not None and self.is_flat:
            mask = mask.flatten()
        if mask is None or list(mask.shape) != sizes:
            return torch.ones(sizes, dtype=torch.bool, device=self.device)
        return mask.to(self.device)


def add_masks(graph: fx.Graph, calls: Sequence[GraphCall]) -> tuple[dict[bool, fx.Node], list[MaskInput], list[Tensor]]:
    """Add inputs to a graph for the masks that its calls need: one of [batch, tokens], or one of [batch * tokens], or both.

    Returns:
        The new inputs by `MaskInput.is_flat`; the inputs as they are computed in each run; the inputs for the tracer.

    Raises:
        UncountableGraphError: it is not known which sizes the mask has in other runs of the graph.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    nodes, masks, values = dict[bool, fx.Node](), list[MaskInput](), list[Tensor]()
    for call in calls:
        if call.token_axes is None or (is_flat := call.token_axes.batch == call.token_axes.tokens) in nodes:
            continue
        x: Tensor = call.x.meta["example_value"]
        axes = call.token_axes[:1] if is_flat else call.token_axes
        sizes = tuple(_find(x.shape[axis], placeholders) for axis in axes)
        with in_fake_mode_of(x):
            values.append(torch.ones([x.shape[axis] for axis in axes], dtype=torch.bool, device=x.device))
        nodes[is_flat] = add_input(graph, f"mask_{len(masks)}", values[-1])
        masks.append(MaskInput(is_flat, sizes, x.device))
    return nodes, masks, values


def spread(mask: Any, ndim: int, token_axes: Sequence[int]) -> Any:
    """Return a mask with as many axes as an input, so that it is broadcast to it.

    Args:
        mask: a proxy of the mask, [batch, tokens] or [batch * tokens].
        ndim: the number of axes of the input.
        token_axes: its axes along which the positions lie.
    """
    if token_axes[0] > token_axes[1]:
        mask = mask.t()
    for axis in range(ndim):
        if axis not in token_axes:
            mask = mask.unsqueeze(axis)
    return mask


def _find(size: Any, placeholders: Sequence[fx.Node]) -> _Size:
    """Return how a size follows from the inputs of a graph: from one of their sizes, or from those of two axes side by side."""
    if isinstance(size, int):
        return _Size(size, ())
    for index, node in enumerate(placeholders):
        value = node.meta.get("example_value")
        if isinstance(value, Tensor):
            shape = value.shape
            for axis, other in enumerate(shape):
                if str(other) == str(size):
                    return _Size(1, ((index, axis),))
                if axis and str(shape[axis - 1] * other) == str(size):
                    return _Size(1, ((index, axis - 1), (index, axis)))
        elif str(value) == str(size):
            return _Size(1, ((index, -1),))
    raise UncountableGraphError("no input has the sizes of the padding mask")
