"""Find the plain tensors that hold the values of an activation's input, because the kernels read only those."""

import torch
from torch import Tensor, nn

#: The dtypes that the kernels read. Values of any other are converted.
COUNTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class UncountableError(Exception):
    """The values of a tensor cannot be counted."""


def is_plain(x: Tensor) -> bool:
    """Return whether `x` is a tensor of PyTorch itself, with a shape and strides."""
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_nested


def plain_parts(x: Tensor, channel_axis: int | None) -> list[tuple[Tensor, int]]:
    """Return the values of a tensor as plain tensors, each with its axis of the neurons.

    A tensor of a usual layout is one part. A nested tensor is one part if its components lie one after the other, otherwise
    one part for each component. No part has values that are not in `x`, such as those in the holes between the components.

    Args:
        x: the input of an activation, which has values.
        channel_axis: the axis of the neurons in `x`. None if all values belong to one neuron.

    Raises:
        UncountableError: `x` has a layout whose values cannot be counted. The message is the end of a sentence.
    """
    if x.is_nested:
        parts, axis = _nested_parts(x, channel_axis)
    elif x.is_mkldnn:
        parts, axis = [x.to_dense()], channel_axis
    elif x.layout is torch.strided:
        parts, axis = [x], channel_axis
    else:
        raise UncountableError(f"is a {str(x.layout).removeprefix('torch.')} tensor")
    parts = [part.detach() if part.dtype in COUNTABLE else part.detach().float() for part in parts]
    return [(part.unsqueeze(-1), -1) if axis is None else (part, axis) for part in parts]


def _nested_parts(x: Tensor, channel_axis: int | None) -> tuple[list[Tensor], int | None]:
    """Return the values of a nested tensor as plain tensors, and the axis of the neurons in each of them.

    The components lack the first axis of `x`. In the values of a jagged tensor, that axis and the one of varying length are
    merged.
    """
    ragged = [axis for axis in range(1, x.ndim) if _is_ragged(x, axis)]
    if channel_axis == 0 or channel_axis in ragged:
        raise UncountableError("is a nested tensor whose channel axis has no fixed size")
    is_whole = x.layout is torch.jagged and x.lengths() is None  # type: ignore[attr-defined]
    axis = None if channel_axis is None else channel_axis - 1
    return [x.values()] if is_whole else list(x.unbind()), axis


def _is_ragged(x: Tensor, axis: int) -> bool:
    """Return whether the components of a nested tensor differ in their size on an axis."""
    try:
        return not isinstance(x.size(axis), int)
    except RuntimeError:  # a strided nested tensor has no size there
        return True
