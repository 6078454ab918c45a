"""Read operators that choose, permute or repeat channels or positions, and change no value."""

from collections.abc import Callable, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader
from fastentropy.fusion.chains.nodes import SPLITS, constant_index, device_of, shape_of
from fastentropy.fusion.chains.selections import (
    NEAREST,
    Selection,
    is_exact_factor,
    pixel_shuffle,
    pixel_unshuffle,
    repeated_positions,
    selected_channels,
)

_aten = torch.ops.aten

#: Choices along one axis, which is the second argument, or the first of a list that is the second argument.
_CHOICES = (
    *(_aten.slice.Tensor, _aten.narrow.default, _aten.flip.default, _aten.roll.default),
    _aten.repeat_interleave.self_int,
)
_SHUFFLES = (_aten.channel_shuffle.default, _aten.native_channel_shuffle.default)
_REPETITIONS = (_aten.repeat.default, _aten.tile.default)
_CONCATENATIONS = (_aten.cat.default, _aten.concat.default, _aten.concatenate.default)


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {
        **dict.fromkeys(_CHOICES, _read_choice),
        **dict.fromkeys(_SHUFFLES, _read_channel_shuffle),
        **dict.fromkeys(_REPETITIONS, _read_repetition),
        **dict.fromkeys(_CONCATENATIONS, _read_repeated_value),
        **dict.fromkeys(NEAREST, _read_nearest),
        _aten.index.Tensor: _read_index,
        _aten.index_select.default: _read_index_select,
        _aten.pixel_shuffle.default: _read_pixel_shuffle,
        _aten.pixel_unshuffle.default: _read_pixel_unshuffle,
        getitem: _read_part,
    }


def read_concatenation(node: Node) -> tuple[list[Node], int] | None:
    """Read a concatenation of several values. Returns the values and the axis, counted from 0; None for any other node."""
    if node.target not in _CONCATENATIONS or not isinstance(node.args[0], Sequence):
        return None
    values, shape = [value for value in node.args[0] if isinstance(value, Node)], shape_of(node)
    dim = _argument(node, 1, "dim", 0)
    if shape is None or len(values) < len(node.args[0]) or not isinstance(dim, int):
        return None
    return values, dim % len(shape)


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    """Return an argument of a node that may be given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _channels(operand: Node, dim: int) -> tuple[int, int] | None:
    """Return the size of an axis that may hold channels, and the number of axes behind it; None for any other axis.

    Axis 1 may hold channels, and the last axis of a value with up to three axes.
    """
    shape = shape_of(operand) or ()
    dim = dim % max(len(shape), 1)
    if not (dim == 1 or (dim == len(shape) - 1 and 1 <= len(shape) <= 3)) or dim >= len(shape):
        return None
    channels = shape[dim]
    return (channels, len(shape) - dim - 1) if isinstance(channels, int) and len(shape) - dim <= 4 else None


def _chosen(operand: Any, dim: int, choose: Callable[[Tensor], Tensor], view: bool = False) -> AffineNode | None:
    """Return the affine node of a choice of channels.

    Args:
        operand: the node that is chosen from.
        dim: the axis of the channels.
        choose: applies the choice to a tensor that has the channels in this axis, and all other axes of size 1.
        view: whether the result shares memory with the operand.
    """
    if not isinstance(operand, Node) or (found := _channels(operand, dim)) is None:
        return None
    (channels, axes), dimensions = found, len(shape_of(operand) or ())
    sizes = [channels if axis == dim % dimensions else 1 for axis in range(dimensions)]
    index: Tensor = choose(torch.arange(channels, device="cpu").reshape(sizes)).flatten()
    if torch.equal(index, torch.arange(channels, device="cpu")):
        return AffineNode(operand, None)
    if not len(index):
        return None
    device = device_of(operand)

    def build(_: int) -> Selection:
        return selected_channels(index.to(device), channels, axes, has_batch=dimensions == axes + 2)

    return AffineNode(operand, axes, build, is_view=view)


def _read_choice(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a slice, a flip, a rotation or a repetition along the axis of the channels, with fixed numbers."""
    target: Any = node.target
    position = 2 if target in (_aten.roll.default, _aten.repeat_interleave.self_int) else 1
    dim, further = node.args[position] if len(node.args) > position else None, node.args[1:]
    if isinstance(dim, Sequence) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or node.kwargs or any(isinstance(each, Node) for each in further):
        return None
    is_view = target in (_aten.slice.Tensor, _aten.narrow.default)
    return _chosen(node.args[0], dim, lambda x: target(x, *further), is_view)


def _read_index(node: Node, module: GraphModule) -> AffineNode | None:
    """Read an index with one constant, such as `x[:, index]`."""
    indices = node.args[1]
    given = [(dim, each) for dim, each in enumerate(indices) if each is not None] if isinstance(indices, Sequence) else []
    return _indexed(node.args[0], *given[0], module) if len(given) == 1 else None


def _read_index_select(node: Node, module: GraphModule) -> AffineNode | None:
    """Read `index_select` with a constant."""
    operand, dim, index = node.args
    return _indexed(operand, dim, index, module)


def _indexed(operand: Any, dim: Any, index: Any, module: GraphModule) -> AffineNode | None:
    """Return the affine node of an index along one axis, or None if the index is not a constant with one axis."""
    value = constant_index(index, module)
    if value is None or value.ndim != 1 or not isinstance(dim, int):
        return None
    return _chosen(operand, dim, lambda x: x.flatten()[value.cpu()])


def _read_channel_shuffle(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a channel shuffle."""
    groups: Any = node.args[1]
    return _chosen(node.args[0], 1, lambda x: x.reshape(groups, -1).T.flatten())


def _read_repetition(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a repetition of all channels, one after the other."""
    operand, repeats = node.args[:2]
    counts = [count for count in repeats if isinstance(count, int)] if isinstance(repeats, Sequence) else []
    longer = [dim for dim, count in enumerate(counts) if count != 1]
    if len(counts) != len(shape_of(operand) or ()) or len(longer) > 1:
        return None
    dim = longer[0] if longer else min(1, len(counts) - 1)
    return _chosen(operand, dim, lambda x: x.flatten().repeat(counts[dim]))


def _read_repeated_value(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a concatenation of a value with itself."""
    concatenation = read_concatenation(node)
    if concatenation is None or len(set(concatenation[0])) != 1:
        return None
    (first, *others), dim = concatenation
    return _chosen(first, dim, lambda x: x.flatten().repeat(1 + len(others)))


def _read_part(node: Node, module: GraphModule) -> AffineNode | None:
    """Read one of the parts into which channels are split."""
    split, number = node.args
    if not isinstance(split, Node) or split.target not in SPLITS or not node.users or not isinstance(number, int):
        return None
    sizes, dim = split.args[1], _argument(split, 2, "dim", 0)
    is_fixed = isinstance(sizes, int) or (isinstance(sizes, Sequence) and all(isinstance(size, int) for size in sizes))
    if not isinstance(dim, int) or not is_fixed:
        return None
    target: Any = split.target
    return _chosen(split.args[0], dim, lambda x: target(x, sizes, dim)[number], view=True)


def _read_pixel_shuffle(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a pixel shuffle."""
    operand, factor = node.args
    shape = shape_of(node) or ()
    channels: Any = shape[-3] if len(shape) >= 3 else None
    if not isinstance(operand, Node) or not isinstance(factor, int) or not isinstance(channels, int):
        return None
    device = device_of(operand)
    return AffineNode(operand, 2, lambda _: pixel_shuffle(channels, factor, device))


def _read_pixel_unshuffle(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a pixel unshuffle."""
    operand, factor = node.args
    shape = shape_of(operand) or ()
    channels: Any = shape[-3] if len(shape) >= 3 else None
    if not isinstance(operand, Node) or not isinstance(factor, int) or not isinstance(channels, int):
        return None
    device = device_of(operand)
    return AffineNode(operand, 2, lambda _: pixel_unshuffle(channels, factor, device))


def _read_nearest(node: Node, module: GraphModule) -> AffineNode | None:
    """Read nearest upsampling that repeats each position a whole number of times."""
    operand, scales = node.args[0], node.args[2]
    before, after = shape_of(operand) or (), shape_of(node) or ()
    axes, channels = len(before) - 2, before[1] if len(before) > 2 else None
    if not isinstance(operand, Node) or not isinstance(channels, int):
        return None
    factors = [_factor(*each) for each in zip(before[2:], after[2:], scales or [None] * axes, strict=True)]  # type: ignore[arg-type]
    if not all(factors):
        return None
    device, whole = device_of(operand), [factor for factor in factors if factor]
    if whole == [1] * axes:
        return AffineNode(operand, None)
    return AffineNode(operand, axes, lambda _: repeated_positions(channels, whole, device))


def _factor(before: int | torch.SymInt, after: int | torch.SymInt, scale: Any) -> int | None:
    """Return how often nearest upsampling repeats each position along an axis; None if this is no fixed, whole number.

    Args:
        before: the number of positions before.
        after: the number of positions afterwards.
        scale: the given factor, or None if the size is given.
    """
    if isinstance(before, int) and isinstance(after, int):
        exact = after % before == 0 and scale in (None, after // before) and is_exact_factor(after // before, after)
        return after // before if exact else None
    is_power_of_two = scale in (1.0, 2.0, 4.0, 8.0, 16.0)
    return int(scale) if is_power_of_two else None
