"""GPU: launches of the state kernels.

The table `LAUNCHES` says how a kernel is spread over the GPU for each kind of tensor. `add_states` launches at once. `prepare`
makes all decisions but the addresses, for a launch that is repeated with tensors of the same kind.
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

from fastentropy_kernels.counting_triton import MAX_COUNTED
from fastentropy_kernels.layout import largest_power_of_2
from fastentropy_kernels.states.kernels_triton import MAX_NARROW, MAX_SUMMED, states_planes_kernel, states_rows_kernel


class Launch(NamedTuple):
    """How a kernel is spread over a GPU.

    A program (Triton's term for a thread block) counts a strip, which is a number of tiles one after the other. It adds its
    counts to memory once, after the strip.

    Attributes:
        tile_bytes: bytes of x in a tile, which a program loads at once.
        row_bytes: the largest number of bytes of x in one row of a tile.
        num_warps: warps of a program.
        programs_per_multiprocessor: the number of programs to aim at, for each multiprocessor.
        stages: how many tiles are loaded ahead.
        shortest_strip: the least number of tiles in a strip. It takes precedence over the number of programs.
    """

    tile_bytes: int
    row_bytes: int
    num_warps: int
    programs_per_multiprocessor: int
    stages: int = 1
    shortest_strip: int = 1


# These numbers were chosen on an H100 (2026-11-27). `fastentropy bench kernels --sweep` prints this table for the GPU that it
# runs on. All times below are relative to PyTorch's activation alone, for tensors of 50 to 270 MB. Three things made a
# difference:
# - Bytes in flight. A tile of 8 KB fits into the registers, because each lane sums the counts of its own values, and it needs
#   no stages. ReLU of bfloat16 rows takes 1.05 and 1.06 in these tiles, and 1.13 in four stages of 4 KB (measured without
#   bounds checks, which take 0.4%).
# - More programs than can run at the same time, because then they do not all end at the same time. With 16 programs per
#   multiprocessor instead of 40, the same rows take 1.08. Planes take 1.03 and 1.02 with 52 programs (62 and 54 in fact,
#   because a program has whole tiles), and 1.06 and 1.04 with half as many.
# - Few additions to memory. A program therefore has at least two tiles: planes take 1.18 with one tile per program and 1.07
#   with two. A program of rows adds one set of counts for each channel of its tile. In tiles of 4 KB, SiLU of 4096 rows takes
#   1.60 with 256 channels per tile and 1.12 with 64. Before that, the counts of the lanes are summed, which takes 1% less in
#   an int32 than in an int64.
# Launches with a gate, which read twice as much, use the same lines. They were compiled for every target without spills (see
# `aot`), and not measured.
LAUNCHES = {
    # Each row of a tile is 256 bytes, which are two whole cache lines of 128 bytes.
    "rows": Launch(tile_bytes=8192, row_bytes=256, num_warps=4, programs_per_multiprocessor=40, shortest_strip=2),
    # A plane is contiguous. A tile therefore holds as much of a plane as possible, and several planes if they are short.
    "planes": Launch(tile_bytes=8192, row_bytes=8192, num_warps=8, programs_per_multiprocessor=52, shortest_strip=2),
    # Tensors below SMALL_BELOW are cut into small tiles, because every multiprocessor should get some. "small rows" was not
    # measured.
    "small rows": Launch(tile_bytes=2048, row_bytes=256, num_warps=4, programs_per_multiprocessor=8),
    "small planes": Launch(tile_bytes=2048, row_bytes=2048, num_warps=4, programs_per_multiprocessor=8, stages=3),
    # A lane has up to 6 int32 of counters here, and only one without edges. Larger tiles with 8 warps took 0.18 and 0.17 ms;
    # these take 0.14 and 0.13 ms.
    "histogram rows": Launch(tile_bytes=4096, row_bytes=128, num_warps=4, programs_per_multiprocessor=8),
    "histogram planes": Launch(tile_bytes=2048, row_bytes=2048, num_warps=4, programs_per_multiprocessor=32),
}

# For each layout, a number of bytes per multiprocessor. A tensor with fewer bytes uses the entry for small tensors.
SMALL_BELOW = {"rows": 1 << 16, "planes": 1 << 18}


def fuses(activation: str, edges: Sequence[float] | None) -> bool:
    """Return whether the activation and the count of its input run in one pass.

    In Triton they always do. The arguments are the same as for Numba, which fuses only some activations.
    """
    return True


def multiplies(dtype: torch.dtype, edges: Sequence[float] | None) -> bool:
    """Return whether the product with a gate is computed in the pass that counts. In Triton it always is."""
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
    gate: Tensor | None = None,
    launch: Launch | None = None,
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
        activation: a key of `activations.ACTIVATIONS`.
        parameters: the parameters of the activation, in the order of the table.
        weight: the slopes of prelu, `[channels]` or `[1]`. None for other activations.
        gate: what the activation is multiplied by. It has the shape and dtype of `values`; only its row stride may be another.
            None not to multiply.
        launch: replaces the entry of `LAUNCHES` for tensors of this kind.
    """
    kernel, grid, arguments, options = _arguments(
        values, counts, edges, mask, nan, y, activation, parameters, weight, gate, launch
    )
    # A launch goes to the current device, which may differ from the device of the tensor. For a CPU tensor this context does
    # nothing.
    with torch.cuda.device_of(values):
        kernel[grid](*arguments, **options)


class PreparedLaunch:
    """A prepared `add_states` on a GPU: everything but the addresses of the tensors is decided.

    At each call of a kernel, Triton derives its specialisation from the arguments. This takes longer than the launch itself.
    """

    def __init__(self, kernel, grid, arguments, options) -> None:
        """Compile the kernel, or take it from Triton's cache. Nothing is launched.

        Args:
            kernel: the kernel of rows or of planes.
            grid: the number of programs along the three axes of the grid.
            arguments: all arguments of the kernel in order, starting with x, y, the mask, the counts and the gate.
            options: the options of the compiler, such as `num_warps`.
        """
        self._run = kernel.warmup(*arguments, grid=grid, **options)[grid]
        self._others = arguments[5:]
        self._device = torch.cuda.current_device()

    def is_current(self) -> bool:
        """Return whether the current device is still the one that the launch was prepared for."""
        return torch.cuda.current_device() == self._device

    def __call__(self, x: int, y: int, counts: int, mask: int | None = None, gate: int | None = None) -> None:
        """Launch the kernel on the tensors at these addresses.

        Args:
            x: address of the input, a multiple of 16.
            y: address of the output, a multiple of 16; 0 if the launch was prepared without one.
            counts: address of the counts. It is a multiple of 16 if that of the counts of `prepare` is, and only then.
            mask: address of the mask, a multiple of 16. None if the launch was prepared without a mask.
            gate: address of the gate, a multiple of 16. None if the launch was prepared without a gate.
        """
        self._run(x, y or None, mask, counts, gate, *self._others)


def prepare(
    values: Tensor,
    counts: Tensor,
    *,
    mask: Tensor | None,
    y: Tensor | None,
    activation: str,
    parameters: Sequence[float],
    gate: Tensor | None = None,
) -> PreparedLaunch:
    """Prepare `add_states` for tensors like these, whose addresses are multiples of 16.

    Args:
        values: *rows* or *planes*, as for `add_states`.
        counts: int64 `[channels, 3]`, contiguous. Each launch adds to it.
        mask: as for `add_states`.
        y: as for `add_states`.
        activation: as for `add_states`.
        parameters: as for `add_states`.
        gate: as for `add_states`.
    """
    with torch.cuda.device_of(values):
        return PreparedLaunch(*_arguments(values, counts, None, mask, None, y, activation, parameters, None, gate, None))


def _arguments(values, counts, edges, mask, nan, y, activation, parameters, weight, gate, launch):
    """Return what a launch of the kernel needs, for the arguments of `add_states`.

    Returns:
        The kernel; its grid; all its arguments in order; the options of the compiler.
    """
    launch = launch or LAUNCHES[_line(values, edges)]
    pointers = (values, y, mask, counts, gate, nan, weight)
    # A weight with a single slope has stride 0, so all channels read the same value. An edge between two float32 numbers is
    # rounded up, which keeps the comparison x >= edge exact.
    weight_stride = 0 if weight is None or weight.numel() == 1 else weight.stride(0)
    numbers = (tuple(parameters), tuple(_float32_from(edge) for edge in edges or ()))
    constants = tile(values.shape, values.element_size(), launch)
    arguments_of = _rows_arguments if values.ndim == 2 else _planes_arguments
    kernel, programs, sizes = arguments_of(values, y, gate, weight_stride, constants, launch)
    arguments = (*pointers, *sizes, *numbers, activation, launch.stages, *constants.values())
    return kernel, (programs, 1, 1), arguments, {"num_warps": launch.num_warps, "enable_fp_fusion": True}


def _rows_arguments(values, y, gate, weight_stride: int, constants: dict[str, int], launch: Launch):
    """Return the kernel for rows, and how to launch it.

    Args:
        values: the input, `[rows, channels]`.
        y: the output, or None to count only.
        gate: what the activation is multiplied by, or None.
        weight_stride: distance between two slopes of prelu, in elements.
        constants: the compile-time sizes that `tile` returns.
        launch: how the kernel is spread over the GPU.

    Returns:
        The kernel; the number of its programs; its arguments from `rows` to `strip_rows`.
    """
    rows, channels = values.shape
    channel_blocks = triton.cdiv(channels, constants["BLOCK_CHANNELS"])
    tiles = triton.cdiv(rows, constants["BLOCK_ROWS"])
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_ROWS"], constants["BLOCK_ROWS"] > MAX_NARROW.value)
    strip_rows = constants["BLOCK_ROWS"] * min(longest, _strip(values, tiles, channel_blocks, launch))
    y_row_stride = channels if y is None else y.stride(0)
    gate_row_stride = channels if gate is None else gate.stride(0)
    sizes = (rows, channels, values.stride(0), y_row_stride, gate_row_stride, weight_stride, strip_rows)
    return states_rows_kernel, triton.cdiv(rows, strip_rows) * channel_blocks, sizes


def _planes_arguments(values, y, gate, weight_stride: int, constants: dict[str, int], launch: Launch):
    """Return the kernel for planes, and how to launch it.

    Args:
        values: the input, `[outer, channels, inner]`.
        y: the output, or None to count only.
        gate: what the activation is multiplied by, or None.
        weight_stride: distance between two slopes of prelu, in elements.
        constants: the compile-time sizes that `tile` returns.
        launch: how the kernel is spread over the GPU.

    Returns:
        The kernel; the number of its programs; its arguments from `tiles` to `strip`.
    """
    outer, channels, inner = values.shape
    channel_blocks = triton.cdiv(channels, constants["BLOCK_CHANNELS"])
    tiles = outer * triton.cdiv(inner, constants["BLOCK_INNER"])
    longest = _longest_strip(constants["REPEATS"], constants["BLOCK_INNER"], True)
    strip = min(longest, _strip(values, tiles, channel_blocks, launch))
    sizes = (tiles, channels, inner // constants["INNER_MULTIPLE"], weight_stride, strip)
    return states_planes_kernel, triton.cdiv(tiles, strip) * channel_blocks, sizes


def tile(shape: Sequence[int], element_size: int, launch: Launch) -> dict[str, int]:
    """Return the compile-time sizes of the kernel as a dictionary, in the order of its arguments.

    Args:
        shape: shape of the values, `[rows, channels]` or `[outer, channels, inner]`.
        element_size: bytes of one value.
        launch: how the kernel is spread over the GPU.
    """
    size, row = launch.tile_bytes // element_size, launch.row_bytes // element_size
    # How many values the threads of a program read together, if each reads 16 bytes.
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
    """Return the key of the entry of LAUNCHES that suits these values and edges."""
    layout = "rows" if values.ndim == 2 else "planes"
    if edges:
        return f"histogram {layout}"
    is_small = values.numel() * values.element_size() < _multiprocessors(values) * SMALL_BELOW[layout]
    return f"small {layout}" if is_small else layout


def _strip(values: Tensor, tiles: int, channel_blocks: int, launch: Launch) -> int:
    """Return the number of tiles in a strip, chosen for the number of programs that `launch` aims at.

    Args:
        values: the input, as rows or planes.
        tiles: how many tiles each block of channels consists of.
        channel_blocks: how many blocks the channels are divided into.
        launch: how the kernel is spread over the GPU.
    """
    programs = _multiprocessors(values) * launch.programs_per_multiprocessor
    return max(launch.shortest_strip, tiles * channel_blocks // programs)


def _longest_strip(repeats: int, positions: int, is_wide: bool) -> int:
    """Return how many tiles a program can count before a counter overflows.

    Args:
        repeats: how many values of a tile each lane counts.
        positions: how many values of a tile belong to one channel.
        is_wide: whether the lanes are summed with 21-bit counters. Otherwise the sum keeps the 10-bit counters of a lane.
    """
    max_counted, max_summed = int(MAX_COUNTED.value), int(MAX_SUMMED.value)
    return min(max_counted // repeats, (max_summed if is_wide else max_counted) // positions)


def _multiprocessors(values: Tensor) -> int:
    """Return the number of multiprocessors of the GPU that holds `values`, or 1 for a tensor on another device."""
    count: int = torch.cuda.get_device_properties(values.device).multi_processor_count if values.is_cuda else 1
    return count


def _float32_from(edge: float) -> float:
    """Return the smallest float32 that is at least `edge`."""
    with np.errstate(over="ignore"):
        rounded = np.float32(edge)
    return float(rounded if float(rounded) >= edge else np.nextafter(rounded, np.float32(np.inf)))
