"""CPU: the compiled functions that the threads of a team run to count the states of one tensor.

A job describes one call of `add_states`: addresses and sizes. It is divided into tasks, each a part of the tensor. A thread
takes the next task by incrementing `next_task` atomically, until no task is left. A team of any size therefore completes the
job. Each task counts into its own tile of counters, int64 [columns, channels]. At the end, one thread adds the tiles to the
counts.
"""

# Numba replaces functions and types that mypy cannot follow.
# mypy: disable-error-code="attr-defined, call-arg, no-untyped-call, no-untyped-def"
from __future__ import annotations

import ctypes
import hashlib
import inspect
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, types
from numba.core import cgutils
from numba.extending import intrinsic

from fastentropy_kernels.states import loops_numba
from fastentropy_kernels.states.loops_numba import LONGEST_RUN, count_run, count_strip, ordered


class JobStructure(ctypes.Structure):
    """The description of a call of `add_states`, which all threads of a team read.

    The address of a tensor that is not given is 0. Sizes and strides are in elements. The comments below describe the fields.
    """

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                # The index of the next task, and the number of tasks. `_take_task` relies on `next_task` being the first field.
                *("next_task", "tasks"),
                # Addresses of x, y and the gate [outer, channels, inner], of the mask [outer, inner], of the thresholds
                # [columns] of a histogram, of the tiles [tasks, columns, channels], of counts [channels, states] and of nan
                # [channels].
                *("x", "y", "gate", "mask", "thresholds", "tiles", "counts", "nan"),
                # A tensor of rows has inner = 1. A row stride is the distance between two indices of the outer axis.
                *("outer", "channels", "inner", "x_row_stride", "y_row_stride", "gate_row_stride"),
                # fold: how many rows are read as one. columns: how many counters a channel has. positions: how many values of
                # each channel are counted, if nan is given. limit: see the head of `loops_numba`.
                *("fold", "columns", "positions", "limit"),
                # Addresses of the functions that `compile_whole` calls one after the other. 0 if it does not run the job.
                *("loop", "adder"),
            )
        ),
        # The bounds to which an activation clips its input: floats, or the bits of floats (see `loops_numba._activated`).
        ("floor", ctypes.c_double),
        ("ceiling", ctypes.c_double),
    )


_Job = from_dtype(np.dtype(JobStructure))


@cache
def loops_digest() -> int:
    """Return a number that changes with the source of `loops_numba`.

    Numba inlines those loops into the tasks. Its cache on disk only notices a change of the file in which a task is defined,
    and of the values that the task takes from the function around it. Each task therefore takes this number.
    """
    return int.from_bytes(hashlib.sha256(inspect.getsource(loops_numba).encode()).digest()[:4], "big")


def compile_rows_task(
    kind: Any, writes: bool, inplace: bool, clipped: bool, masked: bool, gated: bool = False, ready: bool = False
) -> Any:
    """Compile the function that a thread runs for rows: while a task is left, take it and count its rows.

    Narrow contiguous rows are read `fold` at a time, as one row that is `fold` times as wide. The rows left over at the end of
    a task are read one by one. A row holds `inner` adjacent values of each channel. `inner` is 1, except if short planes are
    read as rows.

    Args:
        kind: the NumPy type that values are read as: float32, or the signed integer of the same width for their bits.
        writes: whether the activation is written to y.
        inplace: whether the activation is written over x.
        clipped: whether the activation has a ceiling.
        masked: whether there is a mask.
        gated: whether the activation is multiplied by a gate.
        ready: whether y holds the activation already, so that it is only multiplied by the gate.
    """
    floats = kind is np.float32

    digest = loops_digest()

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def rows_task(job_pointer):
        _ = digest  # part of the key of Numba's cache
        job = carray(job_pointer, 1)[0]
        rows, channels, inner, fold = job.outer, job.channels, job.inner, job.fold
        x_row_stride, y_row_stride, gate_row_stride = job.x_row_stride, job.y_row_stride, job.gate_row_stride
        limit = None if floats else kind(job.limit)
        floor = kind(job.floor)
        ceiling = kind(job.ceiling) if clipped else None
        width = channels * inner
        x = carray(_pointer(job.x), (rows - 1) * x_row_stride + width, kind)
        y = carray(_pointer(job.y), (rows - 1) * y_row_stride + width, kind) if writes else None
        gate = carray(_pointer(job.gate), (rows - 1) * gate_row_stride + width, kind) if gated else None
        mask = carray(_pointer(job.mask), rows, np.bool_) if masked else None
        tiles = carray(_pointer(job.tiles), (job.tasks, 3, channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            row, end = rows * task // job.tasks, rows * (task + 1) // job.tasks
            while row < end:
                folded = fold if row + fold <= end else 1
                strip = (end - row) // folded
                count_strip(
                    x[row * x_row_stride :],
                    x_row_stride * folded,
                    None if y is None else y[row * y_row_stride :],
                    y_row_stride * folded,
                    None if gate is None else gate[row * gate_row_stride :],
                    gate_row_stride * folded,
                    mask[row:] if masked else None,
                    strip,
                    width * folded,
                    tiles[task],
                    inner,
                    limit,
                    floor,
                    ceiling,
                    inplace,
                    ready,
                )
                row += strip * folded
            task = _take_task(job_pointer)

    return rows_task


def compile_planes_task(
    kind: Any, writes: bool, inplace: bool, clipped: bool, masked: bool, gated: bool = False, ready: bool = False
) -> Any:
    """Compile the function that a thread runs for planes: while a task is left, take it and count its part of the memory.

    Args:
        kind: as for `compile_rows_task`.
        writes: as for `compile_rows_task`.
        inplace: as for `compile_rows_task`.
        clipped: as for `compile_rows_task`.
        masked: as for `compile_rows_task`.
        gated: as for `compile_rows_task`.
        ready: as for `compile_rows_task`.
    """
    floats = kind is np.float32

    digest = loops_digest()

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def planes_task(job_pointer):
        _ = digest  # part of the key of Numba's cache
        job = carray(job_pointer, 1)[0]
        channels, inner = job.channels, job.inner
        size = job.outer * channels * inner
        limit = None if floats else kind(job.limit)
        floor = kind(job.floor)
        ceiling = kind(job.ceiling) if clipped else None
        x = carray(_pointer(job.x), size, kind)
        y = carray(_pointer(job.y), size, kind) if writes else None
        gate = carray(_pointer(job.gate), size, kind) if gated else None
        mask = carray(_pointer(job.mask), job.outer * inner, np.bool_) if masked else None
        tiles = carray(_pointer(job.tiles), (job.tasks, 3, channels), np.int64)
        task = _take_task(job_pointer)
        while task < job.tasks:
            start, end = size * task // job.tasks, size * (task + 1) // job.tasks
            while start < end:
                plane = start // inner
                stop = min(end, (plane + 1) * inner, start + LONGEST_RUN)
                mask_start = plane // channels * inner + start - plane * inner
                off, zero, on = count_run(
                    x[start:stop],
                    y[start:stop] if writes else None,
                    gate[start:stop] if gated else None,
                    mask[mask_start : mask_start + stop - start] if masked else None,
                    limit,
                    floor,
                    ceiling,
                    inplace,
                    ready,
                )
                channel = plane % channels
                tiles[task, 0, channel] += off
                tiles[task, 1, channel] += zero
                tiles[task, 2, channel] += on
                start = stop
            task = _take_task(job_pointer)

    return planes_task


def compile_histogram_task(signed: Any, masked: bool) -> Any:
    """Compile the function that a thread runs for a histogram of rows or planes.

    For each channel and each threshold, the function counts the values that are at least the threshold.

    Args:
        signed: the signed NumPy integer type with the width of a value, which its bits are read as.
        masked: whether there is a mask.
    """
    positive = signed(np.iinfo(signed).max)

    digest = loops_digest()

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def histogram_task(job_pointer):
        _ = digest  # part of the key of Numba's cache
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
                                tile[column, channel] += ordered(values[channel], positive) >= threshold
                    else:
                        for channel in range(channels):
                            start = row * stride + channel * inner
                            plane = x[start : start + inner]
                            number = 0
                            for i in range(inner):
                                number += (ordered(plane[i], positive) >= threshold) & (mask is None or mask[row, i])
                            tile[column, channel] += number
            task = _take_task(job_pointer)

    return histogram_task


def compile_adder() -> Any:
    """Compile the last step of a job, which one thread runs: add the tiles of all tasks to counts and nan.

    Without edges, a tile counts off, zero and on. A tile of a histogram counts the values that are at least each threshold,
    starting with -infinity. The count of a state is therefore the difference between two neighbouring counters. The number of
    NaN values is the number of counted positions minus the counts of all states. The step sets the tiles to zero for the next
    job.
    """

    digest = loops_digest()

    @cfunc(types.void(types.CPointer(_Job)), cache=True)
    def add_tiles(job_pointer):
        _ = digest  # part of the key of Numba's cache
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


def compile_whole() -> Any:
    """Compile the function that runs a job with a single task as a whole: its loop, then the adder.

    It sets what differs between two calls. Two calls from Python, and the assignments of the fields, would take three times as
    long for a small tensor.
    """

    digest = loops_digest()

    @cfunc(types.void(types.CPointer(_Job), types.int64, types.int64, types.int64), cache=True)
    def run_whole(job_pointer, x, y, counts):
        _ = digest  # part of the key of Numba's cache
        job = carray(job_pointer, 1)[0]
        job.next_task = 0
        job.x = x
        job.y = y
        job.counts = counts
        _run(job.loop, job_pointer)
        _run(job.adder, job_pointer)

    return run_whole


@intrinsic
def _run(typing_context, function, job):
    """Call the compiled function at an address with a job."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), [builder.bitcast(arguments[1], cgutils.voidptr_t)])
        return context.get_dummy_value()

    return types.void(types.int64, job), generate


@intrinsic
def _take_task(typing_context, job):
    """Return the index of the next task of a job, and increment it in the same atomic operation."""

    def generate(context, builder, signature, arguments):
        counter = builder.bitcast(arguments[0], cgutils.intp_t.as_pointer())
        return builder.atomic_rmw("add", counter, cgutils.intp_t(1), "monotonic")

    return types.int64(job), generate


@intrinsic
def _pointer(typing_context, address):
    """Return an integer address as the pointer that `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate
