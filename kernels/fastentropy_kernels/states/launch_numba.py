"""CPU: launches of the Numba loops, which are compiled on their first use.

The loops run in the OpenMP team of PyTorch. Numba's own parallel loops bring a second team, and two teams whose threads wait
by spinning take the cores from each other: a relu after such a loop took 8 ms instead of 0.7 ms.
"""

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

    signed: Any  # the NumPy type of the same width
    positive: int  # every bit but the sign
    infinity: int  # the bits of infinity
    six: int  # the bits of 6


_FORMATS = {
    torch.float32: _Format(np.int32, 0x7FFFFFFF, 0x7F800000, 0x40C00000),
    torch.bfloat16: _Format(np.int16, 0x7FFF, 0x7F80, 0x40C0),
    torch.float16: _Format(np.int16, 0x7FFF, 0x7C00, 0x4600),
}

# In values. Several narrower contiguous rows are read as one of about this width: a longer loop for the same channels.
_FOLDED_WIDTH = 4096
# Bytes of a value -> values. A smaller plane makes too short a loop, and is read as a stretch of a row. The more rows share the
# sums of a task, the more that pays.
_SMALLEST_PLANE = {4: 96, 2: 256}
# In rows. The sums of a task cost as much as reading these.
_ROWS_FOR_SUMS = 4
# In values. For a smaller task another thread costs more than it saves (PyTorch's grain size).
_SMALLEST_TASK = 1 << 15
# At least. A task clears and adds up 24 bytes for every channel.
_ROWS_PER_TASK = 16
# Above zero, except in a thread that flushes subnormals.
_SMALLEST_SUBNORMAL = 5e-324
# In seconds. A longer compilation is reported.
_LONG_COMPILATION = 1.0

# Two Python threads may count into one tensor.
_COUNTS_LOCK = threading.Lock()
_workspace = threading.local()
_compilation_reported = threading.Event()
_logger = logging.getLogger(__name__)


def fuses(activation: str, edges: Sequence[float] | None) -> bool:
    """Return whether the activation and the count of its input are one pass."""
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
    """Add the states of `values` to `counts` and its NaN to `nan`, and write its activation to `y`.

    See `reference.add_states` for the states, and `layout.Arranged` for `values` and `y`, which may be the same memory.
    `activation` is one for which `fuses` returns True. None of these has parameters or a weight.
    """
    launch = prepare(values, counts, edges=edges, mask=mask, nan=nan, y=y, activation=activation)
    launch(values.data_ptr(), 0 if y is None else y.data_ptr())


class PreparedLaunch(NamedTuple):
    """`add_states` on a CPU for tensors with the same sizes and strides, with everything decided but their addresses.

    It is for one thread at a time, and for as long as `is_current` returns True.

    Attributes:
        job: what the loop works on, but for the addresses of x and y.
        address: the address of the job.
        loop: the loop that was chosen.
        tile_size: how many int64 the tiles of all tasks take.
        settings: the settings of the thread for which the loop was chosen.
        operands: tensors that the job has addresses of; kept alive here.
    """

    job: JobStructure
    address: int
    loop: _Loop
    tile_size: int
    settings: tuple[int, bool]
    operands: tuple[Tensor | None, ...]

    def is_current(self) -> bool:
        """Return whether the settings of this thread are those that the loop was chosen for."""
        return self.settings == _settings()

    def __call__(self, x: int, y: int) -> None:
        """Run on the tensors at these addresses. `y` is `x` for a launch in place, and 0 where nothing is written."""
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
) -> PreparedLaunch:
    """Choose the loop for the arguments of `add_states`, and fill in its job."""
    settings = threads, keeps_subnormals = _settings()
    form, floats = _FORMATS[values.dtype], values.dtype == torch.float32 and keeps_subnormals
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
        tasks=tasks,
        mask=0 if mask is None else mask.data_ptr(),
        thresholds=0 if thresholds is None else thresholds.data_ptr(),
        counts=counts.data_ptr(),
        nan=0 if nan is None else nan.data_ptr(),
        outer=outer,
        channels=channels,
        inner=inner,
        x_row_stride=row_stride,
        y_row_stride=y_row_stride,
        fold=max(1, _FOLDED_WIDTH // row_stride) if foldable else 1,
        columns=columns,
        positions=0 if nan is None else int(outer * inner if mask is None else mask.sum()),
        limit=form.infinity - form.positive - 1,
        floor=0 if activation != "identity" else -math.inf if floats else -1,
        ceiling=form.six if not floats else 6 if activation == "relu6" else math.inf,
    )
    if edges is not None:
        loop = _compiled(compile_histogram_task, form.signed, mask is not None)
    else:
        inplace = y is not None and y.data_ptr() == values.data_ptr()
        kind = np.float32 if floats else form.signed
        task = compile_rows_task if as_rows else compile_planes_task
        # Without a ceiling, LLVM would store floats in place through a mask, which takes twice the time of a plain store.
        clipped = floats or activation == "relu6"
        loop = _compiled(task, kind, y is not None and not inplace, inplace, clipped, mask is not None)
    operands = (counts, nan, mask, thresholds)
    return PreparedLaunch(job, ctypes.addressof(job), loop, tasks * columns * channels, settings, operands)


def _settings() -> tuple[int, bool]:
    """Return what else a loop is chosen for: the number of threads, and whether this thread keeps subnormals."""
    return torch.get_num_threads(), _SMALLEST_SUBNORMAL > 0


class _Zeros(NamedTuple):
    """Memory for the tiles of a call. It is zero whenever nobody uses it."""

    memory: np.ndarray[Any, Any]
    address: int


def _borrow_zeros(size: int) -> _Zeros:
    """Take the memory of this thread, which the caller hands back when it is zero again.

    An allocation by PyTorch would take 20 microseconds here: after a long loop the caches are cold. A call that is interrupted
    never hands its memory back.
    """
    zeros: _Zeros | None = _workspace.__dict__.pop("zeros", None)
    if zeros is None or zeros.memory.size < size:
        memory = np.zeros(size, np.int64)
        zeros = _Zeros(memory, memory.ctypes.data)
    return zeros


def _thresholds(edges: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the thresholds of a histogram as bits in the order of `loops_numba.ordered`.

    They are -infinity, the smallest value of `dtype` at or above each edge, and the first pattern beyond infinity.
    """
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
    """Compile a loop, or read it from the cache of an earlier run. The first long compilation is reported."""
    start = time.perf_counter()
    function = kind(*variant)
    seconds = time.perf_counter() - start
    if seconds > _LONG_COMPILATION and not _compilation_reported.is_set():
        _compilation_reported.set()
        _logger.warning(
            "fastentropy compiled a CPU loop in %.1f s; there is one for each dtype and layout, kept for later runs",
            seconds,
        )
    return _Loop(function.address, function.ctypes)


def _run_team(loop: _Loop, job: int, threads: int) -> None:
    """Run a loop on a team of PyTorch's threads, without the GIL.

    Threads take tasks. So a team smaller than asked for does all of them, and so does this thread without OpenMP.
    """
    parallel = openmp_parallel()
    if threads > 1 and parallel is not None:
        parallel(loop.address, job, threads, 0)
    else:
        loop.call(job)
