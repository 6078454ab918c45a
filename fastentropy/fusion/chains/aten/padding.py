"""Read operators that pad positions with zeros, cut positions off, or keep every n-th position."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fastentropy.fusion.chains.aten.affine_node import AffineNode, Reader, affine_in
from fastentropy.fusion.chains.nodes import device_of, shape_of
from fastentropy.fusion.chains.selections import window

_aten = torch.ops.aten


def readers() -> Mapping[Any, Reader]:
    """Return the reader of each operator of this family."""
    return {
        _aten.pad.default: _read_pad,
        _aten.constant_pad_nd.default: _read_pad,
        _aten.slice.Tensor: _read_slice,
        _aten.narrow.default: _read_narrow,
    }


def _read_pad(node: Node, module: GraphModule) -> AffineNode | None:
    """Read padding with zeros, and padding of nothing in every mode. A negative number cuts positions off."""
    operand, numbers, *further = node.args
    given: dict[str, Any] = dict(
        zip(("mode", "value") if node.target == _aten.pad.default else ("value",), further, strict=False)
    )
    given |= node.kwargs
    fixed = [number for number in numbers if isinstance(number, int)] if isinstance(numbers, Sequence) else []
    if not isinstance(numbers, Sequence) or len(fixed) < len(numbers):
        return None
    margins = list(zip(fixed[::2], fixed[1::2], strict=True))[::-1]  # the last axis comes first
    if not any(map(any, margins)):
        return affine_in(operand, None)
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        return None
    axes = len(shape_of(operand) or ()) - 2
    while len(margins) > max(axes, 1) and not any(margins[0]):
        del margins[0]
    if len(margins) > axes:
        return None
    return _window(operand, [(0, 0)] * (axes - len(margins)) + margins, (1,) * axes)


def _read_slice(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a slice of positions."""
    given: list[Any] = [*node.args, *(None, 0, None, None, 1)[len(node.args) :]]
    operand, dim, start, stop, step = given
    if node.kwargs or not all(isinstance(each, int | None) for each in (start, stop)) or not isinstance(step, int):
        return None
    return _positions(operand, dim, slice(start, stop, step))


def _read_narrow(node: Node, module: GraphModule) -> AffineNode | None:
    """Read a number of positions from a fixed one on."""
    operand, dim, start, length = node.args
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return _positions(operand, dim, slice(start, start + length if start >= 0 else start + length or None, 1))


def _positions(operand: Any, dim: Any, positions: slice) -> AffineNode | None:
    """Return the affine node of some positions along a spatial axis, or None if they depend on a free size or are none."""
    shape = shape_of(operand) or ()
    if not isinstance(dim, int) or not dim % max(len(shape), 1) >= 2:
        return None
    size, axis = shape[dim], dim % len(shape) - 2
    if not isinstance(size, int):
        return None
    kept = range(size)[positions]
    if not kept:
        return None
    margins, stride = [(0, 0)] * (len(shape) - 2), [1] * (len(shape) - 2)
    margins[axis], stride[axis] = (-kept.start, min(kept.stop, size) - size), kept.step
    return _window(operand, margins, stride, is_view=True)


def _window(
    operand: Any, margins: Sequence[tuple[int, int]], stride: Sequence[int], is_view: bool = False
) -> AffineNode | None:
    """Return the affine node of positions that are padded or cut off, or None if the number of channels is free.

    Args:
        operand: the node that is padded.
        margins: for each spatial axis, the numbers of zeros before and after. A negative number cuts positions off.
        stride: for each spatial axis, the distance between two positions that are kept.
        is_view: whether the result shares memory with the operand.
    """
    shape = shape_of(operand) or ()
    channels = shape[1] if 3 <= len(shape) <= 5 else None
    if not isinstance(channels, int):
        return None
    device = device_of(operand)
    return affine_in(operand, len(margins), lambda _: window(channels, margins, stride, device), is_view=is_view)
