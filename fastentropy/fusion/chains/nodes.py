"""Read what a traced graph notes about a node: its shape, dtype and device, its constant arguments, and the module it is from.

These facts do not depend on what the operator of the node computes.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter, getitem
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, statically_known_true

from fastentropy._compat import operator_schema

#: The size of an axis: a number if the trace fixed it, and symbolic if it is free.
Size: TypeAlias = int | torch.SymInt

#: The key of the path of the module whose weight a constant is, in the notes on a node that reads a computed constant.
WEIGHT_OF = "fastentropy_weight_of"

#: The names of tensors from which PyTorch computes a weight: under weight norm, spectral norm and pruning.
_PARTS_OF_WEIGHTS = ("weight", "weight_orig", "weight_mask", "weight_g", "weight_v", "weight_u")


class FreeSizeError(ValueError):
    """A size that is free where a chain needs a number. The chain is then given up."""


#: What is raised where a chain needs a number and the trace has a size that is free, or follows from the data.
FREE_SIZE_ERRORS = (FreeSizeError, GuardOnDataDependentSymNode)


def shape_of(node: Any) -> tuple[Size, ...] | None:
    """Return the shape of the tensor that a node computes, or None if it computes no tensor.

    A size is an int if the trace fixed it, and symbolic if it is free.
    """
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        return None
    return tuple(map(_as_size, value.shape))


def fixed_size(size: int | torch.SymInt) -> int | None:
    """Return a size as an int if the trace fixed it, or None if the size is free.

    A symbolic size is fixed if the conditions of the trace leave only one value for it.
    """
    return size if isinstance(size, int) else size.node.maybe_as_int()


def known(size: Size) -> int:
    """Return a size as an int.

    Raises:
        FreeSizeError: the trace did not fix it.
    """
    if (fixed := fixed_size(size)) is None:
        raise FreeSizeError(f"the size {size} is free")
    return fixed


def same_size(left: Size, right: Size) -> bool:
    """Return whether two sizes are known to be equal, for every value of the free sizes. No condition is added to the trace."""
    if isinstance(left, int) or isinstance(right, int):
        return isinstance(left, int) and isinstance(right, int) and left == right
    return left.node.expr == right.node.expr or statically_known_true(left == right)


def same_sizes(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Return whether two shapes are known to be equal; see `same_size`."""
    return len(left) == len(right) and all(map(same_size, left, right))


def quotient(size: Size, divisor: Size) -> Size | None:
    """Return how often a size contains another one, or None if it is not known to be a multiple of it."""
    if same_size(divisor, 0) or (isinstance(size, int) and not isinstance(divisor, int)):
        return None
    remainder = size % divisor
    is_multiple = remainder == 0 if isinstance(remainder, int) else statically_known_true(remainder == 0)
    return _as_size(size // divisor) if is_multiple else None


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes."""
    return _as_size(math.prod(sizes))


def _as_size(size: Size) -> Size:
    """Return a size as an int if it is fixed."""
    return size if (fixed := fixed_size(size)) is None else fixed


#: Operators that return several parts of their operand.
SPLITS = (
    *(torch.ops.aten.chunk.default, torch.ops.aten.tensor_split.sections, torch.ops.aten.tensor_split.indices),
    *(torch.ops.aten.split.Tensor, torch.ops.aten.split.sizes, torch.ops.aten.split_with_sizes.default),
)


def readers_of(node: Node) -> set[Node]:
    """Return the nodes that read the value of a node. In place of an operator that splits it, these are the parts in use."""
    return {reader for user in node.users for reader in (used_parts(user) if user.target in SPLITS else (user,))}


def used_parts(split: Node) -> set[Node]:
    """Return the parts that an operator splits its operand into, without those that no node reads."""
    return {part for part in split.users if part.users}


def constant_index(argument: Any, module: GraphModule) -> Tensor | None:
    """Return the value of an argument if it is a constant of the model that holds integers, and None otherwise."""
    while isinstance(argument, Node) and argument.target == torch.ops.aten.lift_fresh_copy.default:
        argument = argument.args[0]
    if not (isinstance(argument, Node) and argument.op == "get_attr") or is_overwritten(argument):
        return None
    value = attrgetter(str(argument.target))(module)
    is_index = isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in (torch.int64, torch.int32)
    return value.detach() if is_index else None


def constant(argument: Any, module: GraphModule) -> Tensor | None:
    """Return the value of an argument if it is a constant of the model and a dense, real floating-point tensor.

    Returns None for every other argument.
    """
    if not (isinstance(argument, Node) and argument.op == "get_attr"):
        return None
    value = attrgetter(str(argument.target))(module)
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided and value.is_floating_point()
    return value.detach() if is_dense else None


def arguments(node: Node, *tensors: str, module: GraphModule) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the arguments of a node by name, and some of its tensors.

    Args:
        node: the node.
        *tensors: names of the arguments that must be constants, if they are given.
        module: the traced model, which holds the constants.

    Returns:
        All arguments by name, and the values of `tensors` by name, in their own dtype and without the arguments that are None.
        None if one of `tensors` is not a constant.
    """
    normalized = node.normalized_arguments(module, normalize_to_only_use_kwargs=True)
    assert normalized is not None
    values = dict(normalized.kwargs)
    found = {name: constant(values[name], module) for name in tensors if values.get(name) is not None}
    if any(value is None for value in found.values()):
        return None
    return values, {name: value for name, value in found.items() if value is not None}


def weight_owner(name: str) -> str:
    """Return the path of the module whose weight a tensor is, or is part of; the name itself for any other tensor.

    Args:
        name: the name of a parameter or a buffer of the model.
    """
    parts = name.split(".")
    if "parametrizations" in parts:
        index = parts.index("parametrizations")
        parts = [*parts[:index], parts[index + 1]]
    is_weight = len(parts) > 1 and parts[-1] in _PARTS_OF_WEIGHTS
    return ".".join(parts[:-1] if is_weight else parts)


def module_path(node: Node) -> str:
    """Return the path of the module whose forward calls the operator of a node; empty for the traced model itself."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def device_of(operand: Any) -> torch.device:
    """Return the device of the tensor that a node computes."""
    device: torch.device = operand.meta["val"].device
    return device


def same_dtype(node: Node, operand: Any) -> bool:
    """Return whether the tensors of two nodes have the same dtype."""
    return bool(node.meta["val"].dtype == operand.meta["val"].dtype)


def is_overwritten(node: Node) -> bool:
    """Return whether an in-place operator overwrites the value of a node, and further nodes read the value.

    The chain must not change the order of these reads and writes.
    """
    base = base_of(node)
    return len(list(_readers_through_views(base))) > 1 and any(overwrites(user, base) for user in base.users)


def _readers_through_views(node: Node) -> Iterator[Node]:
    """Yield the nodes that read the memory of a node. A view of it is no reader, but the readers of the view are."""
    for user in node.users:
        if is_view(user) and user.users:
            yield from _readers_through_views(user)
        else:
            yield user


def base_of(node: Node) -> Node:
    """Return the node whose memory a view shares, or the node itself if it is not a view."""
    while node.args and isinstance(node.args[0], Node) and is_view(node):
        node = node.args[0]
    return node


def overwrites(user: Node, node: Node) -> bool:
    """Return whether `user` overwrites the value of `node`, directly or through a view."""
    if mutates(user):
        return user.args[0] is node
    return is_view(user) and any(overwrites(other, user) for other in user.users)


def mutates(node: Node) -> bool:
    """Return whether the operator of a node overwrites one of its operands."""
    schema = operator_schema(node.target)
    return schema is not None and schema.is_mutable


def is_view(node: Node) -> bool:
    """Return whether the output of a node may share memory with its first argument."""
    schema = operator_schema(node.target)
    if schema is not None:
        return not mutates(node) and any(returned.alias_info for returned in schema.returns)
    return node.target is getitem  # one of the views that split or chunk returns
