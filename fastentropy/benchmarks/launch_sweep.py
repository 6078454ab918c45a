"""Time launch configurations of the state kernels on a GPU: `fastentropy bench kernels --sweep`.

A state kernel counts the off (below zero), zero and on (above zero) values of each channel. The table
`launch_triton.LAUNCHES` has a line (a launch configuration) for each kind of tensor. The sweep returns the best table for this
GPU as text. It changes no file: copy the lines that differ into the table.
"""

import itertools
import math
import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from fastentropy._utils.timing import measure_times
from fastentropy_kernels.states import launch_triton
from fastentropy_kernels.states.launch_triton import LAUNCHES, Launch

TILE_BYTES = (2048, 4096, 8192, 16384)
ROW_BYTES = (128, 256, 512)
WARPS = (4, 8)
PROGRAMS = (8, 16, 24, 32, 40, 52, 64)
STAGES = (1, 4)
MAX_SHARED_BYTES = 65536  # bytes of the tiles that are being loaded; three programs still fit on a multiprocessor of an H100
EDGES = tuple(range(-3, 4))


class Case(NamedTuple):
    """A tensor and an activation on which the candidates for a line of the table are timed.

    Attributes:
        shape: the shape of the tensor: `[rows, channels]` or `[outer, channels, inner]`.
        dtype: the dtype of the tensor.
        activation: the name of the activation.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    activation: str


#: The cases of each line of the table. The rows are as in large language models. Most planes are as in ResNet-18 with a batch
#: of 128; the small planes are as in its deeper layers.
CASES = {
    "rows": [
        Case((16384, 4096), torch.bfloat16, "relu"),
        Case((4096, 8192), torch.bfloat16, "silu"),
        Case((4096, 8192), torch.bfloat16, "gelu"),
        Case((16384, 4096), torch.float32, "relu"),
    ],
    "planes": [
        Case((128, 64, 12544), torch.bfloat16, "relu"),
        Case((128, 64, 3136), torch.bfloat16, "relu"),
        Case((41, 256, 3136), torch.float32, "relu"),
    ],
    "small rows": [Case((256, 4096), torch.bfloat16, "silu")],
    "small planes": [
        Case((128, channels, inner), torch.bfloat16, "relu") for channels, inner in ((128, 784), (256, 196), (512, 49))
    ],
    "histogram rows": [Case((16384, 4096), torch.bfloat16, "relu")],
    "histogram planes": [Case((83, 256, 3136), torch.bfloat16, "relu")],
}


def sweep_launches(device: torch.device) -> Iterator[str]:
    """Yield the best configuration for each line of the table, as Python source with its times in a comment.

    All candidates are compiled first, on all cores. That takes two minutes on 16 cores.

    Args:
        device: the GPU to measure on.
    """
    with torch.cuda.device(device):
        _compile_all()
        for line, cases in CASES.items():
            yield best_line(line, [_times(line, case) for case in cases])


def _compile_all() -> None:
    """Compile every candidate on all cores, into Triton's cache on disk.

    Candidates that differ only in the number of programs share a compiled kernel, so each kernel is compiled once.
    """
    jobs = {
        (line, case, launch._replace(programs_per_multiprocessor=1))
        for line, cases in CASES.items()
        for case in cases
        for launch in candidates(line)
    }
    workers, device = min(16, os.cpu_count() or 1), torch.cuda.current_device()
    with multiprocessing.get_context("spawn").Pool(workers, torch.cuda.set_device, (device,)) as pool:
        pool.starmap(_run_once, sorted(jobs, key=str), chunksize=4)


def _run_once(line: str, case: Case, launch: Launch) -> None:
    """Compile the kernel of a candidate by running it once."""
    _run(*_operands(line, case), case, launch)


def _times(line: str, case: Case) -> dict[Launch, float]:
    """Return the milliseconds of one launch of every candidate for a line of the table, measured in interleaved rounds."""
    tensors = _operands(line, case)
    return measure_times(
        {launch: partial(_run, *tensors, case, launch) for launch in candidates(line)},
        rounds=7,
        graphs_on=tensors[0].device,
    )


def _operands(line: str, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tensors of a launch.

    They are random values of the shape of the case, zeros for the counts (int64 `[channels, columns]`), and uninitialised
    memory for the result of the activation. There are 3 columns for states, and one per bin for a histogram.
    """
    values = torch.randn(case.shape, device="cuda", dtype=case.dtype)
    columns = len(EDGES) + 1 if "histogram" in line else 3
    return values, torch.zeros(case.shape[1], columns, dtype=torch.int64, device="cuda"), torch.empty_like(values)


def _run(values: torch.Tensor, counts: torch.Tensor, y: torch.Tensor, case: Case, launch: Launch) -> None:
    """Launch the kernel with the configuration of one candidate. If `counts` has more than 3 columns, it counts a histogram."""
    edges = None if counts.shape[1] == 3 else EDGES
    launch_triton.add_states(values, counts, edges=edges, y=y, activation=case.activation, launch=launch)


def candidates(line: str) -> Iterator[Launch]:
    """Yield the present configuration of a line, then the other candidates.

    A tile of a candidate gives each thread at least 16 bytes. The tiles that are loaded ahead fit into `MAX_SHARED_BYTES`.
    """
    present = LAUNCHES[line]
    yield present
    widths = ROW_BYTES if "rows" in line else (None,)  # a tile of planes is as wide as it is large
    for tile_bytes, row_bytes, warps, programs, stages in itertools.product(TILE_BYTES, widths, WARPS, PROGRAMS, STAGES):
        launch = Launch(tile_bytes, row_bytes or tile_bytes, warps, programs, stages, present.shortest_strip)
        is_filled = warps * 32 * 16 <= tile_bytes >= launch.row_bytes
        if launch != present and is_filled and (stages == 1 or tile_bytes * stages <= MAX_SHARED_BYTES):
            yield launch


def best_line(line: str, times: list[dict[Launch, float]]) -> str:
    """Return the fastest candidate for a line of the table as Python source.

    Candidates are compared by the geometric mean of their relative times. The present configuration stays unless another one is
    at least 2 % faster.

    Args:
        line: the key of the line in `LAUNCHES`.
        times: for each case, the milliseconds of every candidate.
    """
    present = LAUNCHES[line]
    shares = {
        launch: math.exp(sum(math.log(case[launch] / case[present]) for case in times) / len(times)) for launch in times[0]
    }
    best = min(shares, key=shares.__getitem__)
    if shares[best] > 0.98:
        best = present
    measured = ", ".join(f"{case[best]:.4f}" for case in times)
    return f'"{line}": {best},  # {measured} ms, {shares[best]:.3f} of the present line'
