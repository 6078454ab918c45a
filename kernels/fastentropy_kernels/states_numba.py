"""CPU: states counted, with identity, relu or relu6 in the same pass, by loops that Numba compiles on their first use.

The states of float32 are three comparisons. Those of the 16-bit formats are read from the bits, as integers: with the
sign bit apart, the values from 1 to infinity's pattern are the numbers, what lies above is NaN and 0 is zero. So sums are
as narrow as values (the widest vectors). An activation is written as bits too: relu clears those of what is off, and
relu6 puts those of 6 in place of all from there up to infinity's. Whether bits lie in such a range is one comparison
after the addition, wrapping, that takes the range's first pattern to the least integer. It is signed: x86 had no unsigned
one before AVX-512, and needs two instructions in its place. Where subnormals are flushed, float32 is read from its bits,
too, so that a flushed one does not change a count.

The loops run in the OpenMP team of PyTorch. Numba's own parallel loops bring a second team, and two teams whose
threads wait by spinning take the cores from each other: a relu after such a loop cost 8 ms in place of 0.7 ms.
"""

# Numba replaces functions and types that mypy cannot follow.
# mypy: disable-error-code="attr-defined, call-arg, misc, no-untyped-def, no-untyped-call, var-annotated"
from __future__ import annotations

import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor


class _Format(NamedTuple):
    """The integers that a floating dtype is read as."""

    signed: Any
    positive: int  # every bit but the sign
    infinity: int  # its bits
    six: int  # its bits


_FORMATS = {
    torch.float32: _Format(np.int32, 0x7FFFFFFF, 0x7F800000, 0x40C00000),
    torch.bfloat16: _Format(np.int16, 0x7FFF, 0x7F80, 0x40C0),
    torch.float16: _Format(np.int16, 0x7FFF, 0x7C00, 0x4600),
}

_LONGEST_RUN = 1 << 14  # values summed before a 16-bit sum could overflow
# Rows are read as they lie in memory, and the sums of all their channels are visited for every two. As bytes these stay
# in the first-level cache up to 4,096 channels; blocks of channels would keep more, but break the prefetched stream.
_LONGEST_BYTE_SUM = 254
_FOLDED_WIDTH = 4096  # values: narrower rows are read several at once, a longer loop for the same channels
# Bytes of a value -> values: a plane below it is too short a loop, and is read as a stretch of a row, which pays the more
# the more rows share the sums of a task. What those cost besides is as much as four rows.
_SMALLEST_PLANE = {4: 96, 2: 256}
_ROWS_FOR_SUMS = 4
_SMALLEST_TASK = 1 << 15  # values; below it another thread costs more than it saves (PyTorch's grain size)
_ROWS_PER_TASK = 16  # at least: a task clears and adds up 24 bytes for every channel
_LEAST = 5e-324  # above zero, but where this thread flushes subnormals
_LONG_COMPILATION = 1.0  # seconds, from which on the user is told

_COUNTS_LOCK = threading.Lock()  # two Python threads may count into one tensor
_workspace = threading.local()
_told_of_compilation = threading.Event()
_logger = logging.getLogger(__name__)


class _JobStructure(ctypes.Structure):
    """What a team works on: addresses, and sizes in elements. Its threads take tasks by counting `next_task` up."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                *("next_task", "tasks", "x", "y", "mask", "thresholds", "tiles", "counts", "nan"),
                *("outer", "channels", "inner", "x_row_stride", "y_row_stride", "fold", "columns", "positions", "limit"),
            )
        ),
        ("floor", ctypes.c_double),
        ("ceiling", ctypes.c_double),
    )


_Job = from_dtype(np.dtype(_JobStructure))


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
def _is_off(value, limit):
    """Return 1 for a number below zero, else 0.

    `limit` is the least integer plus infinity's bits; None where values are floats, not their bits.
    """
    kind = type(value)
    if limit is None:
        return np.int32(value < kind(0))
    return kind(kind(value - kind(1)) < limit)


@njit(nogil=True)
def _is_zero(value, limit):
    """Return 1 for zero of either sign, else 0."""
    kind = type(value)
    if limit is None:
        return np.int32(value == kind(0))
    return kind(kind(value + value) == 0)


@njit(nogil=True)
def _is_on(value, limit):
    """Return 1 for a number above zero, else 0."""
    kind = type(value)
    if limit is None:
        return np.int32(value > kind(0))
    return _is_above(value, kind(0), limit)


@njit(nogil=True)
def _is_above(bits, floor, limit):
    """Return 1 for a number above one that is not negative, whose bits are `floor`, else 0."""
    signed = type(bits)
    return signed(signed(bits + signed(np.iinfo(bits).max - floor)) < signed(limit - floor))


@njit(nogil=True)
def _within(value, floor, ceiling):
    """Return the value, or the floor or the ceiling in place of one beyond it; NaN is beyond neither."""
    raised = floor if value < floor else value
    if ceiling is None:
        return raised
    return ceiling if raised > ceiling else raised


@njit(nogil=True)
def _activated(value, is_off, limit, floor, ceiling):
    """Return y: 0 for what is off, or everything where the floor lets it pass, and the ceiling for a number above it."""
    kind = type(value)
    if limit is None:
        return _within(value, floor, ceiling)
    kept = kind(value & kind(floor | kind(is_off - kind(1))))
    if ceiling is None:
        return kept
    return ceiling if _is_above(value, ceiling, limit) else kept


@njit(nogil=True)
def _count_run(x, y, mask, limit, floor, ceiling, inplace):
    """Return how many of at most _LONGEST_RUN values are off, zero and on; y takes what `_activated` makes of them."""
    off = zero = on = _is_off(x.dtype.type(0), limit)
    narrow = type(off)
    for i in range(x.size):
        value = x[i]
        is_off, is_zero, is_on = _is_off(value, limit), _is_zero(value, limit), _is_on(value, limit)
        if inplace:
            x[i] = _activated(value, is_off, limit, floor, ceiling)
        elif y is not None:
            y[i] = _activated(value, is_off, limit, floor, ceiling)
        if mask is not None:
            is_off, is_zero, is_on = is_off & mask[i], is_zero & mask[i], is_on & mask[i]
        off, zero, on = narrow(off + is_off), narrow(zero + is_zero), narrow(on + is_on)
    return off, zero, on


@njit(nogil=True)
def _count_two_rows(x0, x1, y0, y1, sums, limit, floor, ceiling, inplace):
    """Add the states of two rows, in one visit to the sums, to the byte sums [state, position]; write y."""
    off, zero, on = sums[0], sums[1], sums[2]
    for i in range(x0.size):
        a, b = x0[i], x1[i]
        off_a, off_b = _is_off(a, limit), _is_off(b, limit)
        if inplace:
            x0[i] = _activated(a, off_a, limit, floor, ceiling)
            x1[i] = _activated(b, off_b, limit, floor, ceiling)
        elif y0 is not None:
            y0[i] = _activated(a, off_a, limit, floor, ceiling)
            y1[i] = _activated(b, off_b, limit, floor, ceiling)
        off[i] += np.uint8(off_a + off_b)
        zero[i] += np.uint8(_is_zero(a, limit) + _is_zero(b, limit))
        on[i] += np.uint8(_is_on(a, limit) + _is_on(b, limit))


@njit(nogil=True)
def _count_row(x, y, sums, limit, floor, ceiling, inplace):
    """Do the same for one row."""
    off, zero, on = sums[0], sums[1], sums[2]
    for i in range(x.size):
        value = x[i]
        is_off = _is_off(value, limit)
        if inplace:
            x[i] = _activated(value, is_off, limit, floor, ceiling)
        elif y is not None:
            y[i] = _activated(value, is_off, limit, floor, ceiling)
        off[i] += np.uint8(is_off)
        zero[i] += np.uint8(_is_zero(value, limit))
        on[i] += np.uint8(_is_on(value, limit))


@njit(nogil=True)
def _add_sums(sums, tile, inner):
    """Move `sums` [state, (row, channel, position inside of a plane)] to `tile` [state, channel]."""
    channels = tile.shape[1]
    for state in range(3):
        for start in range(0, sums.shape[1], channels * inner):
            row = sums[state, start : start + channels * inner]
            if inner == 1:
                for channel in range(channels):
                    tile[state, channel] += row[channel]
            else:
                for channel in range(channels):
                    plane = row[channel * inner : (channel + 1) * inner]
                    total = 0
                    for i in range(plane.size):
                        total += plane[i]
                    tile[state, channel] += total
    sums[:] = 0


@njit(nogil=True)
def _count_strip(x, x_row_stride, y, y_row_stride, mask, rows, width, tile, inner, limit, floor, ceiling, inplace):
    """Add the states of `rows` rows, `width` values each, to `tile` [state, channel]."""
    sums = np.zeros((3, width), np.uint8)
    uncounted = sums if mask is None else np.zeros((3, width), np.uint8)
    row = summed = 0
    while row < rows:
        x0 = x[row * x_row_stride : row * x_row_stride + width]
        y0 = None if y is None else y[row * y_row_stride : row * y_row_stride + width]
        if mask is None and row + 1 < rows:
            x1 = x[(row + 1) * x_row_stride : (row + 1) * x_row_stride + width]
            y1 = None if y is None else y[(row + 1) * y_row_stride : (row + 1) * y_row_stride + width]
            _count_two_rows(x0, x1, y0, y1, sums, limit, floor, ceiling, inplace)
            row += 2
        else:
            counted = mask is None or mask[row]
            if counted or y is not None or inplace:
                _count_row(x0, y0, sums if counted else uncounted, limit, floor, ceiling, inplace)
            row += 1
        summed += 2
        if summed == _LONGEST_BYTE_SUM:
            _add_sums(sums, tile, inner)
            summed = 0
    _add_sums(sums, tile, inner)


def _rows_task(kind: Any, writes: bool, inplace: bool, clipped: bool, masked: bool) -> Any:
    """Compile what a thread does with rows: while there are tasks, take one and count its strip of rows.

    A strip of narrow contiguous rows is read as rows `fold` times as wide, and what is left of it as rows of its own.
    A row holds every channel `inner` times.
    """
    floats = kind is np.float32

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def rows_task(job_pointer):
        job = carray(job_pointer, 1)[0]
        rows, channels, inner, fold = job.outer, job.channels, job.inner, job.fold
        x_row_stride, y_row_stride = job.x_row_stride, job.y_row_stride
        limit = None if floats else kind(job.limit)
        floor = kind(job.floor)
        ceiling = kind(job.ceiling) if clipped else None
        width = channels * inner
        x = carray(_pointer(job.x), (rows - 1) * x_row_stride + width, kind)
        y = carray(_pointer(job.y), (rows - 1) * y_row_stride + width, kind) if writes else None
        mask = carray(_pointer(job.mask), rows, np.bool_) if masked else None
        tiles = carray(_pointer(job.tiles), (job.tasks, 3, channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            row, end = rows * task // job.tasks, rows * (task + 1) // job.tasks
            while row < end:
                together = fold if row + fold <= end else 1
                strip = (end - row) // together
                _count_strip(
                    x[row * x_row_stride :],
                    x_row_stride * together,
                    None if y is None else y[row * y_row_stride :],
                    y_row_stride * together,
                    mask[row:] if masked else None,
                    strip,
                    width * together,
                    tiles[task],
                    inner,
                    limit,
                    floor,
                    ceiling,
                    inplace,
                )
                row += strip * together
            task = _take_task(job_pointer)

    return rows_task


def _planes_task(kind: Any, writes: bool, inplace: bool, clipped: bool, masked: bool) -> Any:
    """Compile what a thread does with planes: while there are tasks, take one and count its stretch of memory."""
    floats = kind is np.float32

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def planes_task(job_pointer):
        job = carray(job_pointer, 1)[0]
        channels, inner = job.channels, job.inner
        size = job.outer * channels * inner
        limit = None if floats else kind(job.limit)
        floor = kind(job.floor)
        ceiling = kind(job.ceiling) if clipped else None
        x = carray(_pointer(job.x), size, kind)
        y = carray(_pointer(job.y), size, kind) if writes else None
        mask = carray(_pointer(job.mask), job.outer * inner, np.bool_) if masked else None
        tiles = carray(_pointer(job.tiles), (job.tasks, 3, channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            start, end = size * task // job.tasks, size * (task + 1) // job.tasks
            while start < end:
                plane = start // inner
                stop = min(end, (plane + 1) * inner, start + _LONGEST_RUN)
                mask_start = plane // channels * inner + start - plane * inner
                off, zero, on = _count_run(
                    x[start:stop],
                    y[start:stop] if writes else None,
                    mask[mask_start : mask_start + stop - start] if masked else None,
                    limit,
                    floor,
                    ceiling,
                    inplace,
                )
                channel = plane % channels
                tiles[task, 0, channel] += off
                tiles[task, 1, channel] += zero
                tiles[task, 2, channel] += on
                start = stop
            task = _take_task(job_pointer)

    return planes_task


@njit(nogil=True)
def _ordered(bits, positive):
    """Return a number's bits, as a signed integer, in the order of the numbers: -0 is -1, beyond infinity lies NaN."""
    return bits if bits >= 0 else bits ^ positive


def _histogram_task(signed: Any, masked: bool) -> Any:
    """Compile what a thread does for a histogram of rows or planes: count how many values are at least each threshold."""
    positive = signed(np.iinfo(signed).max)

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def histogram_task(job_pointer):
        job = carray(job_pointer, 1)[0]
        channels, inner, stride = job.channels, job.inner, job.x_row_stride
        x = carray(_pointer(job.x), (job.outer - 1) * stride + channels * inner, signed)
        mask = carray(_pointer(job.mask), (job.outer, inner), np.bool_) if masked else None
        thresholds = carray(_pointer(job.thresholds), job.columns, signed)
        tiles = carray(_pointer(job.tiles), (job.tasks, job.columns, channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            tile = tiles[task]
            for row in range(job.outer * task // job.tasks, job.outer * (task + 1) // job.tasks):
                for column in range(job.columns):
                    threshold = thresholds[column]
                    if inner == 1:
                        values = x[row * stride : row * stride + channels]
                        if mask is None or mask[row, 0]:
                            for channel in range(channels):
                                tile[column, channel] += _ordered(values[channel], positive) >= threshold
                    else:
                        for channel in range(channels):
                            start = row * stride + channel * inner
                            plane = x[start : start + inner]
                            number = 0
                            for i in range(inner):
                                number += (_ordered(plane[i], positive) >= threshold) & (mask is None or mask[row, i])
                            tile[column, channel] += number
            task = _take_task(job_pointer)

    return histogram_task


def _adder() -> Any:
    """Compile the last step of a job: move tiles to counts, and to nan the positions that are in no state.

    A tile of signs is off, zero and on. One of a histogram is how many values are at least each threshold, from
    -infinity on: a state is what lies between two of them.
    """

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def add_tiles(job_pointer):
        job = carray(job_pointer, 1)[0]
        channels, columns = job.channels, job.columns
        states = columns - 1 if job.thresholds else columns
        tiles = carray(_pointer(job.tiles), (job.tasks, columns, channels), np.int64)
        counts = carray(_pointer(job.counts), (channels, states), np.int64)
        nan = carray(_pointer(job.nan), channels, np.int64)
        histogram, positions = job.thresholds != 0, job.positions
        sums = tiles[0]
        for task in range(1, job.tasks):
            sums += tiles[task]
        if job.nan:
            nan += positions
        for state in range(states):
            for channel in range(channels):
                number = sums[state, channel] - (sums[state + 1, channel] if histogram else 0)
                counts[channel, state] += number
                if job.nan:
                    nan[channel] -= number
        tiles[:] = 0

    return add_tiles


def fuses(activation: str, edges: Sequence[float] | None) -> bool:
    """Whether the activation and the count of its input are one pass."""
    return activation in ("identity", "relu", "relu6") and edges is None


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
) -> None:
    """Add the states of `values`, arranged as rows or planes, to `counts` and NaN to `nan`; write its activation to `y`.

    See `reference.add_states` for the states and `layout.Arranged` for values and y, which may be the same memory.
    `activation` is one that `fuses` says yes to, and has no parameters.
    """
    launch = prepare(values, counts, edges=edges, mask=mask, nan=nan, y=y, activation=activation)
    launch(values.data_ptr(), 0 if y is None else y.data_ptr())


class Launch(NamedTuple):
    """A loop with all that it works on but the addresses of x and y: any tensors with the same sizes and strides will do.

    It is for one thread at a time, and holds for as long as `is_current`.
    """

    job: _JobStructure
    address: int  # of the job
    loop: _Loop
    tile_size: int
    settings: tuple[int, bool]
    operands: tuple[Tensor | None, ...]  # kept alive: the job has their addresses

    def is_current(self) -> bool:
        """Whether this thread's settings are those that the loop was chosen for."""
        return self.settings == _settings()

    def __call__(self, x: int, y: int) -> None:
        """Run for the tensors at these addresses; y is x for a launch prepared in place, and 0 where none is written."""
        job, tiles = self.job, _borrow_zeros(self.tile_size)
        job.next_task, job.x, job.y, job.tiles = 0, x, y, tiles.address
        _run_team(self.loop, self.address, job.tasks)
        with _COUNTS_LOCK:
            _compiled(_adder).call(self.address)
        _workspace.zeros = tiles


def prepare(
    values: Tensor,
    counts: Tensor,
    *,
    edges: Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
    y: Tensor | None = None,
    activation: str = "identity",
) -> Launch:
    """Choose the loop for the arguments of `add_states`, and fill in its job."""
    form = _FORMATS[values.dtype]
    threads, keeps_subnormals = _settings()
    floats = values.dtype == torch.float32 and keeps_subnormals
    outer, channels = values.shape[:2]
    inner = values.shape[2] if values.ndim == 3 else 1
    row_stride, y_row_stride = values.stride(0), 0 if y is None else y.stride(0)
    tasks = max(1, min(threads, values.numel() // max(_SMALLEST_TASK, _ROWS_PER_TASK * channels)))
    short = inner * (outer + _ROWS_FOR_SUMS * tasks) < _SMALLEST_PLANE[values.element_size()] * outer
    as_rows = values.ndim == 2 or (short and mask is None)
    foldable = as_rows and mask is None and row_stride == channels * inner and y_row_stride in (0, row_stride)
    thresholds = None if edges is None else _thresholds(edges, values.dtype)
    columns = 3 if thresholds is None else thresholds.numel()
    job = _JobStructure(
        0,
        tasks,
        *(0, 0),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (mask, thresholds)),
        0,
        counts.data_ptr(),
        0 if nan is None else nan.data_ptr(),
        *(outer, channels, inner, row_stride, y_row_stride),
        max(1, _FOLDED_WIDTH // row_stride) if foldable else 1,
        columns,
        0 if nan is None else int(outer * inner if mask is None else mask.sum()),
        form.infinity - form.positive - 1,
        0 if activation != "identity" else -math.inf if floats else -1,
        form.six if not floats else 6 if activation == "relu6" else math.inf,
    )
    masked = mask is not None
    if edges is not None:
        loop = _compiled(_histogram_task, form.signed, masked)
    else:
        inplace = y is not None and y.data_ptr() == values.data_ptr()
        kind = np.float32 if floats else form.signed
        task = _rows_task if as_rows else _planes_task
        # Without a ceiling, LLVM would store floats in place through a mask, which takes twice the time of a plain store.
        clipped = floats or activation == "relu6"
        loop = _compiled(task, kind, y is not None and not inplace, inplace, clipped, masked)
    operands = (counts, nan, mask, thresholds)
    return Launch(job, ctypes.addressof(job), loop, tasks * columns * channels, (threads, keeps_subnormals), operands)


def _settings() -> tuple[int, bool]:
    """What a loop is chosen for besides its operands: the number of threads, and whether subnormals are kept."""
    return torch.get_num_threads(), _LEAST > 0


class _Zeros(NamedTuple):
    """Memory for the tiles of a call, zero whenever nobody uses it."""

    memory: np.ndarray[Any, Any]
    address: int


def _borrow_zeros(size: int) -> _Zeros:
    """Take this thread's memory: after a long loop every call into PyTorch starts from cold caches, 20 microseconds.

    It is handed back when it is zero again. What is interrupted keeps it.
    """
    zeros: _Zeros | None = _workspace.__dict__.pop("zeros", None)
    if zeros is None or zeros.memory.size < size:
        memory = np.zeros(size, np.int64)
        zeros = _Zeros(memory, memory.ctypes.data)
    return zeros


def _thresholds(edges: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return -infinity, the smallest value of `dtype` at or above each edge, and what lies beyond infinity, as ordered bits."""
    form = _FORMATS[dtype]
    exact = torch.tensor(edges, dtype=torch.float64)
    rounded = exact.to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    bits = rounded.view(integers).long()
    ordered = torch.where(bits >= 0, bits, bits ^ form.positive) + (rounded.double() < exact)
    ordered = torch.where(rounded == 0, torch.where(exact > 0, 1, -1), ordered)
    return torch.tensor([-form.infinity - 1, *ordered.tolist(), form.infinity + 1], dtype=integers)


class _Loop(NamedTuple):
    """A compiled function of a job's address."""

    address: int
    call: Callable[[int], None]


@cache
def _compiled(kind: Callable[..., Any], *variant: Any) -> _Loop:
    """Compile a loop, or read it from where an earlier run left it; say so once where the user had to wait."""
    start = time.perf_counter()
    function = kind(*variant)
    seconds = time.perf_counter() - start
    if seconds > _LONG_COMPILATION and not _told_of_compilation.is_set():
        _told_of_compilation.set()
        _logger.warning(
            "fastentropy compiled a CPU loop in %.1f s; there is one for each dtype and layout, kept for later runs",
            seconds,
        )
    return _Loop(function.address, function.ctypes)


def _run_team(loop: _Loop, job: int, threads: int) -> None:
    """Run a loop on a team of PyTorch's threads, without the GIL.

    Tasks are taken, not assigned: a team smaller than asked for, or no OpenMP at all, does all of them as well.
    """
    parallel = _openmp_parallel()
    if threads > 1 and parallel is not None:
        parallel(loop.address, job, threads, 0)
    else:
        loop.call(job)


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
