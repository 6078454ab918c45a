"""Follow channels through affine operators: convolutions, linear layers, batch norm, and selections of channels."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten import read_node
from fastentropy.fusion.chains.elements import Chain
from fastentropy.fusion.chains.lowering import Lowering
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.chains.nodes import WEIGHT_OF, fixed_size, mutates, shape_of
from fastentropy.fusion.chains.selections import Selection, selected_channels
from fastentropy.fusion.neurons.channels import Channels, Followed, Rewriting, Step, constant_where, varying
from fastentropy.fusion.neurons.links import Links


def read_operator(node: Node, module: GraphModule, followed: Followed) -> Step | None:
    """Read a node as an affine operator on the channels of its operand.

    Args:
        node: the node.
        module: the traced model.
        followed: the channels of the values before it. Those of the operand may be unknown if they need not be followed.

    Returns:
        The step, or None if the node is no such operator.
    """
    for affine in read_node(node, module):
        if affine.build is None or affine.axes is None or affine.flattens or mutates(node):
            continue
        channels = followed.get(affine.operand)
        if channels is not None and channels.axis != -affine.axes - 1:
            continue
        operator = affine.build(affine.axes)
        if operator.groups > 1:
            return Grouped(node, affine.operand, operator, affine.name)
        if isinstance(operator, Selection):
            return Chosen(node, affine.operand, operator)
        return Dense(node, affine.operand, operator, affine.name)
    return None


@dataclass(frozen=True, eq=False)
class Dense:
    """A convolution with one group or a linear layer: the channels of its input and those of its output are independent.

    Attributes:
        node: the node.
        operand: the node of its input.
        operator: the operator.
        name: the path of its module.
    """

    node: Node
    operand: Node
    operator: AffineOperator
    name: str

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return new channels. Those of the input must stay unless they are constant."""
        numbers, axis = links.add(self.operator.out_channels), -len(self.operator.axes) - 1
        channels = followed.get(self.operand)
        if channels is None:
            return varying(axis, numbers)
        needed = ~channels.constant
        if any(each.upsampling > 1 for each in self.operator.axes):
            needed = needed | (channels.values != 0)
        links.keep(channels.numbers[needed], self)
        if not bool(channels.constant.any()):
            return varying(axis, numbers)
        reads = _reads(self.operator)
        constant = ~(reads & needed).any(1)
        if self.operator.reads_zeros:
            constant = constant & ~(reads & (channels.values != 0)).any(1)
        return constant_where(axis, numbers, constant, _at_constant(self.operator, channels.values))

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the operator without some rows and columns to a graph. What constant channels add is in its bias."""
        operator, channels, rows = self.operator, followed.get(self.operand), cut.kept(followed[self.node])
        if rows is not None:
            rows = rows.to(operator.weight.device)
            operator = replace(operator, weight=operator.weight[rows], bias=operator.bias[rows])
        columns = None if channels is None else cut.kept(channels)
        chain: Chain = (operator,)
        if channels is not None and columns is not None:
            chain = self._without_columns(operator, channels, columns)
        return lowered(chain, self.node, self.operand, self.name, cut)

    def _without_columns(self, operator: AffineOperator, channels: Channels, columns: Tensor) -> Chain:
        """Return an operator that reads some channels only; the others are constant."""
        values = channels.values.clone()
        values[columns] = 0
        if operator.reads_zeros and bool(values.any()):
            sizes = [fixed_size(size) for size in (shape_of(self.operand) or ())[-len(operator.axes) :]]
            scattered = _scatter(columns, values.to(operator.bias), operator)
            return merge((scattered, operator), None if None in sizes else [size or 0 for size in sizes])
        weight = operator.weight[:, columns.to(operator.weight.device)]
        return (replace(operator, weight=weight, bias=_at_constant(operator, values).to(operator.bias)),)


def _reads(operator: AffineOperator) -> Tensor:
    """Return whether each output channel reads each input channel of its group, bool [out_channels, in_channels / groups]."""
    return (operator.weight != 0).reshape(*operator.weight.shape[:2], -1).any(2).cpu()


def _at_constant(operator: AffineOperator, values: Tensor) -> Tensor:
    """Return the output of an operator, far from any border, for an input with one value per channel."""
    return operator.at_constant(values.to(operator.bias)).cpu()


def _scatter(columns: Tensor, values: Tensor, like: AffineOperator) -> AffineOperator:
    """Return the operator that puts channels to their places among constant ones.

    Args:
        columns: the place of each channel.
        values: the values of the constant channels, and 0 at the places of the others.
        like: an operator that reads the result.
    """
    axes = len(like.axes)
    weight = torch.zeros(len(values), len(columns), dtype=torch.float64, device=values.device)
    weight[columns, torch.arange(len(columns), device=columns.device)] = 1
    ones = (1,) * axes
    return AffineOperator(weight.reshape(*weight.shape, *ones), values, ones, (0,) * axes, ones)


@dataclass(frozen=True, eq=False)
class Grouped:
    """An operator on groups of channels, such as a depthwise convolution, batch norm or a pixel shuffle. Groups stay whole.

    The attributes are those of `Dense`.
    """

    node: Node
    operand: Node
    operator: AffineOperator
    name: str

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return the channels of the groups. A group is cut out with all of its channels, or not at all."""
        channels, operator = followed.get(self.operand), self.operator
        if channels is None:
            return None
        groups, rows = operator.groups, operator.out_channels // operator.groups
        numbers, constant, values, linear = (
            each.reshape(groups, -1) for each in (channels.numbers, channels.constant, channels.values, channels.linear)
        )
        for column in numbers.unbind(1)[1:]:
            links.join(numbers[:, 0], column)
        out = numbers[:, :1].expand(-1, rows).flatten()
        linear = linear.all(1, keepdim=True).expand(-1, rows).flatten()
        if not bool(constant.any()):
            return varying(channels.axis, out, linear)
        reads = _reads(operator).reshape(groups, rows, -1)
        hidden = operator.reads_zeros and not (isinstance(operator, Selection) and operator.repeats)
        needed = ~constant | (values != 0) if hidden else ~constant
        known = ~(reads & needed.unsqueeze(1)).any(2).flatten()
        return constant_where(channels.axis, out, known, _at_constant(operator, channels.values), linear)

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the operator on the groups that stay to a graph."""
        if isinstance(self.operator, Selection):
            return cut.graph.node_copy(self.node, cut.copied)
        rows, operator = cut.kept(followed[self.node]), self.operator
        if rows is not None:
            rows = rows.to(operator.weight.device)
            groups = operator.groups * len(rows) // operator.out_channels
            operator = replace(operator, weight=operator.weight[rows], bias=operator.bias[rows], groups=groups)
        return lowered((operator,), self.node, self.operand, self.name, cut)


@dataclass(frozen=True, eq=False)
class Chosen:
    """An operator that chooses, permutes or repeats channels."""

    node: Node
    operand: Node
    operator: Selection

    @property
    def _index(self) -> Tensor:
        """Return the input channel of each output channel."""
        return self.operator.weight.flatten(1).argmax(1).cpu()

    def follow(self, followed: Followed, links: Links) -> Channels | None:
        """Return the chosen channels of the operand."""
        channels = followed.get(self.operand)
        return None if channels is None else channels.chosen(self._index)

    def cut(self, followed: Followed, cut: Rewriting) -> Node:
        """Append the choice of the channels that stay, among those that stay, to a graph."""
        before, after = (cut.kept(followed[each]) for each in (self.operand, self.node))
        if before is None:
            return cut.graph.node_copy(self.node, cut.copied)
        index = self._index if after is None else self._index[after]
        axes, dimensions = len(self.operator.axes), len(shape_of(self.operand) or ())
        device = self.operator.weight.device
        places = torch.searchsorted(before, index).to(device)
        chosen = selected_channels(places, len(before), axes, has_batch=dimensions == axes + 2)
        return lowered((chosen,), self.node, self.operand, "", cut)


def lowered(chain: Chain, node: Node, operand: Node, name: str, cut: Rewriting) -> Node:
    """Append operators in the place of a node to a graph, and return the node of their output.

    Args:
        chain: the operators.
        node: the node in the original graph.
        operand: the node of their input, in the original graph.
        name: the path of the module whose weight they have.
        cut: the graph.
    """
    value: Any = operand.meta["val"]
    like = torch.empty((1,) * value.ndim, dtype=value.dtype, device=value.device)
    lowering = Lowering(cut.graph, like, cut.new_name(), fixed_size=False)
    result = lowering.lower(chain, cut.copied(operand), [fixed_size(size) or 1 for size in value.shape])
    cut.constants.update(lowering.tensors)
    for each in lowering.tensors:
        for reader in cut.graph.find_nodes(op="get_attr", target=each):
            reader.meta[WEIGHT_OF] = name
    return result
