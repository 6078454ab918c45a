"""GPU: linearised chains in one kernel each. What lies between two operators of a chain stays in registers.

Convolutions are implicit matrix products: a tile of output positions by one of output channels, summed in float32 over
the taps of the kernel and blocks of input channels. Both memory formats are read and written along their fastest axis.
float32 is multiplied exactly, without TF32; 16-bit formats run on the matrix units, and there the values between two
operators are rounded to the format, since the second product takes them so. They still never go to memory.
"""

# Kernels have no types of their own, and Triton none for its decorator.
# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import convolved_size, empty_images, is_channels_last
from .reference import ACTIVATIONS
from .states_triton import INTERPRETED, _activate, _add, _count, _unpack, largest_power_of_2

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def conv_pointwise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pointwise_ptr,
    pointwise_bias_ptr,
    residual_ptr,
    y_ptr,
    positions,
    pixel_multiples,
    y_width,
    geometry,
    weight_strides,
    inputs,
    middles,
    outputs,
    parameters,
    ACTIVATION: tl.constexpr,  # noqa: N803
    KERNEL_HEIGHT: tl.constexpr,  # noqa: N803
    KERNEL_WIDTH: tl.constexpr,  # noqa: N803
    DEPTHWISE: tl.constexpr,  # noqa: N803
    CHANNELS_LAST: tl.constexpr,  # noqa: N803
    PIXEL_MULTIPLE: tl.constexpr,  # noqa: N803
    BLOCK_POSITIONS: tl.constexpr,  # noqa: N803
    BLOCK_OUTPUTS: tl.constexpr,  # noqa: N803
    BLOCK_MIDDLES: tl.constexpr,  # noqa: N803
    BLOCK_INPUTS: tl.constexpr,  # noqa: N803
):
    """One program: BLOCK_POSITIONS positions of y by BLOCK_OUTPUTS of its channels.

    It makes the intermediate BLOCK_MIDDLES channels at a time. Where y has more channels than BLOCK_OUTPUTS, the programs
    that share positions each make the whole intermediate: the convolution is computed once for every block of outputs.
    """
    program, output = _own_channels(outputs, BLOCK_OUTPUTS)
    # A product tells the compiler the alignment of every image.
    pixels = pixel_multiples * tl.full((), PIXEL_MULTIPLE, tl.int32)
    place = _own_positions(program, positions, pixels, y_width, PIXEL_MULTIPLE, BLOCK_POSITIONS)
    sums = tl.zeros((BLOCK_POSITIONS, BLOCK_OUTPUTS), tl.float32)
    for first in range(0, middles, BLOCK_MIDDLES):
        middle = first + tl.arange(0, BLOCK_MIDDLES)
        if DEPTHWISE:
            made = _convolve_depthwise(
                x_ptr,
                weight_ptr,
                None,
                weight_strides,
                place,
                geometry,
                middle,
                middles,
                KERNEL_HEIGHT,
                KERNEL_WIDTH,
                CHANNELS_LAST,
            )
            made = made if CHANNELS_LAST else tl.trans(made)
        else:
            made = _convolve(
                x_ptr,
                weight_ptr,
                weight_strides,
                place,
                geometry,
                middle,
                middles,
                inputs,
                KERNEL_HEIGHT,
                KERNEL_WIDTH,
                CHANNELS_LAST,
                BLOCK_INPUTS,
            )
        if bias_ptr is not None:
            made += tl.load(bias_ptr + middle, mask=middle < middles, other=0).to(tl.float32)[None, :]
        sums = _dot(made.to(x_ptr.dtype.element_ty), _load_transposed(pointwise_ptr, output, outputs, middle, middles), sums)
    values = sums if CHANNELS_LAST else tl.trans(sums)
    _finish(
        values,
        pointwise_bias_ptr,
        residual_ptr,
        y_ptr,
        None,
        place,
        pixels,
        output,
        outputs,
        parameters,
        ACTIVATION,
        CHANNELS_LAST,
    )


@triton.jit
def conv_bordered_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    tap_bias_ptr,
    residual_ptr,
    y_ptr,
    counts_ptr,
    positions,
    pixel_multiples,
    y_width,
    geometry,
    weight_strides,
    inputs,
    outputs,
    parameters,
    ACTIVATION: tl.constexpr,  # noqa: N803
    KERNEL_HEIGHT: tl.constexpr,  # noqa: N803
    KERNEL_WIDTH: tl.constexpr,  # noqa: N803
    DEPTHWISE: tl.constexpr,  # noqa: N803
    CHANNELS_LAST: tl.constexpr,  # noqa: N803
    PIXEL_MULTIPLE: tl.constexpr,  # noqa: N803
    BLOCK_POSITIONS: tl.constexpr,  # noqa: N803
    BLOCK_OUTPUTS: tl.constexpr,  # noqa: N803
    BLOCK_INPUTS: tl.constexpr,  # noqa: N803
):
    """One program: BLOCK_POSITIONS positions of y by BLOCK_OUTPUTS of its channels, and an atomic for each of its counts."""
    program, output = _own_channels(outputs, BLOCK_OUTPUTS)
    # A product tells the compiler the alignment of every image.
    pixels = pixel_multiples * tl.full((), PIXEL_MULTIPLE, tl.int32)
    place = _own_positions(program, positions, pixels, y_width, PIXEL_MULTIPLE, BLOCK_POSITIONS)
    if DEPTHWISE:
        values = _convolve_depthwise(
            x_ptr,
            weight_ptr,
            tap_bias_ptr,
            weight_strides,
            place,
            geometry,
            output,
            outputs,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            CHANNELS_LAST,
        )
    else:
        sums = _convolve(
            x_ptr,
            weight_ptr,
            weight_strides,
            place,
            geometry,
            output,
            outputs,
            inputs,
            KERNEL_HEIGHT,
            KERNEL_WIDTH,
            CHANNELS_LAST,
            BLOCK_INPUTS,
        )
        if tap_bias_ptr is not None:
            sums = _add_tap_bias(sums, tap_bias_ptr, place, geometry, output, outputs, KERNEL_HEIGHT, KERNEL_WIDTH)
        values = sums if CHANNELS_LAST else tl.trans(sums)
    _finish(
        values, bias_ptr, residual_ptr, y_ptr, counts_ptr, place, pixels, output, outputs, parameters, ACTIVATION, CHANNELS_LAST
    )


@triton.jit
def linear_pair_kernel(
    x_ptr,
    weight1_ptr,
    bias1_ptr,
    weight2_ptr,
    bias2_ptr,
    residual_ptr,
    y_ptr,
    rows,
    inputs,
    middles,
    outputs,
    x_row_stride,
    residual_row_stride,
    parameters,
    ACTIVATION: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_OUTPUTS: tl.constexpr,  # noqa: N803
    BLOCK_MIDDLES: tl.constexpr,  # noqa: N803
    BLOCK_INPUTS: tl.constexpr,  # noqa: N803
):
    """One program: BLOCK_ROWS whole rows of y. It makes their intermediate once, then y BLOCK_OUTPUTS at a time."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    middle = tl.arange(0, BLOCK_MIDDLES)
    made = tl.zeros((BLOCK_ROWS, BLOCK_MIDDLES), tl.float32)
    for first in range(0, inputs, BLOCK_INPUTS):
        input = first + tl.arange(0, BLOCK_INPUTS)
        x = _load_tile(x_ptr, row * x_row_stride, inside, input, inputs, 1, True)
        made = _dot(x, _load_transposed(weight1_ptr, middle, middles, input, inputs), made)
    if bias1_ptr is not None:
        made += tl.load(bias1_ptr + middle, mask=middle < middles, other=0).to(tl.float32)[None, :]
    made = made.to(x_ptr.dtype.element_ty)
    for first in range(0, outputs, BLOCK_OUTPUTS):
        output = first + tl.arange(0, BLOCK_OUTPUTS)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), tl.float32)
        values = _dot(made, _load_transposed(weight2_ptr, output, outputs, middle, middles), sums)
        if bias2_ptr is not None:
            values += tl.load(bias2_ptr + output, mask=output < outputs, other=0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            residual = _load_tile(residual_ptr, row * residual_row_stride, inside, output, outputs, 1, True)
            values += residual.to(tl.float32)
        y = _activate(values, ACTIVATION, parameters, 0.0)
        written = inside[:, None] & (output < outputs)[None, :]
        tl.store(y_ptr + row[:, None] * outputs + output[None, :], y.to(y_ptr.dtype.element_ty), mask=written)


@triton.jit
def _own_channels(channels, BLOCK_CHANNELS: tl.constexpr):  # noqa: N803
    """Return which tile of positions this program owns, and its channels. Its neighbours have others of the same positions."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    return program // blocks, program % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)


@triton.jit
def _own_positions(
    program,
    positions,
    pixels,
    y_width,
    PIXEL_MULTIPLE: tl.constexpr,  # noqa: N803
    BLOCK_POSITIONS: tl.constexpr,  # noqa: N803
):
    """Return the image (64 bits), pixel, row and column of each position of the tile, and whether there is one."""
    first = program * BLOCK_POSITIONS
    lane = tl.arange(0, BLOCK_POSITIONS)
    # One division of 64 bits for all: those of a lane are of 32.
    pixel = (first % pixels).to(tl.int32) + lane
    image = first // pixels + pixel // pixels
    pixel = pixel % pixels
    row, column = pixel // y_width, pixel % y_width
    # Images and tiles begin at multiples, which the compiler does not see through the division.
    pixel = tl.max_contiguous(tl.multiple_of(pixel, PIXEL_MULTIPLE), PIXEL_MULTIPLE)
    image = tl.max_constancy(image, PIXEL_MULTIPLE)
    inside = tl.max_constancy(first + lane < positions, PIXEL_MULTIPLE)
    return image, pixel, row, column, inside


@triton.jit
def _tap(place, geometry, tap_row, tap_column):
    """Return where each position of the tile finds a tap in x, without the channel, and whether that is inside."""
    image, _, row, column, inside = place
    x_size, x_strides, stride, padding, dilation = geometry
    x_row = row * stride[0] - padding[0] + tap_row * dilation[0]
    x_column = column * stride[1] - padding[1] + tap_column * dilation[1]
    inside = inside & (x_row >= 0) & (x_row < x_size[0]) & (x_column >= 0) & (x_column < x_size[1])
    offset = image * x_strides[0] + x_row.to(tl.int64) * x_strides[2] + x_column.to(tl.int64) * x_strides[3]
    return offset, inside


@triton.jit
def _convolve(
    x_ptr,
    weight_ptr,
    weight_strides,
    place,
    geometry,
    channel,
    channels,
    inputs,
    KERNEL_HEIGHT: tl.constexpr,  # noqa: N803
    KERNEL_WIDTH: tl.constexpr,  # noqa: N803
    CHANNELS_LAST: tl.constexpr,  # noqa: N803
    BLOCK_INPUTS: tl.constexpr,  # noqa: N803
):
    """Return the sums [positions, channels] over taps and inputs, in one loop over both so that its loads run ahead."""
    sums = tl.zeros((place[0].shape[0], channel.shape[0]), tl.float32)
    blocks = tl.cdiv(inputs, BLOCK_INPUTS)
    for step in range(KERNEL_HEIGHT * KERNEL_WIDTH * blocks):
        tap = step // blocks
        tap_row, tap_column = tap // KERNEL_WIDTH, tap % KERNEL_WIDTH
        input = step % blocks * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        offset, inside = _tap(place, geometry, tap_row, tap_column)
        x = _load_tile(x_ptr, offset, inside, input, inputs, geometry[1][1], CHANNELS_LAST)
        tap_ptr = weight_ptr + tap_row * weight_strides[2] + tap_column * weight_strides[3]
        weight = tl.load(
            tap_ptr + input[:, None] * weight_strides[1] + channel[None, :].to(tl.int64) * weight_strides[0],
            mask=(input < inputs)[:, None] & (channel < channels)[None, :],
            other=0,
        )
        sums = _dot(x if CHANNELS_LAST else tl.trans(x), weight, sums)
    return sums


@triton.jit
def _convolve_depthwise(
    x_ptr,
    weight_ptr,
    tap_bias_ptr,
    weight_strides,
    place,
    geometry,
    channel,
    channels,
    KERNEL_HEIGHT: tl.constexpr,  # noqa: N803
    KERNEL_WIDTH: tl.constexpr,  # noqa: N803
    CHANNELS_LAST: tl.constexpr,  # noqa: N803
):
    """Return the sums over taps in the order of memory: [positions, channels] or [channels, positions]."""
    positions, channels_axis = _spread(place[0], channel, CHANNELS_LAST)
    sums = tl.zeros((positions + channels_axis).shape, tl.float32)
    for tap_row in range(KERNEL_HEIGHT):
        for tap_column in range(KERNEL_WIDTH):
            offset, inside = _tap(place, geometry, tap_row, tap_column)
            x = _load_tile(x_ptr, offset, inside, channel, channels, geometry[1][1], CHANNELS_LAST).to(tl.float32)
            tap_ptr = weight_ptr + tap_row * weight_strides[2] + tap_column * weight_strides[3]
            weight = tl.load(tap_ptr + channel * weight_strides[0], mask=channel < channels, other=0).to(tl.float32)
            inside, weight = _spread(inside, weight, CHANNELS_LAST)
            sums += x * weight
            if tap_bias_ptr is not None:
                tap = channel * (KERNEL_HEIGHT * KERNEL_WIDTH) + tap_row * KERNEL_WIDTH + tap_column
                tap_bias = tl.load(tap_bias_ptr + tap, mask=channel < channels, other=0).to(tl.float32)
                sums += tl.where(inside, _spread(place[0], tap_bias, CHANNELS_LAST)[1], 0.0)
    return sums


@triton.jit
def _add_tap_bias(
    sums,
    tap_bias_ptr,
    place,
    geometry,
    channel,
    channels,
    KERNEL_HEIGHT: tl.constexpr,  # noqa: N803
    KERNEL_WIDTH: tl.constexpr,  # noqa: N803
):
    """Add what the taps inside of the image add, as a matrix product: which taps are inside, 0 or 1, by `tap_bias`."""
    taps: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    image, pixel, row, column, inside = place
    place = (image[:, None], pixel[:, None], row[:, None], column[:, None], inside[:, None])
    for first in range(0, taps, 16):
        tap = first + tl.arange(0, 16)
        _, reached = _tap(place, geometry, (tap // KERNEL_WIDTH)[None, :], (tap % KERNEL_WIDTH)[None, :])
        tap_bias = _load_transposed(tap_bias_ptr, channel, channels, tap, taps)
        sums = _dot(reached.to(tl.float32).to(tap_bias.dtype), tap_bias, sums)
    return sums


@triton.jit
def _finish(
    values,
    bias_ptr,
    residual_ptr,
    y_ptr,
    counts_ptr,
    place,
    pixels,
    channel,
    channels,
    parameters,
    ACTIVATION: tl.constexpr,  # noqa: N803
    CHANNELS_LAST: tl.constexpr,  # noqa: N803
):
    """Add bias and residual, count the states of what y's dtype makes of that, and write its activation."""
    image, pixel, _, _, inside = place
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
        values += _spread(pixel, bias, CHANNELS_LAST)[1]
    if CHANNELS_LAST:
        offset = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    else:
        offset = (image * channels)[None, :] * pixels + channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    inside, known = _spread(inside, channel < channels, CHANNELS_LAST)
    written = inside & known
    if residual_ptr is not None:
        values += tl.load(residual_ptr + offset, mask=written, other=0).to(tl.float32)
    if counts_ptr is not None:
        rounded = tl.where(written, values.to(y_ptr.dtype.element_ty).to(tl.float32), float("nan"))
        _add_tile_counts(counts_ptr, rounded, channel, channels, 0 if CHANNELS_LAST else 1)
    y = _activate(values, ACTIVATION, parameters, 0.0)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=written)


@triton.jit
def _add_tile_counts(counts_ptr, x, channel, channels, AXIS: tl.constexpr):  # noqa: N803
    """Add the states of a tile, over AXIS, to `counts_ptr` [channels, 3]. It is short: its three counts fit in one sum."""
    counts = tl.sum(_count((tl.zeros(x.shape, tl.int32),), x, (), 1, 0)[0], AXIS)
    for state in tl.static_range(3):
        _add(counts_ptr + channel * 3 + state, _unpack(counts, (1, 2, 0)[state]), channel < channels)


@triton.jit
def _spread(along_positions, along_channels, CHANNELS_LAST: tl.constexpr):  # noqa: N803
    """See two vectors as the axes of a tile in the order of memory, whose last axis is the fastest."""
    if CHANNELS_LAST:
        return along_positions[:, None], along_channels[None, :]
    else:
        return along_positions[None, :], along_channels[:, None]


@triton.jit
def _load_tile(pointer, offset, inside, channel, channels, channel_stride, CHANNELS_LAST: tl.constexpr):  # noqa: N803
    """Load positions by channels in the order of memory; what lies outside reads as 0, which adds nothing."""
    offset, along_channels = _spread(offset, channel.to(tl.int64) * channel_stride, CHANNELS_LAST)
    inside, known = _spread(inside, channel < channels, CHANNELS_LAST)
    return tl.load(pointer + offset + along_channels, mask=inside & known, other=0)


@triton.jit
def _load_transposed(pointer, row, rows, column, columns):
    """Load a tile of a contiguous matrix [rows, columns] as [column, row]."""
    return tl.load(
        pointer + column[:, None] + row[None, :].to(tl.int64) * columns,
        mask=(column < columns)[:, None] & (row < rows)[None, :],
        other=0,
    )


@triton.jit
def _dot(left, right, sums):
    """Add the matrix product in float32."""
    if _INTERPRETED:  # which would multiply the bit patterns of bfloat16
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


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
