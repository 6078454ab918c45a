"""GPU: chains that begin with a convolution, each in one kernel. Values between two operators stay in registers.

A convolution is computed as an implicit matrix product. A tile has output positions along one axis and output channels along
the other. Its sums, in float32, run over the taps (elements of the convolution's kernel) and over blocks of input channels.
Images in either memory format are read and written along their fastest axis. The values between two operators are rounded to
the dtype of x, because the second product takes this dtype.

Three arguments are shared by the functions of this file:

- `tile` describes the positions of the program: a tuple of image (int64), pixel, row and column (int32) and inside (bool),
  each `[BLOCK_POSITIONS]`. A position is one pixel of one output image. `inside` is whether the position exists.
- `geometry` describes the convolution: a tuple of the size (height, width) of x, the four strides of x, and the stride,
  padding and dilation of the convolution, each along height and width.
- `weight_strides` are the four strides of the weight, in elements.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from fastentropy_kernels.activations_triton import activate
from fastentropy_kernels.chains.tiles_triton import dot, load_tile, load_transposed, spread
from fastentropy_kernels.counting_triton import atomic_add, count_lanes, unpack


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
    hidden,
    outputs,
    parameters,
    ACTIVATION: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXEL_MULTIPLE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Write activation(pointwise(conv(x) + bias) + pointwise_bias + residual) to y.

    One program computes BLOCK_POSITIONS positions of y for BLOCK_OUTPUTS of its channels. It computes the hidden channels
    BLOCK_HIDDEN at a time. If y has more than BLOCK_OUTPUTS channels, several programs share their positions. Each of them
    computes all hidden channels, so the first convolution is repeated for every block of outputs.

    Args:
        x_ptr: `[batch, inputs, height, width]`, float32, bfloat16 or float16, with the strides in `geometry`. All other
            tensors have its dtype.
        weight_ptr: `[hidden, inputs / groups, KERNEL_HEIGHT, KERNEL_WIDTH]`, with the strides `weight_strides`.
        bias_ptr: `[hidden]`, contiguous, or None.
        pointwise_ptr: `[outputs, hidden]`, contiguous.
        pointwise_bias_ptr: `[outputs]`, contiguous, or None.
        residual_ptr: `[batch, outputs, y height, y_width]`, with the strides of y, or None.
        y_ptr: `[batch, outputs, y height, y_width]`, channels-last if CHANNELS_LAST, otherwise contiguous.
        positions: number of positions of y: batch * y height * y width.
        pixel_multiples: number of pixels of an image of y, divided by PIXEL_MULTIPLE.
        y_width: width of y.
        geometry: see the head of this file.
        weight_strides: see the head of this file.
        inputs: number of channels of x.
        hidden: number of channels between the two convolutions.
        outputs: number of channels of y.
        parameters: tuple of the activation's parameters.
        ACTIVATION: name of the activation.
        KERNEL_HEIGHT: height of the weight.
        KERNEL_WIDTH: width of the weight.
        DEPTHWISE: whether the convolution is depthwise (each channel has its own kernel).
        CHANNELS_LAST: whether channels are the fastest axis of x, residual and y; otherwise columns are.
        PIXEL_MULTIPLE: largest power of two, up to 16, that divides the number of pixels of an image of y.
        BLOCK_POSITIONS: positions of y that a program computes.
        BLOCK_OUTPUTS: channels of y that a program computes.
        BLOCK_HIDDEN: hidden channels that are computed at a time.
        BLOCK_INPUTS: channels of x that are summed over at a time.
    """
    program, output = _own_channels(outputs, BLOCK_OUTPUTS)
    # As a product, the size of an image tells the compiler how every image is aligned.
    pixels = pixel_multiples * tl.full((), PIXEL_MULTIPLE, tl.int32)
    tile = _own_positions(program, positions, pixels, y_width, PIXEL_MULTIPLE, BLOCK_POSITIONS)
    sums = tl.zeros((BLOCK_POSITIONS, BLOCK_OUTPUTS), tl.float32)
    for first in range(0, hidden, BLOCK_HIDDEN):
        channel = first + tl.arange(0, BLOCK_HIDDEN)
        if DEPTHWISE:
            between = _convolve_depthwise(
                x_ptr,
                weight_ptr,
                None,
                weight_strides,
                tile,
                geometry,
                channel,
                hidden,
                KERNEL_HEIGHT,
                KERNEL_WIDTH,
                CHANNELS_LAST,
            )
            between = between if CHANNELS_LAST else tl.trans(between)
        else:
            between = _convolve(
                x_ptr,
                weight_ptr,
                weight_strides,
                tile,
                geometry,
                channel,
                hidden,
                inputs,
                KERNEL_HEIGHT,
                KERNEL_WIDTH,
                CHANNELS_LAST,
                BLOCK_INPUTS,
            )
        if bias_ptr is not None:
            between += tl.load(bias_ptr + channel, mask=channel < hidden, other=0).to(tl.float32)[None, :]
        sums = dot(between.to(x_ptr.dtype.element_ty), load_transposed(pointwise_ptr, output, outputs, channel, hidden), sums)
    values = sums if CHANNELS_LAST else tl.trans(sums)
    _finish(
        values,
        pointwise_bias_ptr,
        residual_ptr,
        y_ptr,
        None,
        tile,
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
    ACTIVATION: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXEL_MULTIPLE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Write activation(conv(x) + bias + tap bias + residual) to y, and count the states of the activation's argument.

    The tap bias of an output is the sum of `tap_bias` over the taps that lie inside the image. One program computes
    BLOCK_POSITIONS positions of y for BLOCK_OUTPUTS of its channels. It adds to each count with one atomic addition.

    Args:
        x_ptr: `[batch, inputs, height, width]`, float32, bfloat16 or float16, with the strides in `geometry`. All other
            tensors but the counts have its dtype.
        weight_ptr: `[outputs, inputs / groups, KERNEL_HEIGHT, KERNEL_WIDTH]`, with the strides `weight_strides`.
        bias_ptr: `[outputs]`, contiguous, or None.
        tap_bias_ptr: `[outputs, KERNEL_HEIGHT, KERNEL_WIDTH]`, contiguous, or None.
        residual_ptr: `[batch, outputs, y height, y_width]`, with the strides of y, or None.
        y_ptr: `[batch, outputs, y height, y_width]`, channels-last if CHANNELS_LAST, otherwise contiguous.
        counts_ptr: int64 `[outputs, 3]`, contiguous; the counts of off, zero and on are added to it. None not to count.
        positions: number of positions of y: batch * y height * y width.
        pixel_multiples: number of pixels of an image of y, divided by PIXEL_MULTIPLE.
        y_width: width of y.
        geometry: see the head of this file.
        weight_strides: see the head of this file.
        inputs: number of channels of x.
        outputs: number of channels of y.
        parameters: tuple of the activation's parameters.
        ACTIVATION: name of the activation.
        KERNEL_HEIGHT: height of the weight.
        KERNEL_WIDTH: width of the weight.
        DEPTHWISE: whether the convolution is depthwise (each channel has its own kernel).
        CHANNELS_LAST: whether channels are the fastest axis of x, residual and y; otherwise columns are.
        PIXEL_MULTIPLE: largest power of two, up to 16, that divides the number of pixels of an image of y.
        BLOCK_POSITIONS: positions of y that a program computes.
        BLOCK_OUTPUTS: channels of y that a program computes.
        BLOCK_INPUTS: channels of x that are summed over at a time.
    """
    program, output = _own_channels(outputs, BLOCK_OUTPUTS)
    # As a product, the size of an image tells the compiler how every image is aligned.
    pixels = pixel_multiples * tl.full((), PIXEL_MULTIPLE, tl.int32)
    tile = _own_positions(program, positions, pixels, y_width, PIXEL_MULTIPLE, BLOCK_POSITIONS)
    if DEPTHWISE:
        values = _convolve_depthwise(
            x_ptr,
            weight_ptr,
            tap_bias_ptr,
            weight_strides,
            tile,
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
            tile,
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
            sums = _add_tap_bias(sums, tap_bias_ptr, tile, geometry, output, outputs, KERNEL_HEIGHT, KERNEL_WIDTH)
        values = sums if CHANNELS_LAST else tl.trans(sums)
    _finish(
        values, bias_ptr, residual_ptr, y_ptr, counts_ptr, tile, pixels, output, outputs, parameters, ACTIVATION, CHANNELS_LAST
    )


@triton.jit
def _own_channels(channels, BLOCK_CHANNELS: tl.constexpr):
    """Return the index of the program's block of positions, and the channels of the program.

    Consecutive programs have the same positions and different channels.

    Args:
        channels: number of channels of y.
        BLOCK_CHANNELS: number of channels of a program.

    Returns:
        The index, int64; the channels, int64 `[BLOCK_CHANNELS]`. Those of the last block may exceed the number of channels.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    return program // blocks, program % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)


@triton.jit
def _own_positions(
    program,
    positions,
    pixels,
    y_width,
    PIXEL_MULTIPLE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
):
    """Return `tile`, the description of the positions of a program.

    Args:
        program: index of the program's block of positions, int64.
        positions: number of positions of y.
        pixels: number of pixels of an image of y.
        y_width: width of y.
        PIXEL_MULTIPLE: largest power of two, up to 16, that divides `pixels`.
        BLOCK_POSITIONS: number of positions in a block.
    """
    first = program * BLOCK_POSITIONS
    lane = tl.arange(0, BLOCK_POSITIONS)
    # 64-bit divisions are slow. Only the start of the block is divided in 64 bits, and its lanes are divided in 32 bits.
    pixel = (first % pixels).to(tl.int32) + lane
    image = first // pixels + pixel // pixels
    pixel = pixel % pixels
    row, column = pixel // y_width, pixel % y_width
    # Images and blocks begin at multiples of PIXEL_MULTIPLE. The compiler cannot derive this through the division.
    pixel = tl.max_contiguous(tl.multiple_of(pixel, PIXEL_MULTIPLE), PIXEL_MULTIPLE)
    image = tl.max_constancy(image, PIXEL_MULTIPLE)
    inside = tl.max_constancy(first + lane < positions, PIXEL_MULTIPLE)
    return image, pixel, row, column, inside


@triton.jit
def _tap(tile, geometry, tap_row, tap_column):
    """Return where each position reads x for one tap, and whether this pixel lies inside the image.

    Args:
        tile: see the head of this file.
        geometry: see the head of this file.
        tap_row: row of the tap in the kernel of the convolution.
        tap_column: column of the tap in the kernel of the convolution.

    Returns:
        The distance from the first value of x to the first channel of the pixel, in values, int64; a bool that is false if the
        pixel is padding or the position does not exist.
    """
    image, _, row, column, inside = tile
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
    tile,
    geometry,
    channel,
    channels,
    inputs,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Return the sums of a convolution over its taps and inputs, without a bias.

    One loop runs over both taps and blocks of inputs, so the compiler can load ahead across taps.

    Args:
        x_ptr: `[batch, inputs, height, width]`, with the strides in `geometry`.
        weight_ptr: `[channels, inputs, KERNEL_HEIGHT, KERNEL_WIDTH]`, with the strides `weight_strides`.
        weight_strides: see the head of this file.
        tile: see the head of this file.
        geometry: see the head of this file.
        channel: `[block]`, the output channels to compute.
        channels: number of output channels.
        inputs: number of channels of x.
        KERNEL_HEIGHT: height of the weight.
        KERNEL_WIDTH: width of the weight.
        CHANNELS_LAST: whether channels are the fastest axis of x.
        BLOCK_INPUTS: channels of x that are summed over at a time.

    Returns:
        float32 `[positions, block]`.
    """
    sums = tl.zeros((tile[0].shape[0], channel.shape[0]), tl.float32)
    blocks = tl.cdiv(inputs, BLOCK_INPUTS)
    for step in range(KERNEL_HEIGHT * KERNEL_WIDTH * blocks):
        tap = step // blocks
        tap_row, tap_column = tap // KERNEL_WIDTH, tap % KERNEL_WIDTH
        input = step % blocks * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        offset, inside = _tap(tile, geometry, tap_row, tap_column)
        x = load_tile(x_ptr, offset, inside, input, inputs, geometry[1][1], CHANNELS_LAST)
        tap_ptr = weight_ptr + tap_row * weight_strides[2] + tap_column * weight_strides[3]
        weight = tl.load(
            tap_ptr + input[:, None] * weight_strides[1] + channel[None, :].to(tl.int64) * weight_strides[0],
            mask=(input < inputs)[:, None] & (channel < channels)[None, :],
            other=0,
        )
        sums = dot(x if CHANNELS_LAST else tl.trans(x), weight, sums)
    return sums


@triton.jit
def _convolve_depthwise(
    x_ptr,
    weight_ptr,
    tap_bias_ptr,
    weight_strides,
    tile,
    geometry,
    channel,
    channels,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Return the sums of a depthwise convolution over its taps, with the tap bias.

    Args:
        x_ptr: `[batch, channels, height, width]`, with the strides in `geometry`.
        weight_ptr: `[channels, 1, KERNEL_HEIGHT, KERNEL_WIDTH]`, with the strides `weight_strides`.
        tap_bias_ptr: `[channels, KERNEL_HEIGHT, KERNEL_WIDTH]`, contiguous, or None. An element is added if its tap lies
            inside the image.
        weight_strides: see the head of this file.
        tile: see the head of this file.
        geometry: see the head of this file.
        channel: `[block]`, the channels to compute.
        channels: number of channels.
        KERNEL_HEIGHT: height of the weight.
        KERNEL_WIDTH: width of the weight.
        CHANNELS_LAST: whether channels are the fastest axis of x.

    Returns:
        float32 `[positions, block]` if CHANNELS_LAST, otherwise `[block, positions]`.
    """
    positions, channels_axis = spread(tile[0], channel, CHANNELS_LAST)
    sums = tl.zeros((positions + channels_axis).shape, tl.float32)
    for tap_row in range(KERNEL_HEIGHT):
        for tap_column in range(KERNEL_WIDTH):
            offset, inside = _tap(tile, geometry, tap_row, tap_column)
            x = load_tile(x_ptr, offset, inside, channel, channels, geometry[1][1], CHANNELS_LAST).to(tl.float32)
            tap_ptr = weight_ptr + tap_row * weight_strides[2] + tap_column * weight_strides[3]
            weight = tl.load(tap_ptr + channel * weight_strides[0], mask=channel < channels, other=0).to(tl.float32)
            inside, weight = spread(inside, weight, CHANNELS_LAST)
            sums += x * weight
            if tap_bias_ptr is not None:
                tap = channel * (KERNEL_HEIGHT * KERNEL_WIDTH) + tap_row * KERNEL_WIDTH + tap_column
                tap_bias = tl.load(tap_bias_ptr + tap, mask=channel < channels, other=0).to(tl.float32)
                sums += tl.where(inside, spread(tile[0], tap_bias, CHANNELS_LAST)[1], 0.0)
    return sums


@triton.jit
def _add_tap_bias(
    sums,
    tap_bias_ptr,
    tile,
    geometry,
    channel,
    channels,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
):
    """Add the tap bias: for each position and channel, the sum of `tap_bias` over the taps that lie inside the image.

    The sum is computed as a matrix product. Its left factor `[positions, taps]` is 1 if a tap lies inside the image, else 0.

    Args:
        sums: float32 `[positions, block]`.
        tap_bias_ptr: `[channels, KERNEL_HEIGHT, KERNEL_WIDTH]`, contiguous.
        tile: see the head of this file.
        geometry: see the head of this file.
        channel: `[block]`, the output channels of `sums`.
        channels: number of output channels.
        KERNEL_HEIGHT: height of the weight.
        KERNEL_WIDTH: width of the weight.

    Returns:
        The new sums, float32 `[positions, block]`.
    """
    taps: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    image, pixel, row, column, inside = tile
    tile = (image[:, None], pixel[:, None], row[:, None], column[:, None], inside[:, None])
    for first in range(0, taps, 16):
        tap = first + tl.arange(0, 16)
        _, reached = _tap(tile, geometry, (tap // KERNEL_WIDTH)[None, :], (tap % KERNEL_WIDTH)[None, :])
        tap_bias = load_transposed(tap_bias_ptr, channel, channels, tap, taps)
        sums = dot(reached.to(tl.float32).to(tap_bias.dtype), tap_bias, sums)
    return sums


@triton.jit
def _finish(
    values,
    bias_ptr,
    residual_ptr,
    y_ptr,
    counts_ptr,
    tile,
    pixels,
    channel,
    channels,
    parameters,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Add bias and residual to the sums, count the states of the result, and write its activation to y.

    The states are those of the result rounded to the dtype of y. The activation is computed before rounding.

    Args:
        values: float32 sums, `[positions, block]` if CHANNELS_LAST, otherwise `[block, positions]`.
        bias_ptr: `[channels]`, contiguous, or None.
        residual_ptr: `[batch, channels, y height, y width]`, with the strides of y, or None.
        y_ptr: `[batch, channels, y height, y width]`, channels-last if CHANNELS_LAST, otherwise contiguous.
        counts_ptr: int64 `[channels, 3]`, contiguous; the counts of off, zero and on are added to it. None not to count.
        tile: see the head of this file.
        pixels: number of pixels of an image of y.
        channel: `[block]`, the channels of `values`.
        channels: number of channels of y.
        parameters: tuple of the activation's parameters.
        ACTIVATION: name of the activation.
        CHANNELS_LAST: whether channels are the fastest axis of residual and y.
    """
    image, pixel, _, _, inside = tile
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
        values += spread(pixel, bias, CHANNELS_LAST)[1]
    if CHANNELS_LAST:
        offset = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    else:
        offset = (image * channels)[None, :] * pixels + channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    inside, exists = spread(inside, channel < channels, CHANNELS_LAST)
    written = inside & exists
    if residual_ptr is not None:
        values += tl.load(residual_ptr + offset, mask=written, other=0).to(tl.float32)
    if counts_ptr is not None:
        rounded = tl.where(written, values.to(y_ptr.dtype.element_ty).to(tl.float32), float("nan"))
        _add_tile_counts(counts_ptr, rounded, channel, channels, 0 if CHANNELS_LAST else 1)
    y = activate(values, ACTIVATION, parameters, 0.0)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=written)


@triton.jit
def _add_tile_counts(counts_ptr, x, channel, channels, AXIS: tl.constexpr):
    """Count the off, zero and on values of the tile `x` along AXIS, and add the counts to memory.

    The three counts are packed into 10-bit fields of one int32 and summed in one reduction. No field overflows, because a tile
    has fewer than 1,024 positions (at most 64 in the table of launches).

    Args:
        counts_ptr: int64 `[channels, 3]`, contiguous.
        x: float32 tile of positions and channels. NaN is not counted.
        channel: `[block]`, the channels of the tile.
        channels: number of channels of y.
        AXIS: the axis of `x` that runs over positions.
    """
    counts = tl.sum(count_lanes((tl.zeros(x.shape, tl.int32),), x, (), 1, 0)[0], AXIS)
    for state in tl.static_range(3):
        atomic_add(counts_ptr + channel * 3 + state, unpack(counts, (1, 2, 0)[state]), channel < channels)
