"""Compute activations that treat each neuron by itself as cheaply as their operators allow.

Such an activation is traced to `where(is_active, act(x), where(is_linear, x, values))`, with constant masks.
"""

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.nodes import is_overwritten, mutates, overwrites, same_sizes, shape_of
from fastentropy.fusion.neurons.elementwise import functional

_aten = torch.ops.aten

#: How the names of the bounds begin that take the place of masks.
BOUNDS_PREFIX = "fastentropy_bounds_"

#: Activations that only limit their input, with the default limits.
_LIMITS: dict[Any, tuple[float, float]] = {
    _aten.relu.default: (0.0, torch.inf),
    _aten.relu6.default: (0.0, 6.0),
    _aten.hardtanh.default: (-1.0, 1.0),
}

#: Operators that limit each channel from below and from above.
_BOUNDS = (_aten.clamp_min.Tensor, _aten.clamp_max.Tensor)

#: Casts to the dtype of the activation. They do nothing if the value has it.
_CASTS = {_aten.to.dtype}


def mask_of(node: Node, module: GraphModule) -> Tensor | None:
    """Return the mask of a node that chooses between two values channel by channel, and None for every other node."""
    if node.target != _aten.where.self or not isinstance(node.args[0], Node) or node.args[0].op != "get_attr":
        return None
    mask: Tensor = attrgetter(str(node.args[0].target))(module)
    return mask.detach() if mask.dtype == torch.bool and mask.numel() == max(mask.shape, default=1) else None


def masks_of(node: Node, module: GraphModule) -> tuple[Tensor, Tensor] | None:
    """Return the masks of the active and of the linear neurons, if a node is the output of an activation with such masks."""
    active = mask_of(node, module)
    linear = None if active is None else mask_of(_operands(node)[1], module)
    return None if active is None or linear is None or active.shape != linear.shape else (active, linear)


def is_cheap(node: Node) -> bool:
    """Return whether a node takes no more time than limits: it is a limit, a choice, or no elementwise operator."""
    is_elementwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return not is_elementwise or node.target in _LIMITS or node.target == _aten.where.self


def lower_masks(module: GraphModule) -> None:
    """Replace masks in a graph by something cheaper, in place, where that does not change the value.

    A mask that is the same for all channels needs no choice. A ReLU of some channels is a lower bound for each channel.

    Args:
        module: the graph, which may be changed. The new nodes have no example of their value.
    """
    for node in module.graph.find_nodes(op="call_function", target=_aten.where.self):
        mask = mask_of(node, module)
        if mask is None or not all(isinstance(value, Node) and _is_unchanged(value) for value in node.args[1:]):
            continue
        with module.graph.inserting_before(node):
            result = _chosen(node, mask, module)
            if result is node:
                continue
            if any(user.op == "output" or overwrites(user, node) for user in node.users):
                result = module.graph.call_function(_aten.clone.default, (result,))
                result.meta = dict(node.meta)
            node.replace_all_uses_with(result)
    module.graph.eliminate_dead_code()


def _is_unchanged(value: Node) -> bool:
    """Return whether no node overwrites a value that others read, after replacing those by what they compute."""
    for user in value.users:
        if mutates(user) and user.args[0] is value and (target := functional(user)):
            user.target = target
    return not is_overwritten(value)


def _chosen(node: Node, mask: Tensor, module: GraphModule) -> Node:
    """Return the node of the value that a node chooses: a new one, one of its operands, or the node itself."""
    active, others = _operands(node)
    if bool(mask.all()) and _is_alike(node, active):
        return active
    if not bool(mask.any()) and _is_alike(node, others):
        return others
    inner_mask = mask_of(others, module)
    if inner_mask is None or inner_mask.shape != mask.shape:
        return node
    linear, constant = _operands(others)
    if not _is_alike(node, linear) or constant.op != "get_attr":
        return node
    values = attrgetter(str(constant.target))(module).detach()
    if active.target in _LIMITS and not active.kwargs and active.args[0] is linear and values.shape == mask.shape:
        return _bounded(node, active, mask, inner_mask, values, module)
    if not bool((mask | inner_mask).all()):
        return node
    result = module.graph.call_function(_aten.where.self, (node.args[0], active, linear))
    result.meta = dict(node.meta)
    return result


def _operands(node: Node) -> tuple[Node, Node]:
    """Return what a node chooses from, without casts that change nothing."""
    active, others = node.args[1:]
    return _without_casts(active), _without_casts(others)


def _without_casts(value: Any) -> Any:
    """Return the operand of casts that change nothing."""
    operand = value.args[0] if value.target in _CASTS else value
    return _without_casts(operand) if operand is not value and _is_alike(value, operand) else value


def _is_alike(node: Node, other: Node) -> bool:
    """Return whether two nodes have values of the same shape and dtype."""
    shapes = shape_of(node), shape_of(other)
    if shapes[0] is None or shapes[1] is None or node.meta["val"].dtype != other.meta["val"].dtype:
        return False
    return same_sizes(shapes[0], shapes[1])


def _bounded(node: Node, active: Node, mask: Tensor, linear: Tensor, values: Tensor, module: GraphModule) -> Node:
    """Append what limits each channel by bounds of its own, in the place of a node that chooses.

    Args:
        node: the node.
        active: the activation, which limits its input.
        mask: True for the channels that it computes.
        linear: True for the channels, among the others, that are not limited.
        values: the values of the remaining channels: their lower and upper bound.
        module: the graph.
    """
    value = active.all_input_nodes[0]
    limits: Any = (*active.args[1:], *_LIMITS[active.target][len(active.args) - 1 :])
    for target, limit, none in zip(_BOUNDS, limits, (-torch.inf, torch.inf), strict=True):
        bound = values.masked_fill(linear, none).masked_fill(mask, limit)
        if not bool((bound == none).all()):
            constant = _added(module, bound.to(node.meta["val"].dtype), node)
            value = module.graph.call_function(target, (value, constant))
            value.meta = dict(node.meta)
    return value


def _added(module: GraphModule, bound: Tensor, node: Node) -> Node:
    """Add a constant to a graph, in the place of a node, and return the node that reads it."""
    name = f"{BOUNDS_PREFIX}{sum(buffer.startswith(BOUNDS_PREFIX) for buffer, _ in module.named_buffers())}"
    module.register_buffer(name, bound)
    constant = module.graph.create_node("get_attr", name)
    constant.meta = {key: value for key, value in node.meta.items() if key != "val"}
    return constant
