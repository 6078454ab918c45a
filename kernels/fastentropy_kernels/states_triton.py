"""GPU: an activation and the states of its input in one pass, or the states alone.

While a strip is read every lane keeps its own counts, three of ten bits in an int32, and only values that one lane holds are
summed. The lanes' counts are summed over the tile and added to memory once, when the strip is done.
"""

# Kernels have no types of their own, and Triton none for its decorator.
# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# Where the three counts of a lane lie in its int32, and how far each can count.
_FIRST: tl.constexpr = tl.constexpr(1)
_SECOND: tl.constexpr = tl.constexpr(1 << 10)
_THIRD: tl.constexpr = tl.constexpr(1 << 20)
_MOST_COUNTED: tl.constexpr = tl.constexpr((1 << 10) - 1)
# Beyond so many rows of a tile the sums over its lanes are wide, so that a strip has more than a few tiles.
_MOST_NARROW: tl.constexpr = tl.constexpr(128)

# The same for the sums over a tile's lanes, in an int64, where an int32 as above does not hold them.
_WIDE_SECOND: tl.constexpr = tl.constexpr(1 << 21)
_WIDE_THIRD: tl.constexpr = tl.constexpr(1 << 42)
_MOST_SUMMED: tl.constexpr = tl.constexpr((1 << 21) - 1)


@triton.jit
def states_rows_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    nan_ptr,
    weight_ptr,
    rows,
    channels,
    x_row_stride,
    y_row_stride,
    weight_stride,
    strip_rows,
    parameters,
    edges,
    ACTIVATION: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
    REPEATS: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """One program: `strip_rows` rows, BLOCK_CHANNELS wide, in tiles of BLOCK_ROWS x BLOCK_CHANNELS.

    Neighbouring programs hold neighbouring channels of the same rows. A lane holds REPEATS rows of a tile, and STAGES tiles are
    on their way at a time. Counts leave the registers once, after the strip.
    """
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    first_channel = program % channel_blocks * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    first_row = program // channel_blocks * strip_rows
    last_row = tl.minimum(first_row + strip_rows, rows)
    weight = _load_weight(weight_ptr, weight_stride, channel, channels)
    counts = _no_counts(BLOCK_ROWS // REPEATS, BLOCK_CHANNELS, edges)
    positions = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in tl.range(first_row, last_row, BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        x = _load(x_ptr + row[:, None] * x_row_stride + channel[None, :], inside)
        if y_ptr is not None:
            y = _activate(x, ACTIVATION, parameters, weight[None, :])
            tl.store(y_ptr + row[:, None] * y_row_stride + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        counted = row < rows
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + row, mask=row < rows, other=0) != 0
            x = tl.where(counted[:, None], x, float("nan"))
        if nan_ptr is not None:
            positions += counted
        counts = _count(counts, x, edges, REPEATS, 0)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 0, BLOCK_ROWS > _MOST_NARROW, first_channel, channel, channels, edges)


@triton.jit
def states_planes_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    nan_ptr,
    weight_ptr,
    tiles,
    channels,
    inner_multiples,
    weight_stride,
    strip,
    parameters,
    edges,
    ACTIVATION: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
    REPEATS: tl.constexpr,  # noqa: N803
    INNER_MULTIPLE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK_INNER: tl.constexpr,  # noqa: N803
):
    """One program: BLOCK_CHANNELS channels and `strip` of the `tiles` that these channels have over outer and inner.

    A tile is BLOCK_CHANNELS x BLOCK_INNER values of one outer index, of which a lane holds REPEATS places of a plane, and
    STAGES tiles are on their way at a time. Planes are `inner_multiples * INNER_MULTIPLE` long: a product tells the compiler
    the alignment of every plane. Counts leave the registers once, after the strip.
    """
    inner = inner_multiples * tl.full((), INNER_MULTIPLE, tl.int64)
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    first_channel = program % channel_blocks * BLOCK_CHANNELS
    channel = first_channel + tl.arange(0, BLOCK_CHANNELS)
    inner_blocks = tl.cdiv(inner, BLOCK_INNER)
    first_tile = program // channel_blocks * strip
    last_tile = tl.minimum(first_tile + strip, tiles)
    weight = _load_weight(weight_ptr, weight_stride, channel, channels)
    counts = _no_counts(BLOCK_CHANNELS, BLOCK_INNER // REPEATS, edges)
    positions = tl.zeros((BLOCK_INNER,), tl.int32)
    image = first_tile // inner_blocks
    block = first_tile % inner_blocks
    for _ in tl.range(first_tile, last_tile, num_stages=STAGES):
        position = block * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        inside = (channel < channels)[:, None] & (position < inner)[None, :]
        offset = (image * channels + channel)[:, None] * inner + position[None, :]
        x = _load(x_ptr + offset, inside)
        if y_ptr is not None:
            y = _activate(x, ACTIVATION, parameters, weight[:, None])
            tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
        counted = position < inner
        if mask_ptr is not None:
            counted = tl.load(mask_ptr + image * inner + position, mask=position < inner, other=0) != 0
            x = tl.where(counted[None, :], x, float("nan"))
        if nan_ptr is not None:
            positions += counted
        counts = _count(counts, x, edges, REPEATS, 1)
        # A division for every tile would cost as much as three of its values.
        is_last_of_plane = block + 1 == inner_blocks
        image += is_last_of_plane
        block = tl.where(is_last_of_plane, 0, block + 1)
    _add_counts(counts_ptr, nan_ptr, counts, positions, 1, True, first_channel, channel, channels, edges)


@triton.jit
def _load(pointers, inside):
    """Load as float32; what lies outside reads as NaN, which is in no state and so needs no test of its own."""
    return tl.load(pointers, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _load_weight(weight_ptr, weight_stride, channel, channels):
    if weight_ptr is None:
        return tl.zeros(channel.shape, tl.float32)
    else:
        return tl.load(weight_ptr + channel * weight_stride, mask=channel < channels, other=0).to(tl.float32)


@triton.jit
def _no_counts(HEIGHT: tl.constexpr, WIDTH: tl.constexpr, edges):  # noqa: N803
    """Make the tiles of lane counts: one for the signs, one for every three of the histogram's len(edges) + 1 counts."""
    counts = (tl.zeros((HEIGHT, WIDTH), tl.int32),)
    for _ in tl.static_range(len(edges) // 3):
        counts = counts + (tl.zeros((HEIGHT, WIDTH), tl.int32),)  # noqa: RUF005
    return counts


@triton.jit
def _count(counts, x, edges, REPEATS: tl.constexpr, AXIS: tl.constexpr):  # noqa: N803
    """Count each value where its lane keeps its counts: on, off and zero, or at least -infinity, edges[0], edges[1], …"""
    if len(edges) == 0:
        state = tl.where(x > 0, _FIRST, tl.where(x < 0, _SECOND, tl.where(x == 0, _THIRD, 0)))
        return (counts[0] + _sum_repeats(state, REPEATS, AXIS),)
    else:
        counted = ()
        for group in tl.static_range(len(counts)):
            state = _three_at_least(x, edges, 3 * group)
            counted = counted + (counts[group] + _sum_repeats(state, REPEATS, AXIS),)  # noqa: RUF005
        return counted


@triton.jit
def _sum_repeats(state, REPEATS: tl.constexpr, AXIS: tl.constexpr):  # noqa: N803
    """Sum what one lane holds along AXIS: a tile that is longer than all threads together comes round to each again."""
    if REPEATS == 1:
        return state
    elif AXIS == 0:
        return tl.sum(state.reshape(REPEATS, state.shape[0] // REPEATS, state.shape[1]), 0)
    else:
        return tl.sum(state.reshape(state.shape[0], REPEATS, state.shape[1] // REPEATS), 1)


@triton.jit
def _three_at_least(x, edges, FIRST: tl.constexpr):  # noqa: N803
    state = tl.where(x >= (float("-inf") if FIRST == 0 else edges[FIRST - 1]), _FIRST, 0)
    if len(edges) > FIRST:
        state += tl.where(x >= edges[FIRST], _SECOND, 0)
    if len(edges) > FIRST + 1:
        state += tl.where(x >= edges[FIRST + 1], _THIRD, 0)
    return state


@triton.jit
def _add_counts(
    counts_ptr,
    nan_ptr,
    counts,
    positions,
    AXIS: tl.constexpr,  # noqa: N803
    IS_WIDE: tl.constexpr,  # noqa: N803
    first_channel,
    channel,
    channels,
    edges,
):
    """Sum the lanes' counts over AXIS and add them to memory: an atomic per channel for each count that is not 0.

    `counts_ptr` is [channels, states]. What was counted at `positions` and is in no state is added to `nan_ptr`. IS_WIDE says
    that a sum may be more than a lane can count.
    """
    if len(edges) == 0:
        on, off, zero = _sum_together(counts[0], AXIS, IS_WIDE)
        _add_in_order(counts_ptr, off, zero, on, first_channel, channels)
        numbers = on + off + zero
    else:
        numbers = _sum(counts[0], 0, AXIS)
        at_least = numbers
        for state in tl.static_range(len(edges)):
            beyond = _sum(counts[(state + 1) // 3], (state + 1) % 3, AXIS)
            _add(counts_ptr + channel * (len(edges) + 1) + state, at_least - beyond, channel < channels)
            at_least = beyond
        _add(counts_ptr + channel * (len(edges) + 1) + len(edges), at_least, channel < channels)
    if nan_ptr is not None:
        _add(nan_ptr + channel, tl.sum(positions, 0) - numbers, channel < channels)


@triton.jit
def _add_in_order(counts_ptr, off, zero, on, first_channel, channels):
    """Add to rows of three as they lie in memory: neighbouring lanes add to neighbouring places, which are one transaction."""
    numbers = tl.join(tl.join(off, on), tl.join(zero, tl.zeros_like(zero))).reshape(4 * off.shape[0])
    number = tl.arange(0, 4 * off.shape[0])
    channel, column = first_channel + number // 4, number % 4
    _add(counts_ptr + channel * 3 + column, numbers, (column < 3) & (channel < channels))


@triton.jit
def _sum_together(counts, AXIS: tl.constexpr, IS_WIDE: tl.constexpr):  # noqa: N803
    """Sum all three counts in one reduction, as they are or of 21 bits each: what waits for other threads is done once."""
    if not IS_WIDE:
        sums = tl.sum(counts, AXIS)
        return _unpack(sums, 0), _unpack(sums, 1), _unpack(sums, 2)
    else:
        first, second, third = _unpack(counts, 0), _unpack(counts, 1), _unpack(counts, 2)
        wide = first.to(tl.int64) + second.to(tl.int64) * _WIDE_SECOND + third.to(tl.int64) * _WIDE_THIRD
        sums = tl.sum(wide, AXIS)
        return sums & _MOST_SUMMED, sums // _WIDE_SECOND & _MOST_SUMMED, sums // _WIDE_THIRD


@triton.jit
def _sum(counts, PLACE: tl.constexpr, AXIS: tl.constexpr):  # noqa: N803
    return tl.sum(_unpack(counts, PLACE), AXIS)


@triton.jit
def _unpack(counts, PLACE: tl.constexpr):  # noqa: N803
    return counts // (1 << 10 * PLACE) & _MOST_COUNTED


@triton.jit
def _add(pointers, number, inside):
    tl.atomic_add(pointers, number.to(tl.int64), mask=inside & (number != 0), sem="relaxed")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, parameters, weight):  # noqa: N803
    """The activation named in `reference.ACTIVATIONS`, of float32; NaN stays NaN."""
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return _at_least(x, 0.0)
    elif ACTIVATION == "relu6":
        return _clamp(x, 0.0, 6.0)
    elif ACTIVATION == "hardtanh":
        return _clamp(x, parameters[0], parameters[1])
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * parameters[0])
    elif ACTIVATION == "prelu":
        return tl.where(x > 0, x, x * weight)
    elif ACTIVATION == "relu2":
        return _at_least(x, 0.0) * _at_least(x, 0.0)
    elif ACTIVATION == "hardswish":
        return x * _clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "elu":
        return tl.where(x > 0, x, parameters[0] * _expm1(x))
    elif ACTIVATION == "celu":
        return tl.where(x > 0, x, parameters[0] * _expm1(x / parameters[0]))
    elif ACTIVATION == "selu":
        return 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * _expm1(x))
    elif ACTIVATION == "gelu":
        return _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid 2u
        return _times_sigmoid(x, 1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return _times_sigmoid(x, 1.702 * x)
    elif ACTIVATION == "silu":
        return _times_sigmoid(x, x)
    elif ACTIVATION == "mish":
        # tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); from 20 on it is 1 in float32
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    else:
        tl.static_assert(ACTIVATION == "softplus", "unknown activation")
        scaled = x * parameters[0]
        return tl.where(scaled > parameters[1], x, _softplus(scaled) / parameters[0])


@triton.jit
def _at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(_at_least(x, low), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(x):
    """x Phi(x) = max(x, 0) - z Phi(-z) with z = |x|, and Phi(-z) = 2^-q(z): nothing cancels below 0, where Phi is small.

    q is a polynomial fitted to -log2 Phi(-z) over 0 <= z <= 10, exact at 0, by least squares with weights that were raised
    where the error was largest (Lawson's algorithm) until its maximum was least: that of z Phi(-z) is 1.6e-7, and 0.16% of the
    value, where this is the larger one. Beyond 10, where z Phi(-z) is below 1e-22, q rises without end. From 14 on the product
    is nothing to x > 0, so z stops there: infinity stays infinity. Minus infinity is NaN, as for PyTorch.
    """
    z = tl.abs(tl.minimum(x, 14.0, propagate_nan=tl.PropagateNan.ALL))
    q = 1.2594321106007555e-06 * z - 4.9938669690163806e-05
    q = q * z + 0.0008448295993730426
    q = q * z - 0.00822521187365055
    q = q * z + 0.05352005735039711
    q = q * z + 0.4587700068950653
    q = q * z + 1.1511732339859009
    q = q * z + 1.0
    return _at_least(x, 0.0) - z * tl.exp2(-q)


@triton.jit
def _times_sigmoid(x, at):
    """x sigmoid(at), where sigmoid is the square of 1 / sqrt(1 + e^-at): a root takes an instruction, a division several.

    The root's error, 2^-22.9 of it (PTX ISA, rsqrt.approx), counts twice. That of e^-at is larger where at is far below 0.
    """
    root = tl.rsqrt(1.0 + tl.exp2(at * -1.4426950408889634))
    return x * root * root


@triton.jit
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, which is 2 artanh(s) with s = e / (2 + e) up to 1/3."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15))))))
    return _at_least(x, 0.0) + 2.0 * (s + s * z * series)


@triton.jit
def _expm1(x):
    """e^x - 1. Near 0, where the difference cancels, it is Taylor's series."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return tl.where(tl.abs(x) < 0.35, x + x * x * (0.5 + x * (1 / 6 + x * series)), tl.exp(x) - 1.0)


INTERPRETED = not isinstance(states_rows_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when this module was imported."""


class Launch(NamedTuple):
    """How a kernel is spread over a GPU."""

    tile_bytes: int  # of x, that a program reads at once
    row_bytes: int  # the widest tile of rows
    num_warps: int
    programs_per_multiprocessor: int  # aimed at; each adds its counts to memory once
    stages: int = 1  # tiles that are on their way at a time
    shortest_strip: int = 1  # in tiles, even if there are fewer programs then


# Chosen on an H100 (2026-11-27). `fastentropy bench kernels --sweep` prints this table for the GPU that it runs on. Times are
# shares of those of PyTorch's activation alone, for tensors of 50 to 270 MB. What made the difference:
# - bytes on their way. Tiles of 8 KB fit into the registers, because a lane sums its own repeats, and need no stages: ReLU of
#   bfloat16 rows takes 1.05 and 1.06 in these tiles, 1.13 in four stages of 4 KB (there without tests of bounds, 0.4% of it);
# - more programs than are there at a time, whose ends do not wait for each other. With 16 for a multiprocessor in place of 40
#   these rows take 1.08. Planes take 1.03 and 1.02 with 52, which whole tiles make 62 and 54; 1.06 and 1.04 with half;
# - few counts that are added to memory, so a program has two tiles at least: planes whose programs end after one take 1.18,
#   not 1.07. A program of rows adds as many as its tile is wide: in tiles of 4 KB, SiLU of 4096 rows takes 1.60 with 256
#   channels, 1.12 with 64. What adds up the lanes' counts before takes 1% less in an int32 than in an int64.
LAUNCHES = {
    # Each row of a tile is two whole 128-byte lines.
    "rows": Launch(tile_bytes=8192, row_bytes=256, num_warps=4, programs_per_multiprocessor=40, shortest_strip=2),
    # A plane is contiguous: a tile is as long as a plane allows, and holds several planes where these are short.
    "planes": Launch(tile_bytes=8192, row_bytes=8192, num_warps=8, programs_per_multiprocessor=52, shortest_strip=2),
    # Below SMALL_BELOW, small tiles: every multiprocessor gets some. That of rows was not measured.
    "small rows": Launch(tile_bytes=2048, row_bytes=256, num_warps=4, programs_per_multiprocessor=8),
    "small planes": Launch(tile_bytes=2048, row_bytes=2048, num_warps=4, programs_per_multiprocessor=8, stages=3),
    # Up to 6 counters a value in place of 1. Larger tiles of 8 warps took 0.18 and 0.17 ms where these take 0.14 and 0.13.
    "histogram rows": Launch(tile_bytes=4096, row_bytes=128, num_warps=4, programs_per_multiprocessor=8),
    "histogram planes": Launch(tile_bytes=2048, row_bytes=2048, num_warps=4, programs_per_multiprocessor=32),
}

SMALL_BELOW = {"rows": 1 << 16, "planes": 1 << 18}
"""Layout -> the bytes for each multiprocessor below which a tensor has the line for small ones."""


def fuses(activation: str, edges: Sequence[float] | None) -> bool:
    """Whether the activation and the count of its input are one pass: always."""
    return True


def add_states(
    values: Tensor,
    counts: Tensor,
    *,
    edges: Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
    y: Tensor | None = None,
    activation: str = "identity",
    parameters: Sequence[float] = (),
    weight: Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """Add the states of `values`, arranged as rows or planes, to `counts` and NaN to `nan`; write its activation to `y`.

    See `reference.add_states` for the states and `layout.Arranged` for values and y, which may be the same memory.
    `launch` takes the place of the table's line.
    """
    kernel, grid, arguments, options = _arguments(values, counts, edges, mask, nan, y, activation, parameters, weight, launch)
    # A launch goes to the current device, which need not be the tensor's. Nothing changes for a CPU tensor.
    with torch.cuda.device_of(values):
        kernel[grid](*arguments, **options)


class PreparedLaunch:
    """`add_states` on a GPU for tensors like some, with everything but their addresses decided.

    What Triton works out at each call of a kernel takes longer than the launch.
    """

    def __init__(self, kernel, grid, arguments, options) -> None:
        """Compile the kernel, or take it from Triton's cache, and run nothing."""
        self._run = kernel.warmup(*arguments, grid=grid, **options)[grid]
        self._others = arguments[3:]
        self._device = torch.cuda.current_device()

    def is_current(self) -> bool:
        """Whether a launch goes to the device that this one was prepared for."""
        return torch.cuda.current_device() == self._device

    def __call__(self, x: int, y: int, mask: int | None = None) -> None:
        """Launch on the tensors at these addresses, which are multiples of 16 bytes, the widest access."""
        self._run(x, y, mask, *self._others)


def prepare(
    values: Tensor,
    counts: Tensor,
    *,
    mask: Tensor | None,
    y: Tensor,
    activation: str,
    parameters: Sequence[float],
) -> PreparedLaunch:
    """Prepare `add_states` for tensors like these, all of them at multiples of 16 bytes; see there for the arguments."""
    with torch.cuda.device_of(values):
        return PreparedLaunch(*_arguments(values, counts, None, mask, None, y, activation, parameters, None, None))


def _arguments(values, counts, edges, mask, nan, y, activation, parameters, weight, launch):
    """Return the kernel for the arguments of `add_states`, its grid, its arguments and its options."""
    launch = launch or LAUNCHES[_line(values, edges)]
    pointers = (values, y, mask, counts, nan, weight)
    # A single slope is that of every channel. Edges between two float32 numbers are rounded up: x >= edge stays exact.
    weight_stride = 0 if weight is None or weight.numel() == 1 else weight.stride(0)
    numbers = (tuple(parameters), tuple(_float32_from(edge) for edge in edges or ()))
    constants = tile(values.shape, values.element_size(), launch)
    arguments_of = _rows_arguments if values.ndim == 2 else _planes_arguments
    kernel, programs, sizes = arguments_of(values, y, weight_stride, constants, launch)
    arguments = (*pointers, *sizes, *numbers, activation, launch.stages, *constants.values())
    return kernel, (programs, 1, 1), arguments, {"num_warps": launch.num_warps, "enable_fp_fusion": True}


def _rows_arguments(values, y, weight_stride: int, constants: dict[str, int], launch: Launch):
    rows, channels = values.shape
    channel_blocks = triton.cdiv(channels, constants["BLOCK_CHANNELS"])
    tiles = triton.cdiv(rows, constants["BLOCK_ROWS"])
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_ROWS"], constants["BLOCK_ROWS"] > _MOST_NARROW.value)
    strip_rows = constants["BLOCK_ROWS"] * min(longest, _strip(values, tiles, channel_blocks, launch))
    y_row_stride = channels if y is None else y.stride(0)
    sizes = (rows, channels, values.stride(0), y_row_stride, weight_stride, strip_rows)
    return states_rows_kernel, triton.cdiv(rows, strip_rows) * channel_blocks, sizes


def _planes_arguments(values, y, weight_stride: int, constants: dict[str, int], launch: Launch):
    outer, channels, inner = values.shape
    channel_blocks = triton.cdiv(channels, constants["BLOCK_CHANNELS"])
    tiles = outer * triton.cdiv(inner, constants["BLOCK_INNER"])
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_INNER"], True)
    strip = min(longest, _strip(values, tiles, channel_blocks, launch))
    sizes = (tiles, channels, inner // constants["INNER_MULTIPLE"], weight_stride, strip)
    return states_planes_kernel, triton.cdiv(tiles, strip) * channel_blocks, sizes


def tile(shape: Sequence[int], element_size: int, launch: Launch) -> dict[str, int]:
    """Return the compile-time sizes of the kernel for values of that shape and `element_size` bytes, in the kernel's order."""
    size, row = launch.tile_bytes // element_size, launch.row_bytes // element_size
    # What all threads read in one access of 16 bytes each.
    access = launch.num_warps * 32 * 16 // element_size
    channels = triton.next_power_of_2(shape[1])
    if len(shape) == 2:
        block_channels = min(channels, row)
        block_rows = size // block_channels
        repeats = min(max(1, size // access), block_rows)
        return {"REPEATS": repeats, "BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels}
    block_inner = min(triton.next_power_of_2(shape[2]), row)
    return {
        "REPEATS": max(1, block_inner // access),
        "INNER_MULTIPLE": largest_power_of_2(shape[2]),
        "BLOCK_CHANNELS": min(channels, size // block_inner),
        "BLOCK_INNER": block_inner,
    }


def largest_power_of_2(size: int) -> int:
    """Return the largest power of two that divides `size`, up to 16: beyond, no access gets wider."""
    return size & -size if size % 16 else 16


def _line(values: Tensor, edges: Sequence[float] | None) -> str:
    """Choose the line of LAUNCHES."""
    layout = "rows" if values.ndim == 2 else "planes"
    if edges:
        return f"histogram {layout}"
    is_small = values.numel() * values.element_size() < _multiprocessors(values) * SMALL_BELOW[layout]
    return f"small {layout}" if is_small else layout


def _strip(values: Tensor, tiles: int, channel_blocks: int, launch: Launch) -> int:
    """How many of the `tiles` of one block of channels a program reads, for as many programs as are aimed at."""
    programs = _multiprocessors(values) * launch.programs_per_multiprocessor
    return max(launch.shortest_strip, tiles * channel_blocks // programs)


def _longest_strip(repeats: int, positions: int, is_wide: bool) -> int:
    """How many tiles of so many positions a program can count, of which a lane holds `repeats` in a tile.

    Where a tile is not wide, nor is the strip.
    """
    most_counted, most_summed = int(_MOST_COUNTED.value), int(_MOST_SUMMED.value)
    return min(most_counted // repeats, (most_summed if is_wide else most_counted) // positions)


def _multiprocessors(values: Tensor) -> int:
    count: int = torch.cuda.get_device_properties(values.device).multi_processor_count if values.is_cuda else 1
    return count


def _float32_from(edge: float) -> float:
    """Return the smallest float32 that is not below `edge`."""
    with np.errstate(over="ignore"):
        rounded = np.float32(edge)
    return float(rounded if float(rounded) >= edge else np.nextafter(rounded, np.float32(np.inf)))
