"""CPU: states counted, with identity or relu in the same pass, by loops that Numba compiles on their first use.

A state is read from the bits, as unsigned integers: with the sign bit apart, the values from 1 to infinity's pattern
are the numbers, what lies above is NaN and 0 is zero. So one loop serves float32 and both 16-bit formats, its sums are
as narrow as its values (the widest vectors), and a flushed subnormal cannot change a count.

The loops run in the OpenMP team of PyTorch. Numba's own parallel loops bring a second team, and two teams whose
threads wait by spinning take the cores from each other: a relu after such a loop cost 8 ms in place of 0.7 ms.
"""

# Numba replaces functions and types that mypy cannot follow.
# mypy: disable-error-code="attr-defined, call-arg, misc, no-untyped-def, no-untyped-call, var-annotated"
from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

FUSED_ACTIVATIONS = ("identity", "relu")

# dtype -> the unsigned integer of its width, the bits of infinity, the sign bit
_FORMATS: dict[torch.dtype, tuple[Any, int, int]] = {
    torch.float32: (np.uint32, 0x7F800000, 0x80000000),
    torch.bfloat16: (np.uint16, 0x7F80, 0x8000),
    torch.float16: (np.uint16, 0x7C00, 0x8000),
}

_LONGEST_RUN = 1 << 15  # values summed before a 16-bit sum could overflow
# Rows are read as they lie in memory, and the sums of all their channels are visited for each row. As bytes these stay
# in the first-level cache up to 4,096 channels; blocks of channels would keep more, but break the prefetched stream.
_LONGEST_BYTE_SUM = 255
_FOLDED_WIDTH = 1024  # values: narrower rows are read several at once, a longer loop for the same channels
_SMALLEST_PLANE = 256  # values: a plane below it is too short a loop, and is read as a stretch of a row
_SMALLEST_TASK = 1 << 15  # values; below it another thread costs more than it saves (PyTorch's grain size)
_ROWS_PER_TASK = 16  # at least: a task clears and adds up 24 bytes for every channel

_COUNTS_LOCK = threading.Lock()  # two Python threads may count into one tensor

# What a team works on: addresses and sizes in elements. The team's threads take tasks by counting `next_task` up.
_JOB = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("next_task", "tasks", "x", "y", "mask", "tiles", "outer", "channels", "inner", "x_row_stride", "fold"),
            *("infinity", "sign", "cleared_off"),
        )
    ]
)
_Job = from_dtype(_JOB)


@intrinsic
def _take_task(typing_context, job):
    """Return next_task, the first field of a job, and count it up: one atomic addition."""

    def generate(context, builder, signature, arguments):
        counter = builder.bitcast(arguments[0], cgutils.intp_t.as_pointer())
        return builder.atomic_rmw("add", counter, cgutils.intp_t(1), "monotonic")

    return types.int64(job), generate


@intrinsic
def _pointer(typing_context, address):
    """Return an address as the pointer that carray wants."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(nogil=True)
def _count_run(x, y, mask, infinity, sign, cleared_off):
    """Count the states of at most _LONGEST_RUN values of one channel; y takes them, off ones without `cleared_off`."""
    unsigned = x.dtype.type
    one, off, zero, on = unsigned(1), unsigned(0), unsigned(0), unsigned(0)
    for i in range(x.size):
        bits = x[i]
        is_off = unsigned(bits - sign - one) < infinity
        is_zero = unsigned(bits + bits) == 0
        is_on = unsigned(bits - one) < infinity
        if y is not None:
            y[i] = bits & ~unsigned(cleared_off * unsigned(is_off))
        if mask is not None:
            is_off, is_zero, is_on = is_off & mask[i], is_zero & mask[i], is_on & mask[i]
        off, zero, on = unsigned(off + is_off), unsigned(zero + is_zero), unsigned(on + is_on)
    return off, zero, on


@njit(nogil=True)
def _count_row(x, y, counted, sums, infinity, sign, cleared_off):
    """Add the states of one row to `sums` [state, channel], where `counted` is not None and not False."""
    unsigned = x.dtype.type
    one = unsigned(1)
    off, zero, on = sums[0], sums[1], sums[2]
    for channel in range(x.size):
        bits = x[channel]
        is_off = unsigned(bits - sign - one) < infinity
        is_zero = unsigned(bits + bits) == 0
        is_on = unsigned(bits - one) < infinity
        if y is not None:
            y[channel] = bits & ~unsigned(cleared_off * unsigned(is_off))
        if counted is not None:
            is_off, is_zero, is_on = is_off & counted, is_zero & counted, is_on & counted
        off[channel] += is_off
        zero[channel] += is_zero
        on[channel] += is_on


@njit(nogil=True)
def _add_sums(sums, tile, repeat):
    """Move `sums` [state, channel * repeat] to `tile` [state, channel]."""
    for state in range(3):
        if repeat == 1:
            for channel in range(tile.shape[1]):
                tile[state, channel] += sums[state, channel]
        else:
            for channel in range(tile.shape[1]):
                total = 0
                for i in range(repeat):
                    total += sums[state, channel * repeat + i]
                tile[state, channel] += total
    sums[:] = 0


@njit(nogil=True)
def _count_strip(x, x_row_stride, y, mask, rows, width, tile, repeat, infinity, sign, cleared_off):
    """Add the states of `rows` rows, `width` values each, to `tile` [state, width // repeat]."""
    sums = np.zeros((3, width), np.uint8)
    for row in range(rows):
        _count_row(
            x[row * x_row_stride : row * x_row_stride + width],
            None if y is None else y[row * width : (row + 1) * width],
            None if mask is None else mask[row],
            sums,
            infinity,
            sign,
            cleared_off,
        )
        if row % _LONGEST_BYTE_SUM == _LONGEST_BYTE_SUM - 1:
            _add_sums(sums, tile, repeat)
    _add_sums(sums, tile, repeat)


@cache
def _rows_task(unsigned: Any, writes: bool, masked: bool) -> Any:
    """Compile what a thread does with rows: while there are tasks, take one and count its strip of rows.

    A strip of narrow contiguous rows is read as rows `fold` times as wide, and what is left of it as rows of its own.
    A row holds every channel `inner` times.
    """

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def rows_task(job_pointer):
        job = carray(job_pointer, 1)[0]
        rows, channels, inner, fold, x_row_stride = job.outer, job.channels, job.inner, job.fold, job.x_row_stride
        infinity, sign, cleared_off = unsigned(job.infinity), unsigned(job.sign), unsigned(job.cleared_off)
        width = channels * inner
        x = carray(_pointer(job.x), (rows - 1) * x_row_stride + width, unsigned)
        y = carray(_pointer(job.y), rows * width, unsigned) if writes else None
        mask = carray(_pointer(job.mask), rows, np.bool_) if masked else None
        tiles = carray(_pointer(job.tiles), (job.tasks, 3, fold * channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            row, end = rows * task // job.tasks, rows * (task + 1) // job.tasks
            while row < end:
                together = fold if row + fold <= end else 1
                strip = (end - row) // together
                _count_strip(
                    x[row * x_row_stride :],
                    x_row_stride * together,
                    y[row * width :] if writes else None,
                    mask[row:] if masked else None,
                    strip,
                    width * together,
                    tiles[task][:, : channels * together],
                    inner,
                    infinity,
                    sign,
                    cleared_off,
                )
                row += strip * together
            task = _take_task(job_pointer)

    return rows_task


@cache
def _planes_task(unsigned: Any, writes: bool, masked: bool) -> Any:
    """Compile what a thread does with planes: while there are tasks, take one and count its stretch of memory."""

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def planes_task(job_pointer):
        job = carray(job_pointer, 1)[0]
        channels, inner = job.channels, job.inner
        size = job.outer * channels * inner
        infinity, sign, cleared_off = unsigned(job.infinity), unsigned(job.sign), unsigned(job.cleared_off)
        x = carray(_pointer(job.x), size, unsigned)
        y = carray(_pointer(job.y), size, unsigned) if writes else None
        mask = carray(_pointer(job.mask), job.outer * inner, np.bool_) if masked else None
        tiles = carray(_pointer(job.tiles), (job.tasks, 3, channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            tile = tiles[task]
            start, end = size * task // job.tasks, size * (task + 1) // job.tasks
            while start < end:
                plane = start // inner
                channel = plane % channels
                stop = min(end, (plane + 1) * inner, start + _LONGEST_RUN)
                mask_start = plane // channels * inner + start - plane * inner
                off, zero, on = _count_run(
                    x[start:stop],
                    y[start:stop] if writes else None,
                    mask[mask_start : mask_start + stop - start] if masked else None,
                    infinity,
                    sign,
                    cleared_off,
                )
                tile[0, channel] += off
                tile[1, channel] += zero
                tile[2, channel] += on
                start = stop
            task = _take_task(job_pointer)

    return planes_task


def count_states(values: Tensor, counts: Tensor, mask: Tensor | None = None) -> None:
    """Add the states of `values`, arranged as rows or planes (see `layout.Arranged`), to `counts` in place."""
    _run(values, None, counts, mask, cleared_off=0)


def activation_states(values: Tensor, counts: Tensor, activation: str, mask: Tensor | None = None) -> Tensor:
    """Return the activation of `values`, contiguous, and add the states of `values` to `counts` in place."""
    y = torch.empty(values.shape, dtype=values.dtype)
    _run(values, y, counts, mask, cleared_off=-1 if activation == "relu" else 0)
    return y


def _run(values: Tensor, y: Tensor | None, counts: Tensor, mask: Tensor | None, cleared_off: int) -> None:
    unsigned, infinity, sign = _FORMATS[values.dtype]
    outer, channels = values.shape[:2]
    inner = values.shape[2] if values.ndim == 3 else 1
    as_rows = values.ndim == 2 or (inner < _SMALLEST_PLANE and mask is None)
    row_stride, fold = values.stride(0), 1
    if as_rows and mask is None and row_stride == channels * inner:
        fold = max(1, _FOLDED_WIDTH // row_stride)
    smallest_task = max(_SMALLEST_TASK, _ROWS_PER_TASK * channels)
    tasks = max(1, min(torch.get_num_threads(), values.numel() // smallest_task))
    tiles = torch.zeros(tasks, 3, fold, channels, dtype=torch.int64)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (values, y, mask, tiles)]
    sizes = (outer, channels, inner, row_stride, fold)
    job = np.array([(0, tasks, *addresses, *sizes, infinity, sign, cleared_off)], _JOB)
    compiled = (_rows_task if as_rows else _planes_task)(unsigned, y is not None, mask is not None)
    _run_team(compiled, job, tasks)
    sums = tiles.sum((0, 2)).T
    with _COUNTS_LOCK:
        counts += sums


def _run_team(compiled: Any, job: np.ndarray[Any, Any], threads: int) -> None:
    """Run a compiled task function on a team of PyTorch's threads, without the GIL.

    Tasks are taken, not assigned: a team smaller than asked for, or no OpenMP at all, does all of them as well.
    """
    parallel = _openmp_parallel()
    if threads > 1 and parallel is not None:
        parallel(compiled.address, job.ctypes.data, threads, 0)
    else:
        compiled.ctypes(job.ctypes.data)


@cache
def _openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Find GOMP_parallel(function, argument, threads, flags), which GNU's, LLVM's and Intel's OpenMP all have.

    `import torch` has put its own OpenMP into the global scope. None where there is none (Windows).
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
