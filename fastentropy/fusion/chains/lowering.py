"""Write chains (stretches of linear operators) back into a graph of ATen operators."""

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.aten import AVERAGE_POOLS, CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fastentropy.fusion.chains.elements import (
    Activation,
    BorderCorrected,
    Chain,
    Concatenation,
    Element,
    Flatten,
    FusedPair,
    Sum,
    TapBiased,
    operators,
    output_shape,
)
from fastentropy.fusion.chains.geometry import Axis
from fastentropy.fusion.chains.selections import Selection
from fastentropy.fusion.memory_format import is_matrix, like_format

_aten = torch.ops.aten


class Lowering:
    """Appends chains to a graph at its insertion point, as nodes that call ATen operators.

    Attributes:
        tensors: the constants of the appended operators, by the names under which the graph reads them.
        modules: the appended activations, by the names under which the graph calls them.
    """

    def __init__(self, graph: Graph, like: Tensor, prefix: str, fixed_size: bool = True) -> None:
        """Begin with no tensors and no modules.

        Args:
            graph: the graph to which operators are appended.
            like: a tensor like the chain's input, whose values are not read. The constants get its dtype, device and memory
                format.
            prefix: the first part of the names of the constants.
            fixed_size: whether every input of the chain has the spatial size of `like`.
        """
        self.tensors: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}
        self._graph, self._like, self._prefix, self._fixed_size = graph, like, prefix, fixed_size

    def begin(self, chain: Chain, value: Node) -> Node:
        """Return the node that a chain is to read in place of its source: linear layers read values that are a matrix.

        PyTorch multiplies other values by a constant weight sample by sample.
        """
        if not operators(chain) or operators(chain)[0].axes or is_matrix(self._like):
            return value
        return self._graph.call_function(_aten.contiguous.default, (value,))

    def lower(self, chain: Chain, value: Node, shape: Sequence[int]) -> Node:
        """Append a chain that is applied to the value of a node, and return the node of its output.

        `shape` is the shape of the value in the example.
        """
        elements = list(chain)
        while elements:
            element = elements.pop(0)
            if self._fixed_size and isinstance(element, AffineOperator) and _covers(element, shape):
                value = self._covering_layer(element, value, flattens=elements == [Flatten()])
                elements = [] if elements == [Flatten()] else elements
            else:
                value = self._element(element, value, shape)
            shape = output_shape((element,), shape)
        return value

    def _element(self, element: Element, value: Node, shape: Sequence[int]) -> Node:
        """Append one element; the arguments are as in `lower`."""
        match element:
            case Sum(branches):
                return self._sum(branches, value, shape)
            case Concatenation(branches, axes):
                values = [self.lower(branch, value, shape) for branch in branches]
                return self._graph.call_function(_aten.cat.default, (values, len(shape) - axes - 1))
            case Selection():
                return self._selection(element, value, shape)
            case BorderCorrected():
                return self._border_corrected(element, value, shape)
            case TapBiased():
                return self._tap_biased(element, value)
            case FusedPair():
                return self._fused_pair(element, value)
            case Flatten():
                return self._graph.call_function(_aten.flatten.using_ints, (value, 1))
            case Activation(name, module):
                self.modules[name.replace(".", "_")] = module
                return self._graph.call_module(name.replace(".", "_"), (value,))
            case operator:
                return self._operator(operator, value)

    def _sum(self, branches: tuple[Chain, ...], value: Node, shape: Sequence[int]) -> Node:
        """Append a sum of branches. A branch that only multiplies the input by a number becomes the `alpha` of an addition."""
        total, *others = sorted(branches, key=lambda branch: _number(branch) is not None)
        result = self.lower(total, value, shape)
        for branch in others:
            number = _number(branch)
            if number is None:
                result = self._graph.call_function(_aten.add.Tensor, (result, self.lower(branch, value, shape)))
            else:
                result = self._graph.call_function(_aten.add.Tensor, (result, value), {"alpha": number})
        return result

    def _selection(self, selection: Selection, value: Node, shape: Sequence[int]) -> Node:
        """Append a selection as the operator that it was read from."""
        axes = len(selection.axes)
        for index, size in enumerate(shape[len(shape) - axes :]):
            if self._fixed_size and (read := selection.read_size(index, size)) < size:
                value = self._slice(value, len(shape) - axes + index, (0, read))
        arguments = (self._index(each) if isinstance(each, Tensor) else each for each in selection.arguments)
        return self._graph.call_function(selection.target, (value, *arguments))

    def _operator(self, operator: AffineOperator, value: Node) -> Node:
        """Append an affine operator as a linear layer, a scale with shift, average pooling, or a convolution."""
        if not operator.axes and not operator.is_channelwise:
            weight, bias = self._constant(operator.dense_weight()), self._bias(operator)
            return self._graph.call_function(_aten.linear.default, (value, weight, bias))
        if operator.is_channelwise and operator.has_uniform_bias:
            return self._scale(operator, value)
        if operator.is_average and all(0 <= axis.before == axis.after <= axis.kernel // 2 for axis in operator.axes):
            padding = [axis.before for axis in operator.axes]
            arguments = (value, list(operator.kernel), list(operator.stride), padding)
            return self._graph.call_function(AVERAGE_POOLS[len(padding) - 1], arguments)
        if any(axis.upsampling > 1 for axis in operator.axes):
            return self._transposed_convolution(operator, value)
        return self._convolution(operator, value)

    def _scale(self, operator: AffineOperator, value: Node) -> Node:
        """Append an operator that scales and shifts channels (a batch norm that was not folded) as one `addcmul`."""
        scale, shift = (t.reshape(-1, *(1,) * len(operator.axes)) for t in (operator.weight, operator.bias))
        return self._graph.call_function(_aten.addcmul.default, (self._constant(shift), value, self._constant(scale)))

    def _convolution(self, operator: AffineOperator, value: Node) -> Node:
        """Append a convolution. Padding that differs between the two ends of an axis becomes a separate node."""
        padding = [max(min(axis.before, axis.after), 0) for axis in operator.axes]
        more = [margin - own for axis, own in zip(operator.axes, padding, strict=True) for margin in (axis.before, axis.after)]
        for part in ([max(n, 0) for n in more], [min(n, 0) for n in more]):  # zeros on one side only, then cropping
            if any(part):
                pairs = [part[index : index + 2] for index in range(0, len(part), 2)]
                arguments = (value, [n for pair in reversed(pairs) for n in pair])
                value = self._graph.call_function(_aten.constant_pad_nd.default, arguments)
        geometry: list[Any] = [list(operator.stride), padding, list(operator.dilation), operator.groups]
        operands = (value, self._constant(operator.weight), self._bias(operator), *geometry)
        output = self._graph.call_function(CONVOLUTIONS[len(padding) - 1], operands)
        return self._with_bias_map(operator, output)

    def _transposed_convolution(self, operator: AffineOperator, value: Node) -> Node:
        """Append an operator with upsampling as PyTorch's transposed convolution, whose weight is flipped and transposed."""
        axes, groups = operator.axes, operator.groups
        flipped = operator.weight.flip(tuple(range(2, 2 + len(axes))))
        split = flipped.reshape(groups, -1, *flipped.shape[1:])
        weight = self._constant(split.transpose(1, 2).flatten(0, 1))
        padding = [axis.reach - axis.before for axis in axes]
        more = [axis.after - axis.before for axis in axes]
        geometry: list[Any] = [list(operator.upsampling), padding, more, groups, list(operator.dilation)]
        arguments = (value, weight, self._bias(operator), *geometry)
        return self._with_bias_map(operator, self._graph.call_function(TRANSPOSED_CONVOLUTIONS[len(axes) - 1], arguments))

    def _with_bias_map(self, operator: AffineOperator, output: Node) -> Node:
        """Add a bias that depends on the position (a bias map) to the output of a convolution. Any other bias is already in it.

        The additions are in place, because no other node reads the output.
        """
        for axis, positions, values in operator.border_bias:
            border = self._slice(output, self._like.ndim - len(operator.axes) + axis, positions)
            batched = values if self._like.ndim == values.ndim else values.unsqueeze(0)
            self._graph.call_function(_aten.add_.Tensor, (border, self._constant(batched)))
        if operator.bias.ndim == 1:
            return output
        return self._graph.call_function(_aten.add_.Tensor, (output, self._constant(operator.bias)))

    def _covering_layer(self, operator: AffineOperator, value: Node, flattens: bool) -> Node:
        """Append a convolution whose kernel covers its whole input, as a linear layer of the flattened input.

        `flattens` says whether the chain flattens the output next. If so, the output stays `[batch, features]`.
        """
        features = self._graph.call_function(_aten.flatten.using_ints, (value, 1))
        arguments = (features, self._constant(operator.weight.flatten(1)), self._bias(operator))
        output = self._graph.call_function(_aten.linear.default, arguments)
        if flattens:
            return output
        sizes = [operator.out_channels, *(1,) * len(operator.axes)]
        return self._graph.call_function(_aten.unflatten.int, (output, 1, sizes))

    def _border_corrected(self, element: BorderCorrected, value: Node, shape: Sequence[int]) -> Node:
        """Append a merged operator, and the chain on each strip of its border, which overwrites the output there."""
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
        """Append a slice of the positions [start, stop) along an axis."""
        return self._graph.call_function(_aten.slice.Tensor, (value, axis, *positions))

    def _tap_biased(self, element: TapBiased, value: Node) -> Node:
        """Append a merged operator with a bias per tap.

        On a GPU, a 2-d convolution with one group and equal padding on both sides runs in one kernel. Every other operator is
        followed by a convolution of an image of ones with the tap biases, whose output is added.
        """
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

    def _fused_pair(self, element: FusedPair, value: Node) -> Node:
        """Append two operators as one call of their kernel in `fastentropy_kernels`."""
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
        """Return the node of a bias `[out_channels]`, or None if it is zero or a bias map."""
        return self._constant(operator.bias) if operator.bias.ndim == 1 and operator.bias.any() else None

    def _index(self, tensor: Tensor) -> Node:
        """Add a constant of integers on the device of the example, and return the node that reads it."""
        name = f"{self._prefix}_{len(self.tensors)}"
        self.tensors[name] = tensor.to(self._like.device)
        return self._graph.create_node("get_attr", name)

    def _constant(self, tensor: Tensor) -> Node:
        """Add a constant in the dtype, device and memory format of the example, and return the node that reads it."""
        name = f"{self._prefix}_{len(self.tensors)}"
        self.tensors[name] = like_format(tensor.to(self._like.device, self._like.dtype), self._like)
        return self._graph.create_node("get_attr", name)


def compile_chain(chain: Chain, like: Tensor) -> GraphModule:
    """Compile a chain into a module with the same ATen operators that the chain has inside a fused model.

    Args:
        chain: affine operators and the other elements of a chain.
        like: an example of the chain's input. The constants of the module get its dtype, device and memory format. The
            module may be correct for inputs of its spatial size only.

    Returns:
        A graph of ATen operators with one input.

    Examples:
        >>> import torch
        >>> from fastentropy.fusion.chains import compile_chain, find_chains
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)).eval()
        >>> x = torch.randn(3, 4)
        >>> (found,) = find_chains(torch.export.export(model, (x,)).module())
        >>> compiled = compile_chain(found.elements, x)
        >>> torch.allclose(compiled(x), model(x), atol=1e-6)
        True
    """
    graph = Graph()
    lowering = Lowering(graph, like, "operator")
    graph.output(lowering.lower(chain, lowering.begin(chain, graph.placeholder("x")), like.shape))
    return GraphModule({**lowering.tensors, **lowering.modules}, graph)


def _number(branch: Chain) -> float | None:
    """Return the number by which a branch multiplies its input if it does nothing else, and None otherwise."""
    operator = branch[0] if len(branch) == 1 else None
    if not isinstance(operator, AffineOperator) or not operator.is_channelwise or operator.bias.any():
        return None
    scale = operator.weight.flatten()
    return float(scale[0]) if bool((scale == scale[0]).all()) else None


def _is_symmetric(operator: AffineOperator) -> bool:
    """Return whether an operator pads both ends of each axis equally and has no upsampling."""
    return all(axis.before == axis.after >= 0 and axis.upsampling == 1 for axis in operator.axes)


def _geometry(operator: AffineOperator) -> list[Any]:
    """Return stride, padding, dilation and groups in the order in which convolution operators take them."""
    padding = [axis.before for axis in operator.axes]
    return [list(operator.stride), padding, list(operator.dilation), operator.groups]


def _covers(operator: AffineOperator, shape: Sequence[int]) -> bool:
    """Return whether the kernel of an operator covers its whole input. The operator is then a linear layer of all values.

    `shape` is the shape of the input, `[batch, channels, *spatial]`.
    """
    if (
        isinstance(operator, Selection)
        or not operator.axes
        or len(shape) != len(operator.axes) + 2
        or operator.groups > 1
        or not operator.has_uniform_bias
    ):
        return False
    plain = all(axis == Axis(axis.kernel, axis.stride) for axis in operator.axes)
    return plain and operator.kernel == tuple(shape[2:])
