"""Try launch configurations of the state kernels on the GPU here and print the table of states_triton.LAUNCHES it asks for.

python bench/sweep_states.py

Takes some minutes: each candidate is compiled once. Nothing is changed; copy the lines that differ.
"""

import sys
from collections.abc import Iterator

import torch

from fastentropy.timing import measure_times
from fastentropy_kernels import states_triton
from fastentropy_kernels.states_triton import LAUNCHES, Launch

TILE_BYTES = (2048, 4096, 8192, 16384)
ROW_BYTES = (128, 256, 512, 1024)
WARPS = (4, 8)
PROGRAMS = (4, 8, 16, 32)
DEFAULT_SHAPES = {
    "rows": (16384, 4096),
    "planes": (83, 256, 3136),
    "small rows": (256, 4096),
    "small planes": (4, 256, 784),
    "histogram rows": (16384, 4096),
    "histogram planes": (83, 256, 3136),
}
EDGES = tuple(range(-3, 4))


def main() -> None:
    """Print the best line for each line of the table, with its time beside the present one's."""
    if not torch.cuda.is_available():
        sys.exit("Error: sweep_states.py measures on a GPU, and PyTorch sees none here")
    print(f"# {torch.cuda.get_device_name()}, bfloat16, relu")
    for line, shape in DEFAULT_SHAPES.items():
        print(show(line, sweep(line, torch.randn(shape, device="cuda", dtype=torch.bfloat16))), flush=True)


def sweep(line: str, values: torch.Tensor) -> dict[Launch, float]:
    """Return the milliseconds of every candidate for a line of the table, measured in turns on `values`."""
    edges = EDGES if "histogram" in line else None
    counts = torch.zeros(values.shape[1], 3 if edges is None else len(edges) + 1, dtype=torch.int64, device=values.device)
    y = torch.empty_like(values)

    def run(launch: Launch) -> None:
        states_triton.add_states(values, counts, edges=edges, y=y, activation="relu", launch=launch)

    return measure_times({launch: lambda launch=launch: run(launch) for launch in candidates(line)}, rounds=9)


def candidates(line: str) -> Iterator[Launch]:
    """Yield the table's own line, then every other that reads 16 bytes per thread at least."""
    yield LAUNCHES[line]
    for tile_bytes in TILE_BYTES:
        for row_bytes in ROW_BYTES if "rows" in line else (tile_bytes,):
            for warps in WARPS:
                for programs in PROGRAMS:
                    launch = Launch(tile_bytes, row_bytes, warps, programs)
                    if launch != LAUNCHES[line] and warps * 32 * 16 <= tile_bytes >= row_bytes:
                        yield launch


def show(line: str, times: dict[Launch, float]) -> str:
    """Write the fastest as a line of the table; the present one where nothing is faster by more than two percent."""
    present = LAUNCHES[line]
    best = min(times, key=times.__getitem__)
    if times[best] > 0.98 * times[present]:
        best = present
    return f'"{line}": {best},  # {times[best]:.4f} ms, present line {times[present]:.4f} ms'


if __name__ == "__main__":
    main()
