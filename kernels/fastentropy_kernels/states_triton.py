"""GPU: an activation and the states of its input in one pass, or the states alone.

Nothing is summed over a tile while a strip is read: every lane keeps its own three counts, ten bits wide, in one int32.
They are summed over the tile and added to memory once, when the strip is done.
"""

# Kernels have no types of their own, and Triton none for its decorator.
# mypy: disable-error-code="misc, no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Where the three counts of a lane lie in its int32, and how far each can count: the longest strip, in tiles.
_ON: tl.constexpr = tl.constexpr(1)
_OFF: tl.constexpr = tl.constexpr(1 << 10)
_ZERO: tl.constexpr = tl.constexpr(1 << 20)
_LONGEST_STRIP: tl.constexpr = tl.constexpr((1 << 10) - 1)


@triton.jit
def _states_rows_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    rows,
    channels,
    x_row_stride,
    y_row_stride,
    strip_rows,
    ACTIVATION: tl.constexpr,  # noqa: N803
    WRITES_Y: tl.constexpr,  # noqa: N803
    HAS_MASK: tl.constexpr,  # noqa: N803
    BLOCK_ROWS: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
):
    """One program: `strip_rows` rows, BLOCK_CHANNELS wide, in tiles of BLOCK_ROWS x BLOCK_CHANNELS.

    Neighbouring programs hold neighbouring channels of the same rows. Counts leave the registers once, after the strip.
    """
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    channel = program % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first_row = program // channel_blocks * strip_rows
    last_row = tl.minimum(first_row + strip_rows, rows)
    counts = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
    for start in range(first_row, last_row, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        x = _load(x_ptr + row[:, None] * x_row_stride + channel[None, :], inside)
        if WRITES_Y:
            y = _activate(x, ACTIVATION)
            tl.store(y_ptr + row[:, None] * y_row_stride + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        state = _state(x)
        if HAS_MASK:
            counted = tl.load(mask_ptr + row, mask=row < rows, other=0)
            state = tl.where(counted[:, None], state, 0)
        counts += state
    _add_counts(counts_ptr, counts, 0, channel, channels)


@triton.jit
def _states_planes_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    counts_ptr,
    outer,
    channels,
    inner_multiples,
    strip,
    ACTIVATION: tl.constexpr,  # noqa: N803
    WRITES_Y: tl.constexpr,  # noqa: N803
    HAS_MASK: tl.constexpr,  # noqa: N803
    INNER_MULTIPLE: tl.constexpr,  # noqa: N803
    BLOCK_CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK_INNER: tl.constexpr,  # noqa: N803
):
    """One program: BLOCK_CHANNELS channels and `strip` of the tiles that these channels have over outer and inner.

    A tile is BLOCK_CHANNELS x BLOCK_INNER values of one outer index. Planes are `inner_multiples * INNER_MULTIPLE`
    long: a product tells the compiler the alignment of every plane. Counts leave the registers once, after the strip.
    """
    inner = inner_multiples * INNER_MULTIPLE
    program = tl.program_id(0).to(tl.int64)
    channel_blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    channel = program % channel_blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inner_blocks = tl.cdiv(inner, BLOCK_INNER)
    first_tile = program // channel_blocks * strip
    last_tile = tl.minimum(first_tile + strip, outer.to(tl.int64) * inner_blocks)
    counts = tl.zeros((BLOCK_CHANNELS, BLOCK_INNER), tl.int32)
    for tile in range(first_tile, last_tile):
        image = tile // inner_blocks
        position = tile % inner_blocks * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
        inside = (channel < channels)[:, None] & (position < inner)[None, :]
        offset = (image * channels + channel)[:, None] * inner + position[None, :]
        x = _load(x_ptr + offset, inside)
        if WRITES_Y:
            tl.store(y_ptr + offset, _activate(x, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)
        state = _state(x)
        if HAS_MASK:
            counted = tl.load(mask_ptr + image * inner + position, mask=position < inner, other=0)
            state = tl.where(counted[None, :], state, 0)
        counts += state
    _add_counts(counts_ptr, counts, 1, channel, channels)


@triton.jit
def _load(pointers, inside):
    """Load as float32; what lies outside reads as NaN, which is in no state and so needs no test of its own."""
    return tl.load(pointers, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _state(x):
    return tl.where(x > 0, _ON, tl.where(x < 0, _OFF, tl.where(x == 0, _ZERO, 0)))


@triton.jit
def _add_counts(counts_ptr, counts, AXIS: tl.constexpr, channel, channels):  # noqa: N803
    """Sum the lanes' counts over AXIS and add them to `counts_ptr` [channels, 3], an atomic for each that is not 0."""
    off = tl.sum(counts // _OFF & _LONGEST_STRIP, AXIS)
    zero = tl.sum(counts // _ZERO & _LONGEST_STRIP, AXIS)
    on = tl.sum(counts & _LONGEST_STRIP, AXIS)
    row_ptr = counts_ptr + channel * 3
    inside = channel < channels
    tl.atomic_add(row_ptr, off.to(tl.int64), mask=inside & (off != 0), sem="relaxed")
    tl.atomic_add(row_ptr + 1, zero.to(tl.int64), mask=inside & (zero != 0), sem="relaxed")
    tl.atomic_add(row_ptr + 2, on.to(tl.int64), mask=inside & (on != 0), sem="relaxed")


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):  # noqa: N803
    """The activation named in `reference.ACTIVATIONS`, of float32; NaN stays NaN."""
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        return _relu6(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid 2u
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        return x * _relu6(x + 3.0) / 6.0
    elif ACTIVATION == "mish":
        # tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); from 20 on it is 1 in float32
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    elif ACTIVATION == "softplus":
        return tl.where(x > 20.0, x, _log1p(tl.exp(tl.where(x > 20.0, 20.0, x))))
    else:
        tl.static_assert(ACTIVATION == "selu", "unknown activation")
        return 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * _expm1(tl.where(x > 0, 0.0, x)))


@triton.jit
def _relu6(x):
    return tl.where(x < 0, 0.0, tl.where(x > 6.0, 6.0, x))


@triton.jit
def _log1p(e):
    """log(1 + e) for e >= 0, accurate where 1 + e rounds: log(u) e / (u - 1) (Kahan; see Higham 2002, 1.14.1)."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))


@triton.jit
def _expm1(x):
    """e^x - 1 for x <= 0, by the same formula the other way round."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, (u - 1.0) * (x / tl.log(u))))


INTERPRETED = not isinstance(_states_rows_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when this module was imported."""

# A tile is 8 KB: 4 warps of 16-byte accesses, 4 of them in flight per thread, enough to hide the latency of memory at
# half of a multiprocessor's threads and few enough that counts, x and y stay in registers.
NUM_WARPS = 4
_TILE_BYTES = 8192
# A tile of rows is 256 bytes wide. Each row of it is two whole 128-byte lines; wider, the strip has fewer rows, and
# every program pays its atomics for fewer values.
_TILE_ROW_BYTES = 256
# 8 programs of 4 warps fill half of a multiprocessor's threads: one wave, as few atomics as that allows.
_PROGRAMS_PER_MULTIPROCESSOR = 8


def count_states(values: Tensor, counts: Tensor, mask: Tensor | None = None) -> None:
    """Add the states of `values`, arranged as rows or planes (see `layout.Arranged`), to `counts` in place."""
    _launch(values, None, counts, "identity", mask)


def activation_states(values: Tensor, counts: Tensor, activation: str, mask: Tensor | None = None) -> Tensor:
    """Return the activation of `values`, contiguous, and add the states of `values` to `counts` in place."""
    y = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    _launch(values, y, counts, activation, mask)
    return y


def _launch(values: Tensor, y: Tensor | None, counts: Tensor, activation: str, mask: Tensor | None) -> None:
    launch = _launch_rows if values.ndim == 2 else _launch_planes
    # A launch goes to the current device, which need not be the tensor's. Nothing changes for a CPU tensor.
    with torch.cuda.device_of(values):
        launch(values, y, counts, activation, mask)


def _launch_rows(values: Tensor, y: Tensor | None, counts: Tensor, activation: str, mask: Tensor | None) -> None:
    rows, channels = values.shape
    block_rows, block_channels = rows_tile(channels, values.element_size())
    channel_blocks = triton.cdiv(channels, block_channels)
    strip_rows = block_rows * _strip(values, triton.cdiv(rows, block_rows), channel_blocks)
    _states_rows_kernel[(triton.cdiv(rows, strip_rows) * channel_blocks,)](
        values,
        y,
        mask,
        counts,
        rows,
        channels,
        values.stride(0),
        channels,
        strip_rows,
        ACTIVATION=activation,
        WRITES_Y=y is not None,
        HAS_MASK=mask is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block_channels,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def _launch_planes(values: Tensor, y: Tensor | None, counts: Tensor, activation: str, mask: Tensor | None) -> None:
    outer, channels, inner = values.shape
    block_channels, block_inner = planes_tile(channels, inner, values.element_size())
    inner_multiple = inner & -inner if inner % 16 else 16  # the largest power of two in inner, up to 16
    channel_blocks = triton.cdiv(channels, block_channels)
    tiles = outer * triton.cdiv(inner, block_inner)
    strip = _strip(values, tiles, channel_blocks)
    _states_planes_kernel[(triton.cdiv(tiles, strip) * channel_blocks,)](
        values,
        y,
        mask,
        counts,
        outer,
        channels,
        inner // inner_multiple,
        strip,
        ACTIVATION=activation,
        WRITES_Y=y is not None,
        HAS_MASK=mask is not None,
        INNER_MULTIPLE=inner_multiple,
        BLOCK_CHANNELS=block_channels,
        BLOCK_INNER=block_inner,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )


def rows_tile(channels: int, element_size: int) -> tuple[int, int]:
    """BLOCK_ROWS and BLOCK_CHANNELS for values of `element_size` bytes."""
    block_channels = min(triton.next_power_of_2(channels), _TILE_ROW_BYTES // element_size)
    return _TILE_BYTES // element_size // block_channels, block_channels


def planes_tile(channels: int, inner: int, element_size: int) -> tuple[int, int]:
    """BLOCK_CHANNELS and BLOCK_INNER for values of `element_size` bytes."""
    block_inner = min(triton.next_power_of_2(inner), _TILE_BYTES // element_size)
    return min(triton.next_power_of_2(channels), _TILE_BYTES // element_size // block_inner), block_inner


def _strip(values: Tensor, tiles: int, channel_blocks: int) -> int:
    """How many of the `tiles` of one block of channels a program reads: one wave of programs over the device."""
    multiprocessors: int = 1
    if values.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(values.device).multi_processor_count
    programs = multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
    return min(max(1, tiles * channel_blocks // programs), int(_LONGEST_STRIP.value))
