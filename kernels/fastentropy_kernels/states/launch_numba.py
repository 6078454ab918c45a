"""CPU: launches of the Numba loops, which are compiled on their first use.

The loops run on the OpenMP threads of PyTorch. Numba's own parallel loops would start a second team of threads. Waiting OpenMP
threads spin, so two teams take the cores from each other: a relu after such a loop took 8 ms instead of 0.7 ms.
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
from fastentropy_kernels.states.formats_numba import FORMATS, thresholds_of
from fastentropy_kernels.states.tasks_numba import (
    JobStructure,
    compile_adder,
    compile_histogram_task,
    compile_planes_task,
    compile_rows_task,
    compile_whole,
)

# Width in values. Narrower contiguous rows are read several at a time, as one row of about this width. This makes the inner
# loop longer and does not change the order of the channels.
_FOLDED_WIDTH = 4096
# For each size of a value in bytes, a number of values. A smaller plane would make too short a loop, so planes are then read
# as parts of a row. This pays more the more rows share the sums of a task.
_SMALLEST_PLANE = {4: 96, 2: 256}
# Number of rows. Adding up the sums of a task takes as long as reading this many rows.
_ROWS_FOR_SUMS = 4
# Number of values (PyTorch's grain size). A smaller task does not repay another thread.
_SMALLEST_TASK = 1 << 15
# The least number of rows in a task, because each task clears and adds up 24 bytes for every channel.
_ROWS_PER_TASK = 16
# This number compares as zero in a thread that flushes subnormals to zero.
_SMALLEST_SUBNORMAL = 5e-324
# Seconds. The first compilation that takes longer is reported by a warning.
_LONG_COMPILATION = 1.0

# Held while tiles are added to counts, because two Python threads may count into the same tensor.
_COUNTS_LOCK = threading.Lock()
_workspace = threading.local()
_compilation_reported = threading.Event()
_logger = logging.getLogger(__name__)


def fuses(activation: str, edges: Sequence[float] | None) -> bool:
    """Return whether the activation and the count of its input run in one pass.

    Args:
        activation: a key of `activations.ACTIVATIONS`.
        edges: the edges of a histogram, or None.
    """
    return activation in ("identity", "relu", "relu6") and edges is None


def multiplies(dtype: torch.dtype, edges: Sequence[float] | None) -> bool:
    """Return whether the product with a gate is computed in the pass that counts.

    It is where values are read as floats.

    Args:
        dtype: the dtype of the values.
        edges: the edges of a histogram, or None.
    """
    return edges is None and _reads_floats(dtype)


def add_states(
    values: Tensor,
    counts: Tensor,
    *,
    edges: Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
    y: Tensor | None = None,
    activation: str | None = "identity",
    parameters: Sequence[float] = (),
    weight: Tensor | None = None,
    gate: Tensor | None = None,
) -> None:
    """Add the states of `values` to `counts` and its numbers of NaN to `nan`, and write its activation to `y`.

    With a gate, the product of the activation and the gate is written.

    Args:
        values: *rows* `[rows, channels]` or *planes* `[outer, channels, inner]`, not empty (see `layout.Arranged`).
        counts: int64 `[channels, states]`, contiguous. `states` is 3 (off, zero, on), or len(edges) + 1.
        edges: the edges of a histogram in rising order (see `reference.add_states`). None to count off, zero and on.
        mask: bool `[rows]` or `[outer, inner]`, contiguous. Positions at which it is False are not counted. None to count all.
        nan: int64 `[channels]`, contiguous. None not to count NaN values.
        y: receives the activation. It has the layout of `values` and may be the same memory. None to count only.
        activation: an activation for which `fuses` returns True. None if `y` holds the activation already, so that it is only
            multiplied by the gate.
        parameters: ignored, because these activations have none.
        weight: ignored, because prelu is none of these activations.
        gate: what the activation is multiplied by, if `multiplies` returns True. It has the shape and dtype of `values`; only
            its row stride may be another. None not to multiply.
    """
    launch = prepare(values, edges=edges, mask=mask, nan=nan, y=y, activation=activation, gate=gate)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (values, y, counts, gate))
    launch(*addresses)


class PreparedLaunch(NamedTuple):
    """A prepared `add_states` on a CPU: everything but the addresses of x, y, the counts and the gate is decided.

    Only one thread may use it at a time, and only while `is_current` returns True.

    Attributes:
        job: the description of the call. These addresses are filled in at each launch.
        address: the address of the job.
        loop: the compiled loop that was chosen.
        adder: the compiled function that adds the tiles to the counts.
        tile_size: the number of int64 in the tiles of all tasks.
        is_alone: whether there is one task, so that no team of threads is needed.
        whole: for a small tensor, the compiled function that runs the loop and the adder on tiles of its own; else None.
        settings: the settings of the thread for which the loop was chosen.
        operands: the tensors, and the array of tiles, whose addresses are in the job. They are kept alive here.
    """

    job: JobStructure
    address: int
    loop: _Loop
    adder: _Loop
    tile_size: int
    is_alone: bool
    whole: Callable[[int, int, int, int], None] | None
    settings: tuple[int, bool]
    operands: tuple[Any, ...]

    def is_current(self) -> bool:
        """Return whether the settings of this thread are still the ones for which the loop was chosen."""
        threads, keeps_subnormals = self.settings
        return torch.get_num_threads() == threads and (_SMALLEST_SUBNORMAL > 0) is keeps_subnormals

    def __call__(self, x: int, y: int, counts: int, gate: int = 0) -> None:
        """Run the loop on the tensors at these addresses.

        Args:
            x: address of the input.
            y: address of the output. It equals `x` for a launch in place, and is 0 if no activation is written.
            counts: address of the counts, int64 `[channels, states]`.
            gate: address of the gate, or 0 if there is none.
        """
        if self.whole is not None:
            with _COUNTS_LOCK:
                self.whole(self.address, x, y, counts)
            return
        job, tiles = self.job, _borrow_zeros(self.tile_size)
        job.next_task, job.x, job.y, job.counts, job.gate, job.tiles = 0, x, y, counts, gate, tiles.address
        if self.is_alone:
            self.loop.call(self.address)
        else:
            _run_team(self.loop, self.address, job.tasks)
        with _COUNTS_LOCK:
            self.adder.call(self.address)
        _workspace.zeros = tiles


def prepare(
    values: Tensor,
    *,
    edges: Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
    y: Tensor | None = None,
    activation: str | None = "identity",
    gate: Tensor | None = None,
) -> PreparedLaunch:
    """Choose the loop for the arguments of `add_states`, and fill in the description of the call.

    Args:
        values: as for `add_states`.
        edges: as for `add_states`.
        mask: as for `add_states`. Its positions are counted here, once, if `nan` is given.
        nan: as for `add_states`.
        y: as for `add_states`.
        activation: as for `add_states`.
        gate: as for `add_states`.
    """
    settings = threads, _ = _settings()
    form, floats = FORMATS[values.dtype], _reads_floats(values.dtype)
    outer, channels = values.shape[:2]
    inner = values.shape[2] if values.ndim == 3 else 1
    row_stride, y_row_stride, gate_row_stride = (0 if tensor is None else tensor.stride(0) for tensor in (values, y, gate))
    tasks = max(1, min(threads, values.numel() // max(_SMALLEST_TASK, _ROWS_PER_TASK * channels)))
    short = inner * (outer + _ROWS_FOR_SUMS * tasks) < _SMALLEST_PLANE[values.element_size()] * outer
    as_rows = values.ndim == 2 or (short and mask is None)
    others = (stride for tensor, stride in ((y, y_row_stride), (gate, gate_row_stride)) if tensor is not None)
    foldable = as_rows and mask is None and all(stride == channels * inner for stride in (row_stride, *others))
    thresholds = None if edges is None else thresholds_of(edges, values.dtype)
    columns = 3 if thresholds is None else thresholds.numel()
    job = JobStructure(
        tasks=tasks,
        mask=0 if mask is None else mask.data_ptr(),
        thresholds=0 if thresholds is None else thresholds.data_ptr(),
        nan=0 if nan is None else nan.data_ptr(),
        outer=outer,
        channels=channels,
        inner=inner,
        x_row_stride=row_stride,
        y_row_stride=y_row_stride,
        gate_row_stride=gate_row_stride,
        fold=max(1, _FOLDED_WIDTH // row_stride) if foldable else 1,
        columns=columns,
        positions=0 if nan is None else int(outer * inner if mask is None else mask.sum()),
        limit=form.infinity - form.positive - 1,
        floor=0 if activation not in ("identity", None) else -math.inf if floats else -1,
        ceiling=form.six if not floats else 6 if activation == "relu6" else math.inf,
    )
    if edges is not None:
        loop = _compiled(compile_histogram_task, form.signed, mask is not None)
    else:
        inplace = y is not None and y.data_ptr() == values.data_ptr()
        kind = np.float32 if floats else form.signed
        task = compile_rows_task if as_rows else compile_planes_task
        # LLVM would store floats in place through a mask if there were no ceiling. This takes twice the time of a plain store.
        clipped = floats or activation == "relu6"
        gated = (gate is not None, activation is None)
        loop = _compiled(task, kind, y is not None and not inplace, inplace, clipped, mask is not None, *gated)
    adder, tile_size = _compiled(compile_adder), tasks * columns * channels
    whole, tiles = None, None
    if tasks == 1 and gate is None and values.numel() <= _SMALLEST_TASK:
        whole, tiles = _compiled(compile_whole).call, np.zeros(tile_size, np.int64)
        job.tiles, job.loop, job.adder = tiles.ctypes.data, loop.address, adder.address
    operands = (nan, mask, thresholds, tiles)
    return PreparedLaunch(job, ctypes.addressof(job), loop, adder, tile_size, tasks == 1, whole, settings, operands)


def _settings() -> tuple[int, bool]:
    """Return the settings of this thread that affect the choice of a loop.

    Returns:
        The number of PyTorch's threads, and whether this thread keeps subnormals (instead of flushing them to zero).
    """
    return torch.get_num_threads(), _SMALLEST_SUBNORMAL > 0


def _reads_floats(dtype: torch.dtype) -> bool:
    """Return whether values of a dtype are read as floats: float32 in a thread that keeps subnormals."""
    return dtype == torch.float32 and _SMALLEST_SUBNORMAL > 0


class _Zeros(NamedTuple):
    """Memory for the tiles of a call. It is zero whenever no call uses it."""

    memory: np.ndarray[Any, Any]
    address: int


def _borrow_zeros(size: int) -> _Zeros:
    """Take the zeroed memory that this Python thread keeps for tiles, or allocate it.

    The caller hands the memory back, zero again, after its call. A call that is interrupted never hands it back, and the next
    call allocates new memory. An allocation by PyTorch in each call would take 20 µs here, because the caches are cold after a
    long loop.

    Args:
        size: the number of int64 that are needed.
    """
    zeros: _Zeros | None = _workspace.__dict__.pop("zeros", None)
    if zeros is None or zeros.memory.size < size:
        memory = np.zeros(size, np.int64)
        zeros = _Zeros(memory, memory.ctypes.data)
    return zeros


class _Loop(NamedTuple):
    """A compiled function that takes the address of a job.

    Attributes:
        address: the address of the machine code, for C.
        call: the function, for Python.
    """

    address: int
    call: Callable[..., None]


@cache
def _compiled(kind: Callable[..., Any], *variant: Any) -> _Loop:
    """Compile a function, or load it from Numba's cache of an earlier run.

    The first compilation that takes long is reported by a warning.

    Args:
        kind: one of the `compile_*` functions of `tasks_numba`.
        *variant: the arguments of `kind`.
    """
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
    """Run a loop on a team of PyTorch's OpenMP threads, without the GIL.

    The threads take tasks until none is left, so a smaller team than requested completes them too. Without OpenMP, this thread
    does all tasks itself.

    Args:
        loop: the compiled loop.
        job: the address of the job.
        threads: how many threads to request.
    """
    parallel = openmp_parallel()
    if threads > 1 and parallel is not None:
        parallel(loop.address, job, threads, 0)
    else:
        loop.call(job)
