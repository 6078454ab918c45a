"""GPU: launches of the state kernels."""

from __future__ import annotations

# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from fastentropy_kernels.counting_triton import MOST_COUNTED
from fastentropy_kernels.layout import largest_power_of_2
from fastentropy_kernels.states.kernels_triton import MOST_NARROW, MOST_SUMMED, states_planes_kernel, states_rows_kernel


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
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_ROWS"], constants["BLOCK_ROWS"] > MOST_NARROW.value)
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
    most_counted, most_summed = int(MOST_COUNTED.value), int(MOST_SUMMED.value)
    return min(most_counted // repeats, (most_summed if is_wide else most_counted) // positions)


def _multiprocessors(values: Tensor) -> int:
    count: int = torch.cuda.get_device_properties(values.device).multi_processor_count if values.is_cuda else 1
    return count


def _float32_from(edge: float) -> float:
    """Return the smallest float32 that is not below `edge`."""
    with np.errstate(over="ignore"):
        rounded = np.float32(edge)
    return float(rounded if float(rounded) >= edge else np.nextafter(rounded, np.float32(np.inf)))
