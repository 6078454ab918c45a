"""Follow channels through operators that keep them: elementwise operators, pooling, views and concatenations."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fastentropy._compat import operator_schema, to_copy
from fastentropy.fusion.chains.aten import read_concatenation, read_node, read_reduction, read_view, read_weighted_sum
from fastentropy.fusion.chains.layouts import Part, natural_layout
from fastentropy.fusion.chains.nodes import base_of, fixed_size, is_view, mutates, shape_of
from fastentropy.fusion.neurons.channels import Channels, Followed, Rewriting, Step, constant_where
from fastentropy.fusion.neurons.links import Links

_aten = torch.ops.aten

#: Elementwise operators that PyTorch does not mark as such.
_ELEMENTWISE = {_aten.hardswish.default, _aten.hardswish_.default, _aten.prelu.default}

#: Products. A product is 0 where one factor is 0.
_PRODUCTS = {_aten.mul.Tensor, _aten.multiply.Tensor}

#: Casts.
_CASTS = {_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, to_copy()}

#: Operators on the positions of each channel that return a constant channel as it is, with the number of spatial axes.
_POOLS = {
    **{getattr(_aten, f"max_pool{axes}d").default: axes for axes in (1, 2, 3)},
    **{getattr(_aten, f"adaptive_avg_pool{axes}d").default: axes for axes in (1, 2, 3)},
    **{_aten.upsample_bilinear2d.vec: 2, _aten.upsample_bicubic2d.vec: 2, _aten.upsample_linear1d.vec: 1},
    **{_aten.upsample_trilinear3d.vec: 3, _aten.upsample_nearest2d.vec: 2, _aten.upsample_nearest1d.vec: 1},
}

#: Pools that are not linear.
_MAXIMA = {getattr(_aten, f"max_pool{axes}d").default for axes in (1, 2, 3)}

#: Reshapes whose second argument is the new shape.
_RESHAPES = {_aten.view.default, _aten.reshape.default, _aten.expand.default}

#: Views whose arguments do not depend on the number of channels.
_MOVES = {
    *(_aten.flatten.using_ints, _aten.ravel.default, _aten.t.default, _aten.numpy_T.default, _aten.mT.default),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
    *(_aten.permute.default, _aten.transpose.int, _aten.swapaxes.default, _aten.swapdims.default),
    *(_aten.movedim.int, _aten.movedim.intlist, _aten.moveaxis.int, _aten.moveaxis.intlist),
}


def read_elementwise(node: Node, module: GraphModule) -> Step | None:
    """Read a node as an operator through which channels can be followed, or return None."""
    target: Any = node.target
    if target in _CASTS or returns_operand(node, module) or target in _POOLS or read_reduction(node):
        return PerChannel(node)
    if read_view(node):
        return View(node)
    if concatenation := read_concatenation(node):
        return Concatenated(node, *concatenation)
    tags = getattr(target, "tags", ())
    if target in _ELEMENTWISE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags):
        return _read_elementwise(node, module)
    return None


def returns_operand(node: Node, module: GraphModule) -> bool:
    """Return whether an operator returns its operand, as it is or as a copy."""
    return any(affine.build is None and affine.axes is None for affine in read_node(node, module)) and not mutates(node)


def _read_elementwise(node: Node, module: GraphModule) -> "Elementwise | None":
    """Read an elementwise operator; None if other nodes need the value that it overwrites, or an operand is a number."""
    target = functional(node)
    constants = {each: attrgetter(str(each.target))(module) for each in node.all_input_nodes if each.op == "get_attr"}
    operands = [each for each in node.all_input_nodes if each not in constants]
    if target is None or not operands or not all(isinstance(each, Tensor) for each in constants.values()):
        return None
    is_affine = bool(read_node(node, module)) if len(operands) == 1 else read_weighted_sum(node) is not None
    return Elementwise(node, target, tuple(operands), {each: value.detach() for each, value in constants.items()}, is_affine)


def functional(node: Node) -> Any:
    """Return the operator of a node in the form that overwrites nothing; None if another node reads what it overwrites."""
    if not mutates(node):
        return node.target
    schema, operand = operator_schema(node.target), node.args[0]
    if schema is None or not isinstance(operand, Node) or any(node < user for user in _readers(base_of(operand))):
        return None
    name = schema.name.removeprefix("aten::").removesuffix("_")
    return getattr(getattr(_aten, name, None), schema.overload_name or "default", None)


def _readers(node: Node) -> list[Node]:
    """Return the nodes that read the memory of a node, and the views of it."""
    return [each for user in node.users for each in (user, *(_readers(user) if is_view(user) else ()))]


@dataclass(frozen=True, eq=False)
class Elementwise:
    """An elementwise operator of values whose channels lie in the same axis, and of constants.

    Attributes:
        node: the node.
        target: its operator, in the form that overwrites nothing.
        operands: the nodes of the values.
        constants: the values of the nodes of constants.
        is_affine: whether the operator is a sum of values, or a scale and a shift of one by constants.
    """

    node: Node
    target: Any
    operands: tuple[Node, ...]
    constants: Mapping[Node, Tensor]
    is_affine: bool

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Link the channels of the operands. A channel is constant if it is in all operands that count."""
        known = [followed.get(operand) for operand in self.operands]
        first, dimensions = known[0], len(shape_of(self.node) or ())
        if first is None or dimensions < -first.axis:
            return None
        others = [each for each in known if each is not None]
        if len(others) < len(known) or any(each.axis != first.axis or len(each) != len(first) for each in others):
            return None
        if any(self._axis(value, first) is None for value in self.constants.values()):
            return None
        for each in others[1:]:
            links.join(first.numbers, each.numbers)
        constant, linear = self._states(followed, first, "constant"), self._states(followed, first, "linear")
        return constant_where(first.axis, first.numbers, constant, self._values(followed, dimensions), linear)

    def _axis(self, value: Tensor, channels: Channels) -> int | None:
        """Return the axis of a constant that holds the channels; 0 for a number in it; None if it holds another axis."""
        if value.numel() == 1:
            return 0
        axis = -1 if self.target == _aten.prelu.default else channels.axis
        is_per_channel = value.ndim >= -axis and value.shape[axis] == value.numel() == len(channels)
        return axis if is_per_channel else None

    def _states(self, followed: Followed, first: Channels, state: str) -> Tensor:
        """Return which channels of the output are in a state: "constant" or "linear"."""
        known: list[Tensor] = [getattr(followed[operand], state) for operand in self.operands]
        if self.target == _aten.where.self and self.node.args[0] in self.constants:
            mask: Any = self.node.args[0]
            chosen = (known[self.operands.index(each)] if each in self.operands else None for each in self.node.args[1:])
            left, right = (torch.ones_like(first.constant) if each is None else each for each in chosen)
            return left.where(self.constants[mask].flatten().cpu().expand(len(first)), right)
        if state == "linear" and not self.is_affine:
            return torch.zeros_like(first.linear)
        all_are = torch.stack(known).all(0)
        if self.target in _PRODUCTS and state == "constant":
            for each in map(followed.__getitem__, self.operands):
                all_are = all_are | (each.constant & (each.values == 0))
        return all_are

    def _values(self, followed: Followed, dimensions: int) -> Tensor:
        """Return what the operator computes where all operands are constant."""

        def value(operand: Node) -> Tensor:
            if operand in self.constants:
                constant = self.constants[operand].cpu()
                return constant.double() if constant.is_floating_point() else constant
            dtype = operand.meta["val"].dtype
            values = followed[operand].values.to(torch.float64 if dtype.is_floating_point else dtype)
            return values.reshape(followed[operand].shape(dimensions))

        result: Tensor = self.target(*map_arg(self.node.args, value), **map_arg(self.node.kwargs, value))
        return result.flatten()

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the operator to a graph, with the same channels of all operands and constants."""
        first = followed[self.operands[0]]
        index = cut.kept(first)

        def operand(each: Node) -> Node:
            value = self.constants.get(each)
            axis = None if value is None else self._axis(value, first)
            if value is None or index is None or not axis:
                return cut.copied(each)
            return cut.constant(value.index_select(axis, index.to(value.device)))

        return cut.graph.call_function(self.target, map_arg(self.node.args, operand), map_arg(self.node.kwargs, operand))


@dataclass(frozen=True, eq=False)
class PerChannel:
    """An operator on each channel by itself that returns a constant one as it is: a cast, a pool, a mean over positions."""

    node: Node

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return the channels of the operand, if the operator does not act on their axis."""
        operand: Any = self.node.args[0]
        channels, before, after = followed.get(operand), len(shape_of(operand) or ()), len(shape_of(self.node) or ())
        axes = _POOLS.get(self.node.target)
        if channels is None or len(self.node.all_input_nodes) > 1 or (axes is not None and channels.axis != -axes - 1):
            return None
        reduction = read_reduction(self.node)
        if reduction is None:
            linear = channels.linear if self.node.target not in _MAXIMA else channels.constant
            return replace(channels, linear=linear)
        if min(reduction.axes) <= before + channels.axis:
            return None
        constant = channels.constant & ((channels.values == 0) | reduction.is_mean)
        return constant_where(channels.axis + before - after, channels.numbers, constant, channels.values, channels.linear)

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the operator to a graph, as it is."""
        return cut.graph.node_copy(self.node, cut.copied)


@dataclass(frozen=True, eq=False)
class View:
    """A view that moves the channels to another axis, or to one that holds positions too, as the features of an image."""

    node: Node

    def _follow(self, followed: Followed) -> tuple[int, Callable[[Tensor], Tensor]] | None:
        """Return the axis of the channels counted from the start, and what makes their numbers; None if they are split up."""
        operand: Any = self.node.args[0]
        channels, shape, view = followed.get(operand), shape_of(operand) or (), read_view(self.node)
        if channels is None or view is None or (layout := view(natural_layout(shape))) is None:
            return None
        own = len(shape) + channels.axis
        holders = [axis for axis, group in enumerate(layout) if any(part.axis == own for part in group)]
        if len(holders) != 1:
            return None
        group = layout[holders[0]]
        place = next((index for index, part in enumerate(group) if part == Part(own, len(channels))), None)
        sizes = [fixed_size(part.size) for part in group]
        if place is None or None in sizes:
            return None
        before, behind = (math.prod(size or 0 for size in each) for each in (sizes[:place], sizes[place + 1 :]))
        return holders[0], lambda each: each.repeat_interleave(behind).repeat(before)

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return the channels of the operand in their new axis, once for each position that this axis holds too."""
        if (found := self._follow(followed)) is None or self.node.target not in _RESHAPES | _MOVES:
            return None
        axis, repeated = found
        return followed[self.node.all_input_nodes[0]].moved(axis - len(shape_of(self.node) or ()), repeated)

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the view to a graph, with the number of channels that stay."""
        after, index = followed[self.node], cut.kept(followed[self.node])
        copied = cut.graph.node_copy(self.node, cut.copied)
        if index is None or self.node.target not in _RESHAPES:
            return copied
        sizes: Any = copied.args[1]
        axis = len(sizes) + after.axis
        copied.update_arg(1, [size if each != axis or size == -1 else len(index) for each, size in enumerate(sizes)])
        copied.target = _aten.reshape.default if copied.target is _aten.view.default else copied.target
        return copied


@dataclass(frozen=True, eq=False)
class Concatenated:
    """A concatenation of values along their channels."""

    node: Node
    operands: Sequence[Node]
    dim: int

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return the channels of all operands, one behind the other."""
        known = [followed.get(operand) for operand in self.operands]
        parts = [each for each in known if each is not None]
        axis = self.dim - len(shape_of(self.node) or ())
        if len(parts) < len(known) or any(each.axis != axis for each in parts):
            return None
        fields = ("numbers", "constant", "values", "linear")
        return Channels(axis, *(torch.cat([getattr(each, name) for each in parts]) for name in fields))

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the concatenation to a graph, as it is."""
        return cut.graph.node_copy(self.node, cut.copied)
