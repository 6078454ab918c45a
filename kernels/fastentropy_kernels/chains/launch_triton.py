"""GPU: launches of the chain kernels."""

from __future__ import annotations

# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.chains.conv_triton import conv_bordered_kernel, conv_pointwise_kernel
from fastentropy_kernels.chains.linear_triton import linear_pair_kernel
from fastentropy_kernels.layout import convolved_size, empty_images, is_channels_last, largest_power_of_2


class Launch(NamedTuple):
    """How a kernel is tiled: the largest blocks (smaller tensors take smaller ones), and how programs run."""

    positions: int  # of y, or rows
    outputs: int  # channels of y
    middles: int  # channels between the two operators, made at a time
    inputs: int  # channels of x, summed over at a time
    num_warps: int
    num_stages: int


# What bounds a tile are the registers of a thread, which hold its sums, and, where values have no neighbours to be moved
# with ("narrow"), an address of 64 bits for each. float32 is multiplied without matrix units, so that a thread
# also holds its factors. That is arithmetic on compiled code (`aot`): nothing here has been measured on a GPU yet.
LAUNCHES = {
    # As many outputs at once as fit (64 sums per thread): each further block of them computes the convolution again.
    "pointwise 16-bit": Launch(positions=64, outputs=256, middles=32, inputs=32, num_warps=8, num_stages=3),
    "pointwise 16-bit narrow": Launch(positions=32, outputs=64, middles=16, inputs=32, num_warps=8, num_stages=3),
    "pointwise float32": Launch(positions=64, outputs=64, middles=16, inputs=16, num_warps=8, num_stages=2),
    "pointwise float32 narrow": Launch(positions=32, outputs=64, middles=16, inputs=16, num_warps=8, num_stages=2),
    "depthwise pointwise 16-bit": Launch(positions=64, outputs=256, middles=32, inputs=1, num_warps=8, num_stages=2),
    "depthwise pointwise 16-bit narrow": Launch(positions=32, outputs=64, middles=32, inputs=1, num_warps=4, num_stages=2),
    "depthwise pointwise float32": Launch(positions=64, outputs=64, middles=32, inputs=1, num_warps=8, num_stages=2),
    # Counting takes as many registers again as the sums.
    "bordered 16-bit": Launch(positions=64, outputs=128, middles=1, inputs=32, num_warps=8, num_stages=3),
    "bordered 16-bit narrow": Launch(positions=32, outputs=64, middles=1, inputs=32, num_warps=8, num_stages=3),
    "bordered float32": Launch(positions=64, outputs=64, middles=1, inputs=16, num_warps=8, num_stages=2),
    "bordered float32 narrow": Launch(positions=32, outputs=64, middles=1, inputs=16, num_warps=8, num_stages=2),
    # One access of 16 bytes per thread and tap: the compiler unrolls the taps of a row, and with two, 5 x 5 do not fit.
    "depthwise bordered 16-bit": Launch(positions=32, outputs=64, middles=1, inputs=1, num_warps=8, num_stages=2),
    "depthwise bordered float32": Launch(positions=32, outputs=64, middles=1, inputs=1, num_warps=8, num_stages=2),
    # The intermediate is made once, whatever the outputs: their blocks only have to fit beside it.
    "linear pair 16-bit": Launch(positions=64, outputs=64, middles=128, inputs=32, num_warps=4, num_stages=3),
    "linear pair 16-bit narrow": Launch(positions=32, outputs=32, middles=128, inputs=32, num_warps=8, num_stages=3),
    "linear pair float32": Launch(positions=32, outputs=32, middles=128, inputs=16, num_warps=8, num_stages=2),
}


# Whose fastest axis is no multiple of this many values is narrow: images of 7 x 7 are, those of 14 x 14 are not.
NARROW = 4


# tl.dot takes no axis below 16.
SMALLEST_BLOCK = 16


def conv_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    launch: Launch | None = None,
) -> Tensor:
    """Return what `chain_reference.conv_pointwise` does. `launch` takes the place of the table's line."""
    outputs, size = pointwise_weight.shape[0], convolved_size(x, weight, stride, padding, dilation)
    y = empty_images(x, outputs, size)
    if y.numel() == 0:
        return y
    x, weight = _arranged_images(x), _arranged_weight(weight, groups)
    kernel = "pointwise" if groups == 1 else "depthwise pointwise"
    launch = launch or _launch(kernel, x, weight.shape[0], _fastest(y))
    constants = _constants(x, weight, y, groups, activation, launch)
    # A launch goes to the current device, which need not be the tensor's. Nothing changes for a CPU tensor.
    with torch.cuda.device_of(x):
        conv_pointwise_kernel[_grid(y, constants)](
            x,
            weight,
            _contiguous(bias),
            _contiguous(pointwise_weight),
            _contiguous(pointwise_bias),
            _as_laid_out(residual, y),
            y,
            y.shape[0] * size[0] * size[1],
            size[0] * size[1] // constants["PIXEL_MULTIPLE"],
            size[1],
            _geometry(x, stride, padding, dilation),
            weight.stride(),
            x.shape[1],
            weight.shape[0],
            outputs,
            _parameters(activation),
            BLOCK_MIDDLES=_block(weight.shape[0], launch.middles),
            **constants,
        )
    return y


def conv_bordered(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tap_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    counts: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """Return what `chain_reference.conv_bordered` does and add to `counts`. `launch` as in `conv_pointwise`."""
    size = convolved_size(x, weight, stride, padding, dilation)
    y = empty_images(x, weight.shape[0], size)
    if y.numel() == 0:
        return y
    x, weight = _arranged_images(x), _arranged_weight(weight, groups)
    launch = launch or _launch("bordered" if groups == 1 else "depthwise bordered", x, _fastest(y))
    constants = _constants(x, weight, y, groups, activation, launch)
    with torch.cuda.device_of(x):
        conv_bordered_kernel[_grid(y, constants)](
            x,
            weight,
            _contiguous(bias),
            _contiguous(tap_bias),
            _as_laid_out(residual, y),
            y,
            counts,
            y.shape[0] * size[0] * size[1],
            size[0] * size[1] // constants["PIXEL_MULTIPLE"],
            size[1],
            _geometry(x, stride, padding, dilation),
            weight.stride(),
            x.shape[1],
            weight.shape[0],
            _parameters(activation),
            **constants,
        )
    return y


def linear_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    launch: Launch | None = None,
) -> Tensor:
    """Return what `chain_reference.linear_pair` does. `launch` as in `conv_pointwise`."""
    outputs, middles, inputs = weight2.shape[0], *weight1.shape
    launch = launch or _launch("linear pair", x, inputs, middles, outputs)
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel() == 0:
        return y
    x_rows = _rows(x)
    residual_rows = None if residual is None else _rows(residual)
    block_rows = _block(x_rows.shape[0], launch.positions)
    with torch.cuda.device_of(x):
        linear_pair_kernel[(triton.cdiv(x_rows.shape[0], block_rows),)](
            x_rows,
            _contiguous(weight1),
            _contiguous(bias1),
            _contiguous(weight2),
            _contiguous(bias2),
            residual_rows,
            y,
            x_rows.shape[0],
            inputs,
            middles,
            outputs,
            x_rows.stride(0),
            0 if residual_rows is None else residual_rows.stride(0),
            _parameters(activation),
            ACTIVATION=activation,
            BLOCK_ROWS=block_rows,
            BLOCK_OUTPUTS=_block(outputs, launch.outputs),
            BLOCK_MIDDLES=_block(middles, launch.middles),
            BLOCK_INPUTS=_block(inputs, launch.inputs),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=True,
        )
    return y


def _launch(kernel: str, x: Tensor, *fastest: int) -> Launch:
    """Choose a line of LAUNCHES for tensors whose fastest axes have these sizes."""
    line = f"{kernel} {'float32' if x.dtype == torch.float32 else '16-bit'}"
    is_narrow = min(map(largest_power_of_2, fastest)) < NARROW
    return LAUNCHES.get(f"{line} narrow", LAUNCHES[line]) if is_narrow else LAUNCHES[line]


def _fastest(y: Tensor) -> int:
    return y.shape[1] if is_channels_last(y) else y.shape[2] * y.shape[3]


def _block(size: int, most: int) -> int:
    block: int = max(SMALLEST_BLOCK, min(triton.next_power_of_2(size), most))
    return block


def _constants(x: Tensor, weight: Tensor, y: Tensor, groups: int, activation: str, launch: Launch) -> dict[str, Any]:
    """Return what a kernel of convolutions is compiled for."""
    pixels = y.shape[2] * y.shape[3]
    return {
        "ACTIVATION": activation,
        "KERNEL_HEIGHT": weight.shape[2],
        "KERNEL_WIDTH": weight.shape[3],
        "DEPTHWISE": groups > 1,
        "CHANNELS_LAST": is_channels_last(x),
        "PIXEL_MULTIPLE": largest_power_of_2(pixels),
        "BLOCK_POSITIONS": _block(y.shape[0] * pixels, launch.positions),
        "BLOCK_OUTPUTS": _block(y.shape[1], launch.outputs),
        "BLOCK_INPUTS": _block(x.shape[1], launch.inputs),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }


def _grid(y: Tensor, constants: dict[str, Any]) -> tuple[int]:
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    blocks: int = triton.cdiv(positions, constants["BLOCK_POSITIONS"]) * triton.cdiv(y.shape[1], constants["BLOCK_OUTPUTS"])
    return (blocks,)


def _geometry(x: Tensor, *steps: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the size and strides of x, and stride, padding and dilation of the convolution."""
    return (tuple(x.shape[2:]), x.stride(), *map(tuple, steps))


def _parameters(activation: str) -> tuple[float, ...]:
    return tuple(ACTIVATIONS[activation].parameters.values())


def _arranged_images(x: Tensor) -> Tensor:
    """Make the fastest axis of images one without gaps, by a copy where it is not: channels, or else columns."""
    x = x.resolve_neg()
    return x if is_channels_last(x) or x.stride(3) == 1 else x.contiguous()


def _arranged_weight(weight: Tensor, groups: int) -> Tensor:
    """Make the inputs, which are summed over, the fastest axis: a weight in channels-last is read where it is."""
    weight = weight.resolve_neg()
    return weight if groups > 1 or weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)


def _as_laid_out(residual: Tensor | None, y: Tensor) -> Tensor | None:
    if residual is None:
        return None
    memory_format = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    return residual.resolve_neg().contiguous(memory_format=memory_format)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _rows(x: Tensor) -> Tensor:
    """View as [rows, features] with the features together, or copy."""
    rows = x.resolve_neg().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
