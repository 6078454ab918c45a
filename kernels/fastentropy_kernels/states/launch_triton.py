"""GPU: launches of the state kernels, from a table that says how each kind of tensor is spread over a GPU.

`add_states` launches at once. `prepare` decides everything but the addresses, for tensors that will come again and again.
"""

# Kernels have no types, nor have the tuples of their arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

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
    """How a kernel is spread over a GPU.

    Attributes:
        tile_bytes: bytes of x in a tile, which a program reads at once.
        row_bytes: bytes of x in the widest row of a tile.
        num_warps: warps of a program.
        programs_per_multiprocessor: how many programs to aim at. Each adds its counts to memory once.
        stages: how many tiles are loaded ahead.
        shortest_strip: the least number of tiles of a program, even if that makes fewer programs.
    """

    tile_bytes: int
    row_bytes: int
    num_warps: int
    programs_per_multiprocessor: int
    stages: int = 1
    shortest_strip: int = 1


# Chosen on an H100 (2026-11-27). `fastentropy bench kernels --sweep` prints this table for the GPU that it runs on. Times are
# relative to PyTorch's activation alone, for tensors of 50 to 270 MB. What made the difference:
# - Bytes in flight. Tiles of 8 KB fit into the registers, because a lane sums its own repeats, and need no stages. ReLU of
#   bfloat16 rows takes 1.05 and 1.06 in these tiles, and 1.13 in four stages of 4 KB (measured without tests of bounds, which
#   take 0.4%).
# - More programs than run at a time, so that they do not all end together. With 16 for a multiprocessor instead of 40 these
#   rows take 1.08. Planes take 1.03 and 1.02 with 52 (whole tiles make that 62 and 54), and 1.06 and 1.04 with half of them.
# - Few additions to memory, so a program has at least two tiles. Planes whose programs end after one tile take 1.18 instead
#   of 1.07. A program of rows adds one set of counts for each channel of its tile: in tiles of 4 KB, SiLU of 4096 rows takes
#   1.60 with 256 channels and 1.12 with 64. Summing the lanes' counts before takes 1% less in an int32 than in an int64.
LAUNCHES = {
    # Each row of a tile is two whole 128-byte lines.
    "rows": Launch(tile_bytes=8192, row_bytes=256, num_warps=4, programs_per_multiprocessor=40, shortest_strip=2),
    # A plane is contiguous: a tile is as long as a plane allows, and holds several planes where these are short.
    "planes": Launch(tile_bytes=8192, row_bytes=8192, num_warps=8, programs_per_multiprocessor=52, shortest_strip=2),
    # Below SMALL_BELOW tiles are small, so that every multiprocessor gets some. "small rows" was not measured.
    "small rows": Launch(tile_bytes=2048, row_bytes=256, num_warps=4, programs_per_multiprocessor=8),
    "small planes": Launch(tile_bytes=2048, row_bytes=2048, num_warps=4, programs_per_multiprocessor=8, stages=3),
    # A value has up to 6 counters instead of 1. Larger tiles of 8 warps took 0.18 and 0.17 ms where these take 0.14 and 0.13.
    "histogram rows": Launch(tile_bytes=4096, row_bytes=128, num_warps=4, programs_per_multiprocessor=8),
    "histogram planes": Launch(tile_bytes=2048, row_bytes=2048, num_warps=4, programs_per_multiprocessor=32),
}

# Layout -> bytes per multiprocessor. A tensor with fewer takes the line for small ones.
SMALL_BELOW = {"rows": 1 << 16, "planes": 1 << 18}


def fuses(activation: str, edges: Sequence[float] | None) -> bool:
    """Return whether the activation and the count of its input are one pass, which they always are."""
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
    """Add the states of `values` to `counts` and its NaN to `nan`, and write its activation to `y`.

    See `reference.add_states` for the states, and `layout.Arranged` for `values` and `y`, which may be the same memory.
    `launch` replaces the line of the table.
    """
    kernel, grid, arguments, options = _arguments(values, counts, edges, mask, nan, y, activation, parameters, weight, launch)
    # A launch goes to the current device, which need not be that of the tensor. For a CPU tensor nothing changes.
    with torch.cuda.device_of(values):
        kernel[grid](*arguments, **options)


class PreparedLaunch:
    """`add_states` on a GPU for tensors of one kind, with everything decided but their addresses.

    What Triton works out at each call of a kernel takes longer than the launch.
    """

    def __init__(self, kernel, grid, arguments, options) -> None:
        """Compile the kernel or take it from Triton's cache, without a launch."""
        self._run = kernel.warmup(*arguments, grid=grid, **options)[grid]
        self._others = arguments[3:]
        self._device = torch.cuda.current_device()

    def is_current(self) -> bool:
        """Return whether a launch goes to the device that this one was prepared for."""
        return torch.cuda.current_device() == self._device

    def __call__(self, x: int, y: int, mask: int | None = None) -> None:
        """Launch on the tensors at these addresses, which are multiples of 16, the bytes of the widest access."""
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
    """Prepare `add_states` for tensors like these. Their addresses are multiples of 16; see there for the arguments."""
    with torch.cuda.device_of(values):
        return PreparedLaunch(*_arguments(values, counts, None, mask, None, y, activation, parameters, None, None))


def _arguments(values, counts, edges, mask, nan, y, activation, parameters, weight, launch):
    """Return, for the arguments of `add_states`, the kernel with its grid, arguments and options."""
    launch = launch or LAUNCHES[_line(values, edges)]
    pointers = (values, y, mask, counts, nan, weight)
    # All channels share a single slope. An edge between two float32 numbers is rounded up, so that x >= edge stays exact.
    weight_stride = 0 if weight is None or weight.numel() == 1 else weight.stride(0)
    numbers = (tuple(parameters), tuple(_float32_from(edge) for edge in edges or ()))
    constants = tile(values.shape, values.element_size(), launch)
    arguments_of = _rows_arguments if values.ndim == 2 else _planes_arguments
    kernel, programs, sizes = arguments_of(values, y, weight_stride, constants, launch)
    arguments = (*pointers, *sizes, *numbers, activation, launch.stages, *constants.values())
    return kernel, (programs, 1, 1), arguments, {"num_warps": launch.num_warps, "enable_fp_fusion": True}


def _rows_arguments(values, y, weight_stride: int, constants: dict[str, int], launch: Launch):
    """Return the kernel for rows, the number of its programs, and its sizes."""
    rows, channels = values.shape
    channel_blocks = triton.cdiv(channels, constants["BLOCK_CHANNELS"])
    tiles = triton.cdiv(rows, constants["BLOCK_ROWS"])
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_ROWS"], constants["BLOCK_ROWS"] > MOST_NARROW.value)
    strip_rows = constants["BLOCK_ROWS"] * min(longest, _strip(values, tiles, channel_blocks, launch))
    y_row_stride = channels if y is None else y.stride(0)
    sizes = (rows, channels, values.stride(0), y_row_stride, weight_stride, strip_rows)
    return states_rows_kernel, triton.cdiv(rows, strip_rows) * channel_blocks, sizes


def _planes_arguments(values, y, weight_stride: int, constants: dict[str, int], launch: Launch):
    """Return the kernel for planes, the number of its programs, and its sizes."""
    outer, channels, inner = values.shape
    channel_blocks = triton.cdiv(channels, constants["BLOCK_CHANNELS"])
    tiles = outer * triton.cdiv(inner, constants["BLOCK_INNER"])
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_INNER"], True)
    strip = min(longest, _strip(values, tiles, channel_blocks, launch))
    sizes = (tiles, channels, inner // constants["INNER_MULTIPLE"], weight_stride, strip)
    return states_planes_kernel, triton.cdiv(tiles, strip) * channel_blocks, sizes


def tile(shape: Sequence[int], element_size: int, launch: Launch) -> dict[str, int]:
    """Return the kernel's compile-time sizes, in its order, for values of `shape` with `element_size` bytes each."""
    size, row = launch.tile_bytes // element_size, launch.row_bytes // element_size
    # The values that all threads read in one access of 16 bytes each.
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
    """Return the name of the line of LAUNCHES for these values."""
    layout = "rows" if values.ndim == 2 else "planes"
    if edges:
        return f"histogram {layout}"
    is_small = values.numel() * values.element_size() < _multiprocessors(values) * SMALL_BELOW[layout]
    return f"small {layout}" if is_small else layout


def _strip(values: Tensor, tiles: int, channel_blocks: int, launch: Launch) -> int:
    """Return how many of the `tiles` of a block of channels each program reads, for the number of programs aimed at."""
    programs = _multiprocessors(values) * launch.programs_per_multiprocessor
    return max(launch.shortest_strip, tiles * channel_blocks // programs)


def _longest_strip(repeats: int, positions: int, is_wide: bool) -> int:
    """Return how many tiles a program can count before a counter overflows.

    A tile has `positions` positions, of which a lane holds `repeats`. Without wide sums, a sum over the lanes must fit into
    the counter of a lane.
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
