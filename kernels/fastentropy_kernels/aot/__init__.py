"""Compile every kernel and configuration for GPUs that need not be there, and report what the compiler made of them.

    python -m fastentropy_kernels.aot [--arch sm_80 sm_90 sm_100 gfx942]

Each kernel gets a row: the registers and local bytes (spills, stack) of a thread, the shared bytes of a program, and the bytes
of an access to global memory. Rows of the state kernels show the accesses of the main loop, its instructions per element, and
these as a share of what the GPU can issue while its memory moves the element. Where that share is small, memory is the bound.
The exit status is 1 if a kernel spills or uses local memory.
"""

# Triton has no types, so its CompiledKernel is Any.
# mypy: disable-error-code="misc"
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import torch
from triton.compiler import CompiledKernel

from fastentropy_kernels import activations_triton
from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.aot.chains import ChainVariant, chain_variants, compile_chain
from fastentropy_kernels.aot.inspection import DTYPES, NO_COMPILER, TARGETS, Findings, compiling_for, inspect
from fastentropy_kernels.states import launch_triton
from fastentropy_kernels.states.validation import MOST_EDGES


class Gpu(NamedTuple):
    """The rates of a GPU that bound a kernel which reads and writes each value once."""

    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second


# From NVIDIA's datasheets, whose FP32 rate gives the clock. A100 80 GB SXM: 19.5 TFLOPS = 108 multiprocessors x 64 lanes x 2
# x 1.41 GHz, 2,039 GB/s. H100 SXM: 67 TFLOPS = 132 x 128 x 2 x 1.98 GHz, 3.35 TB/s.
GPUS = {"sm_80": Gpu(108, 1.41e9, 2.039e12), "sm_90": Gpu(132, 1.98e9, 3.35e12)}

# Each of the four schedulers of a multiprocessor issues one instruction per cycle, for the 32 threads of a warp.
ISSUED_PER_CYCLE = 4 * 32

# Comparisons, selections and integer operations go to units half as wide as the schedulers (CUDA C++ Programming Guide, table
# of throughputs: 64 per cycle for compute capability 8.0 and 9.0). Below half of the issue rate these are no bound either.
ISSUE_LIMIT = 0.5

SHAPES = {"rows": (64 * 56 * 56, 256), "planes": (64, 256, 56 * 56)}
# Without alignment there are no wide accesses. A size of 1 becomes a constant of the kernel.
ODD_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rows": {"37 wide": (1023, 37), "1 row": (1, 256)},
    "planes": {"7x7": (64, 256, 7 * 7), "11x93": (3, 37, 11 * 93), "1 image": (1, 256, 56 * 56)},
}


class Variant(NamedTuple):
    """One configuration of a state kernel."""

    line: str  # of launch_triton.LAUNCHES
    dtype: str  # of DTYPES
    activation: str | None  # None to count alone
    shape: tuple[int, ...]
    edges: int = 0  # of the histogram; 0 for signs
    mask: bool = False
    nan: bool = False
    note: str = ""  # how it differs from the plain variant

    def __str__(self) -> str:
        """Return a name of one line."""
        return " ".join(filter(None, (self.activation or "count", self.dtype, self.line, self.note)))


def variants() -> list[Variant]:
    """Return all configurations of the state kernels. Those that do not depend on the activation are there with ReLU only."""
    found = []
    for layout, dtype in product(SHAPES, DTYPES):
        plain = Variant(layout, dtype, "relu", SHAPES[layout])
        histogram = plain._replace(line=f"histogram {layout}")
        found += [plain._replace(activation=activation) for activation in (None, *ACTIVATIONS)]
        found += [plain._replace(mask=True, note="mask"), plain._replace(nan=True, note="nan")]
        found += [plain._replace(shape=shape, note=note) for note, shape in ODD_SHAPES[layout].items()]
        found += [plain._replace(line=f"small {layout}")]
        found += [histogram._replace(edges=edges, note=f"{edges} edges") for edges in (1, MOST_EDGES)]
    return found


def compile_variant(variant: Variant, arch: str) -> CompiledKernel:
    """Compile what `launch_triton.add_states` launches for `variant`, by calling it on tensors without memory."""

    def tensor(shape: tuple[int, ...], dtype: torch.dtype = DTYPES[variant.dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    _, channels, *inner = variant.shape
    activation = variant.activation or "identity"
    with compiling_for(arch) as compiled:
        launch_triton.add_states(
            tensor(variant.shape),
            tensor((channels, variant.edges + 1 if variant.edges else 3), torch.int64),
            edges=tuple(range(variant.edges)) or None,
            mask=tensor((variant.shape[0], *inner), torch.bool) if variant.mask else None,
            nan=tensor((channels,), torch.int64) if variant.nan else None,
            y=tensor(variant.shape) if variant.activation else None,
            activation=activation,
            parameters=tuple(ACTIVATIONS[activation].parameters.values()),
            weight=tensor((channels,)) if activation == "prelu" else None,
            launch=launch_triton.LAUNCHES[variant.line],
        )
    return compiled[0]


def issue_share(variant: Variant, arch: str, instructions: float | None) -> float | None:
    """Return the instructions per element as a share of those that the GPU can issue while memory moves the element.

    The GPU issues 9.6 (A100) or 10.0 (H100) instructions per byte, and so about 40 for a bfloat16 element that is read and
    written. Above 1 the schedulers are the bound. The result is None where GPUS lacks `arch`.
    """
    if arch not in GPUS or instructions is None:
        return None
    gpu = GPUS[arch]
    bytes_moved = DTYPES[variant.dtype].itemsize * (2 if variant.activation else 1)
    return instructions / (bytes_moved / gpu.bandwidth * gpu.multiprocessors * gpu.clock * ISSUED_PER_CYCLE)


def examine(variant: Variant | ChainVariant, arch: str) -> Findings:
    """Compile and inspect a variant."""
    try:
        if isinstance(variant, ChainVariant):
            return inspect(compile_chain(variant, arch))
        return inspect(compile_variant(variant, arch), DTYPES[variant.dtype].itemsize)
    except Exception as error:
        raise RuntimeError(f"{variant}: does not compile for {arch}") from error


def examine_all(work: Sequence[tuple[Variant | ChainVariant, str]]) -> Iterator[Findings]:
    """Examine on all cores, in separate processes. Yield the findings in the order of `work`."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        yield from pool.map(examine, *zip(*work, strict=True))


COLUMNS = "{:16} {:4} {:10} {:8} {:>4} {:>5} {:>4} {:>6} {:>3} {:>5} {:>5}"
HEADINGS = "line type activation with regs local smem in out instr issue"
CHAIN_COLUMNS = "{:19} {:4} {:25} {:>4} {:>5} {:>5} {:>8} {:>3}"
CHAIN_HEADINGS = "chain type with regs local smem in out"


def heading(variant: Variant | ChainVariant) -> str:
    """Return the heading above the rows of variants of this kind."""
    if isinstance(variant, ChainVariant):
        return CHAIN_COLUMNS.format(*CHAIN_HEADINGS.split())
    return COLUMNS.format(*HEADINGS.split())


def table_row(variant: Variant | ChainVariant, arch: str, findings: Findings) -> str:
    """Return the row of a variant in the table of an architecture."""
    if isinstance(variant, ChainVariant):
        cells: tuple[object, ...] = (variant.kernel, variant.dtype, variant.note, *_numbers(findings))
        return CHAIN_COLUMNS.format(*("-" if cell == "" else cell for cell in cells))
    share = issue_share(variant, arch, findings.instructions)
    cells = (
        *(variant.line, variant.dtype, variant.activation, variant.note),
        *_numbers(findings),
        f"{findings.instructions:.1f}" if findings.instructions else None,
        f"{share:.0%}{'!' if share > ISSUE_LIMIT else ' '}" if share else None,
    )
    return COLUMNS.format(*("-" if cell in (None, "") else cell for cell in cells)).rstrip()


def _numbers(findings: Findings) -> tuple[object, ...]:
    """Return the cells that the rows of both kinds of variants share."""
    widths = ("+".join(map(str, widths)) for widths in (findings.loads, findings.stores))
    return (findings.registers, findings.local_bytes, findings.shared_bytes, *widths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 if a kernel spills, 2 for a wrong argument or environment."""
    parser = argparse.ArgumentParser(
        "python -m fastentropy_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all by default")
    architectures = parser.parse_args(arguments).arch
    if unknown := [arch for arch in architectures if arch not in TARGETS]:
        return _refuse(f"--arch: got {unknown[0]!r}, expected one of {', '.join(TARGETS)}")
    if activations_triton.INTERPRETED:
        return _refuse(NO_COMPILER)
    return _report([(variant, arch) for arch, variant in product(architectures, [*variants(), *chain_variants()])])


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


def _report(work: Sequence[tuple[Variant | ChainVariant, str]]) -> int:
    """Print a table for each architecture, and then what is slow or spills. Return the exit status."""
    slow, spilled = [], []
    shown: object = None
    for number, ((variant, arch), findings) in enumerate(zip(work, examine_all(work), strict=True), 1):
        _progress("")
        if (arch, type(variant)) != shown:
            print(f"{arch}\n{heading(variant)}")
            shown = (arch, type(variant))
        print(table_row(variant, arch, findings), flush=True)
        _progress(f"{number} of {len(work)} compiled")
        share = None if isinstance(variant, ChainVariant) else issue_share(variant, arch, findings.instructions)
        if share and share > ISSUE_LIMIT:
            slow.append(f"{variant} {arch} {share:.0%}")
        if findings.spilled:
            spilled.append(f"{variant} {arch}")
    _progress("")
    for title, names in (("above half of the issue rate", slow), ("spills or local memory", spilled)):
        print(f"\n{title}: {len(names)} of {len(work)}", *names, sep="\n  ")
    return 1 if spilled else 0


def _progress(text: str) -> None:
    """Replace the line of progress where stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
