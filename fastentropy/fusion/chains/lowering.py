"""Write chains of affine operators back into a graph of ATen operators."""

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator, Axis
from fastentropy.fusion.chains.elements import (
    Activation,
    BorderCorrected,
    Chain,
    Element,
    Flatten,
    FusedPair,
    Sum,
    TapBiased,
    output_shape,
)
from fastentropy.fusion.memory_format import like_format

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default)
_TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
_POOLS = (_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default)


class Lowering:
    """Appends operators to a graph at its insertion point.

    Their weights are added to `tensors` under names that begin with `prefix`, in the dtype, on the device and in the memory
    format of `like`, a value of the chain's source; activations are added to `modules`. Without `fixed_size`, the spatial
    sizes of `like` are only an example.
    """

    def __init__(self, graph: Graph, like: Tensor, prefix: str, fixed_size: bool = True) -> None:
        """Begin with no tensors and no modules."""
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self._graph, self._like, self._prefix, self._fixed_size = graph, like, prefix, fixed_size

    def lower(self, chain: Chain, value: Node, shape: Sequence[int]) -> Node:
        """Append a chain that is applied to a value of that shape, and return the node of the result."""
        elements = list(chain)
        while elements:
            element = elements.pop(0)
            if self._fixed_size and isinstance(element, AffineOperator) and _covers(element, shape):
                value = self._covering_layer(element, value, flattened=elements == [Flatten()])
                elements = [] if elements == [Flatten()] else elements
            else:
                value = self._element(element, value, shape)
            shape = output_shape((element,), shape)
        return value

    def _element(self, element: Element, value: Node, shape: Sequence[int]) -> Node:
        match element:
            case Sum(branches):
                total, *others = (self.lower(branch, value, shape) for branch in branches)
                for other in others:
                    total = self._graph.call_function(_aten.add.Tensor, (total, other))
                return total
            case BorderCorrected():
                return self._bordered(element, value, shape)
            case TapBiased():
                return self._masked(element, value)
            case FusedPair():
                return self._kernel(element, value)
            case Flatten():
                return self._graph.call_function(_aten.flatten.using_ints, (value, 1))
            case Activation(name, module):
                self.modules[name.replace(".", "_")] = module
                return self._graph.call_module(name.replace(".", "_"), (value,))
            case operator:
                return self._operator(operator, value)

    def _operator(self, operator: AffineOperator, value: Node) -> Node:
        if not operator.axes and not operator.is_channelwise:
            weight, bias = self._constant(operator.dense_weight()), self._bias(operator)
            return self._graph.call_function(_aten.linear.default, (value, weight, bias))
        if operator.is_channelwise and operator.bias.ndim == 1:
            return self._scale(operator, value)
        if operator.is_average and all(0 <= axis.before == axis.after <= axis.kernel // 2 for axis in operator.axes):
            padding = [axis.before for axis in operator.axes]
            arguments = (value, list(operator.kernel), list(operator.stride), padding)
            return self._graph.call_function(_POOLS[len(padding) - 1], arguments)
        if any(axis.upsampling > 1 for axis in operator.axes):
            return self._transposed_convolution(operator, value)
        return self._convolution(operator, value)

    def _scale(self, operator: AffineOperator, value: Node) -> Node:
        """A batch norm with nothing to fold into: one pass over the values."""
        scale, shift = (t.reshape(-1, *(1,) * len(operator.axes)) for t in (operator.weight, operator.bias))
        return self._graph.call_function(_aten.addcmul.default, (self._constant(shift), value, self._constant(scale)))

    def _convolution(self, operator: AffineOperator, value: Node) -> Node:
        padding = [max(min(axis.before, axis.after), 0) for axis in operator.axes]
        more = [margin - own for axis, own in zip(operator.axes, padding, strict=True) for margin in (axis.before, axis.after)]
        for part in ([max(n, 0) for n in more], [min(n, 0) for n in more]):  # zeros on one side only, then what is cut off
            if any(part):
                pairs = [part[index : index + 2] for index in range(0, len(part), 2)]
                arguments = (value, [n for pair in reversed(pairs) for n in pair])
                value = self._graph.call_function(_aten.constant_pad_nd.default, arguments)
        geometry: list[Any] = [list(operator.stride), padding, list(operator.dilation), operator.groups]
        operands = (value, self._constant(operator.weight), self._bias(operator), *geometry)
        output = self._graph.call_function(_CONVOLUTIONS[len(padding) - 1], operands)
        return self._with_map(operator, output)

    def _transposed_convolution(self, operator: AffineOperator, value: Node) -> Node:
        axes, groups = operator.axes, operator.groups
        flipped = operator.weight.flip(tuple(range(2, 2 + len(axes))))
        split = flipped.reshape(groups, -1, *flipped.shape[1:])
        weight = self._constant(split.transpose(1, 2).flatten(0, 1))
        padding = [axis.reach - axis.before for axis in axes]
        more = [axis.after - axis.before for axis in axes]
        geometry: list[Any] = [list(operator.upsampling), padding, more, groups, list(operator.dilation)]
        arguments = (value, weight, self._bias(operator), *geometry)
        return self._with_map(operator, self._graph.call_function(_TRANSPOSED[len(axes) - 1], arguments))

    def _with_map(self, operator: AffineOperator, output: Node) -> Node:
        """Add a bias that depends on the position, in place: the convolution's output is this graph's own."""
        if operator.bias.ndim == 1:
            return output
        return self._graph.call_function(_aten.add_.Tensor, (output, self._constant(operator.bias)))

    def _covering_layer(self, operator: AffineOperator, value: Node, flattened: bool) -> Node:
        """A convolution with as many taps as its input has positions: a linear layer of the flattened input."""
        features = self._graph.call_function(_aten.flatten.using_ints, (value, 1))
        arguments = (features, self._constant(operator.weight.flatten(1)), self._bias(operator))
        output = self._graph.call_function(_aten.linear.default, arguments)
        if flattened:
            return output
        sizes = [operator.out_channels, *(1,) * len(operator.axes)]
        return self._graph.call_function(_aten.unflatten.int, (output, 1, sizes))

    def _bordered(self, element: BorderCorrected, value: Node, shape: Sequence[int]) -> Node:
        output = self._operator(element.interior, value)
        first = len(shape) - len(element.interior.axes)
        for strip in element.strips:
            axis = first + strip.axis
            cut = list(shape)
            cut[axis] = strip.input[1] - strip.input[0]
            border = self.lower(element.chain, self._slice(value, axis, strip.input), cut)
            kept = self._slice(border, axis, strip.kept)
            self._graph.call_function(_aten.copy_.default, (self._slice(output, axis, strip.output), kept))
        return output

    def _slice(self, value: Node, axis: int, positions: tuple[int, int]) -> Node:
        return self._graph.call_function(_aten.slice.Tensor, (value, axis, *positions))

    def _masked(self, element: TapBiased, value: Node) -> Node:
        operator = element.operator
        if self._like.is_cuda and len(operator.axes) == 2 and operator.groups == 1 and _is_symmetric(operator):
            tensors = (self._constant(operator.weight), self._constant(operator.bias), self._constant(element.tap_bias))
            arguments = (value, *tensors, None, *_geometry(operator), "identity", False, "auto")
            both = self._graph.call_function(torch.ops.fastentropy_kernels.conv_bordered.default, arguments)
            return self._graph.call_function(getitem, (both, 0))
        output = self._operator(operator, value)
        channels = self._like.ndim - len(operator.axes) - 1
        image = self._slice(value, channels, (0, 1))
        image = self._slice(image, 0, (0, 1)) if channels else image
        ones = self._graph.call_function(_aten.ones_like.default, (image,))
        return self._graph.call_function(_aten.add_.Tensor, (output, self._operator(element.mask, ones)))

    def _kernel(self, element: FusedPair, value: Node) -> Node:
        first, second = element.first, element.second
        residual = value if element.adds_input else None
        weights = [second.dense_weight().flatten(1), second.bias]
        if element.name == "linear_pair":
            tensors = map(self._constant, (first.dense_weight(), first.bias, *weights))
            arguments: tuple[Any, ...] = (value, *tensors, residual, "identity", "auto")
        else:
            tensors = map(self._constant, (first.weight, first.bias, *weights))
            arguments = (value, *tensors, residual, *_geometry(first), "identity", "auto")
        operator = getattr(torch.ops.fastentropy_kernels, element.name).default
        return self._graph.call_function(operator, arguments)

    def _bias(self, operator: AffineOperator) -> Node | None:
        return self._constant(operator.bias) if operator.bias.ndim == 1 and operator.bias.any() else None

    def _constant(self, tensor: Tensor) -> Node:
        name = f"{self._prefix}_{len(self.tensors)}"
        self.tensors[name] = like_format(tensor.to(self._like), self._like)
        return self._graph.create_node("get_attr", name)


def compile_chain(chain: Chain, like: Tensor) -> GraphModule:
    """A chain as a module of its own that runs just as it will inside a fused model."""
    graph = Graph()
    lowering = Lowering(graph, like, "operator")
    graph.output(lowering.lower(chain, graph.placeholder("x"), like.shape))
    return GraphModule({**lowering.tensors, **lowering.modules}, graph)


def _is_symmetric(operator: AffineOperator) -> bool:
    return all(axis.before == axis.after >= 0 and axis.upsampling == 1 for axis in operator.axes)


def _geometry(operator: AffineOperator) -> list[Any]:
    """Stride, padding, dilation and groups, as operators take them."""
    padding = [axis.before for axis in operator.axes]
    return [list(operator.stride), padding, list(operator.dilation), operator.groups]


def _covers(operator: AffineOperator, shape: Sequence[int]) -> bool:
    """Whether an operator reads its whole input once, each value with a weight of its own."""
    if not operator.axes or len(shape) != len(operator.axes) + 2 or operator.groups > 1 or operator.bias.ndim > 1:
        return False
    plain = all(axis == Axis(axis.kernel, axis.stride) for axis in operator.axes)
    return plain and operator.kernel == tuple(shape[2:])
