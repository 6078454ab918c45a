"""CPU: launches of the Numba loops in PyTorch's OpenMP team."""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import time

# mypy: disable-error-code="attr-defined, call-arg, misc, no-untyped-def, no-untyped-call, var-annotated"
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastentropy_kernels._compat import openmp_parallel
from fastentropy_kernels.states.tasks_numba import (
    JobStructure,
    compile_adder,
    compile_histogram_task,
    compile_planes_task,
    compile_rows_task,
)


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

    job: JobStructure
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
            _compiled(compile_adder).call(self.address)
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
    job = JobStructure(
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
        loop = _compiled(compile_histogram_task, form.signed, masked)
    else:
        inplace = y is not None and y.data_ptr() == values.data_ptr()
        kind = np.float32 if floats else form.signed
        task = compile_rows_task if as_rows else compile_planes_task
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
    parallel = openmp_parallel()
    if threads > 1 and parallel is not None:
        parallel(loop.address, job, threads, 0)
    else:
        loop.call(job)
