"""GPU: linearised chains in one kernel each. What lies between two operators of a chain stays in registers.

Convolutions are implicit matrix products: a tile of output positions by one of output channels, summed in float32 over
the taps of the kernel and blocks of input channels. Both memory formats are read and written along their fastest axis.
float32 is multiplied exactly, without TF32; 16-bit formats run on the matrix units, and there the values between two
operators are rounded to the format, since the second product takes them so. They still never go to memory.
"""

# Kernels have no types of their own, and Triton none for its decorator.
# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
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
    middles,
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
    BLOCK_MIDDLES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
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
        sums = dot(made.to(x_ptr.dtype.element_ty), load_transposed(pointwise_ptr, output, outputs, middle, middles), sums)
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
def _own_channels(channels, BLOCK_CHANNELS: tl.constexpr):
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
    PIXEL_MULTIPLE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
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
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Return the sums [positions, channels] over taps and inputs, in one loop over both so that its loads run ahead."""
    sums = tl.zeros((place[0].shape[0], channel.shape[0]), tl.float32)
    blocks = tl.cdiv(inputs, BLOCK_INPUTS)
    for step in range(KERNEL_HEIGHT * KERNEL_WIDTH * blocks):
        tap = step // blocks
        tap_row, tap_column = tap // KERNEL_WIDTH, tap % KERNEL_WIDTH
        input = step % blocks * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        offset, inside = _tap(place, geometry, tap_row, tap_column)
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
    place,
    geometry,
    channel,
    channels,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Return the sums over taps in the order of memory: [positions, channels] or [channels, positions]."""
    positions, channels_axis = spread(place[0], channel, CHANNELS_LAST)
    sums = tl.zeros((positions + channels_axis).shape, tl.float32)
    for tap_row in range(KERNEL_HEIGHT):
        for tap_column in range(KERNEL_WIDTH):
            offset, inside = _tap(place, geometry, tap_row, tap_column)
            x = load_tile(x_ptr, offset, inside, channel, channels, geometry[1][1], CHANNELS_LAST).to(tl.float32)
            tap_ptr = weight_ptr + tap_row * weight_strides[2] + tap_column * weight_strides[3]
            weight = tl.load(tap_ptr + channel * weight_strides[0], mask=channel < channels, other=0).to(tl.float32)
            inside, weight = spread(inside, weight, CHANNELS_LAST)
            sums += x * weight
            if tap_bias_ptr is not None:
                tap = channel * (KERNEL_HEIGHT * KERNEL_WIDTH) + tap_row * KERNEL_WIDTH + tap_column
                tap_bias = tl.load(tap_bias_ptr + tap, mask=channel < channels, other=0).to(tl.float32)
                sums += tl.where(inside, spread(place[0], tap_bias, CHANNELS_LAST)[1], 0.0)
    return sums


@triton.jit
def _add_tap_bias(
    sums,
    tap_bias_ptr,
    place,
    geometry,
    channel,
    channels,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
):
    """Add what the taps inside of the image add, as a matrix product: which taps are inside, 0 or 1, by `tap_bias`."""
    taps: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    image, pixel, row, column, inside = place
    place = (image[:, None], pixel[:, None], row[:, None], column[:, None], inside[:, None])
    for first in range(0, taps, 16):
        tap = first + tl.arange(0, 16)
        _, reached = _tap(place, geometry, (tap // KERNEL_WIDTH)[None, :], (tap % KERNEL_WIDTH)[None, :])
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
    place,
    pixels,
    channel,
    channels,
    parameters,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Add bias and residual, count the states of what y's dtype makes of that, and write its activation."""
    image, pixel, _, _, inside = place
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0).to(tl.float32)
        values += spread(pixel, bias, CHANNELS_LAST)[1]
    if CHANNELS_LAST:
        offset = (image * pixels + pixel)[:, None] * channels + channel[None, :]
    else:
        offset = (image * channels)[None, :] * pixels + channel.to(tl.int64)[:, None] * pixels + pixel[None, :]
    inside, known = spread(inside, channel < channels, CHANNELS_LAST)
    written = inside & known
    if residual_ptr is not None:
        values += tl.load(residual_ptr + offset, mask=written, other=0).to(tl.float32)
    if counts_ptr is not None:
        rounded = tl.where(written, values.to(y_ptr.dtype.element_ty).to(tl.float32), float("nan"))
        _add_tile_counts(counts_ptr, rounded, channel, channels, 0 if CHANNELS_LAST else 1)
    y = activate(values, ACTIVATION, parameters, 0.0)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=written)


@triton.jit
def _add_tile_counts(counts_ptr, x, channel, channels, AXIS: tl.constexpr):
    """Add the states of a tile, over AXIS, to `counts_ptr` [channels, 3]. It is short: its three counts fit in one sum."""
    counts = tl.sum(count_lanes((tl.zeros(x.shape, tl.int32),), x, (), 1, 0)[0], AXIS)
    for state in tl.static_range(3):
        atomic_add(counts_ptr + channel * 3 + state, unpack(counts, (1, 2, 0)[state]), channel < channels)
