"""Compile every kernel in every configuration for GPUs that need not be present, and report on the compiled code.

    python -m fastentropy_kernels.aot [--arch sm_80 sm_90 sm_100 gfx942]

Each configuration is one row of a table. It shows the registers and the local memory (spills and stack, in bytes) of a thread,
the shared memory of a program in bytes, and the bytes of one load and one store of global memory.

For the kernels that count states, loads and stores are those of the main loop. Two columns are added: the instructions of this
loop per element, and their share of the instructions that the GPU can issue while its memory moves the element. If the share
is small, the kernel is limited by memory bandwidth.

The exit status is 1 if a kernel spills registers or uses local memory.
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
from fastentropy_kernels.states.validation import MAX_EDGES


class Gpu(NamedTuple):
    """The figures of a GPU that limit the speed of a kernel which reads and writes each value once.

    Attributes:
        multiprocessors: number of multiprocessors.
        clock: boost clock in Hz.
        bandwidth: memory bandwidth in bytes per second.
    """

    multiprocessors: int
    clock: float
    bandwidth: float


# From NVIDIA's datasheets. The clock follows from the FP32 rate. A100 80 GB SXM: 19.5 TFLOPS = 108 multiprocessors x 64 lanes
# x 2 x 1.41 GHz; 2,039 GB/s. H100 SXM: 67 TFLOPS = 132 multiprocessors x 128 lanes x 2 x 1.98 GHz; 3.35 TB/s.
GPUS = {"sm_80": Gpu(108, 1.41e9, 2.039e12), "sm_90": Gpu(132, 1.98e9, 3.35e12)}

# Instructions of threads per cycle and multiprocessor. Each of its four schedulers issues one instruction per cycle for the 32
# threads of a warp.
ISSUED_PER_CYCLE = 4 * 32

# Comparisons, selections and integer operations run on units half as wide as the schedulers (CUDA C++ Programming Guide, table
# of throughputs: 64 per cycle for compute capability 8.0 and 9.0). Below half of the issue rate, these units do not limit a
# kernel either.
ISSUE_LIMIT = 0.5

SHAPES = {"rows": (64 * 56 * 56, 256), "planes": (64, 256, 56 * 56)}
# Sizes that are not aligned allow no wide accesses. A size of 1 becomes a compile-time constant of the kernel.
ODD_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rows": {"37 wide": (1023, 37), "1 row": (1, 256)},
    "planes": {"7x7": (64, 256, 7 * 7), "11x93": (3, 37, 11 * 93), "1 image": (1, 256, 56 * 56)},
}

# The activations of gated MLPs: ReGLU, SwiGLU, GEGLU.
GATED = ("relu", "silu", "gelu", "gelu_tanh")


class Variant(NamedTuple):
    """One configuration of a kernel that counts states.

    Attributes:
        line: a key of `launch_triton.LAUNCHES`.
        dtype: a key of `DTYPES`.
        activation: a key of `activations.ACTIVATIONS`, or None to count only.
        shape: shape of x, `[rows, channels]` or `[outer, channels, inner]`.
        edges: the number of edges of the histogram; 0 to count off, zero and on.
        mask: whether there is a mask.
        nan: whether NaN values are counted.
        gate: whether the activation is multiplied by a gate.
        note: the difference from the plain configuration, in words.
    """

    line: str
    dtype: str
    activation: str | None
    shape: tuple[int, ...]
    edges: int = 0
    mask: bool = False
    nan: bool = False
    gate: bool = False
    note: str = ""

    def __str__(self) -> str:
        """Return the name of the configuration in one line."""
        return " ".join(filter(None, (self.activation or "count", self.dtype, self.line, self.note)))


def variants() -> list[Variant]:
    """Return all configurations of the kernels that count states.

    Masks, NaN counts, unaligned shapes, small tensors and histograms do not depend on the activation. They are combined with
    ReLU only. Gates are combined with the activations of gated MLPs.

    Returns:
        A list of configurations for both layouts and all dtypes.
    """
    found = []
    for layout, dtype in product(SHAPES, DTYPES):
        plain = Variant(layout, dtype, "relu", SHAPES[layout])
        histogram = plain._replace(line=f"histogram {layout}")
        found += [plain._replace(activation=activation) for activation in (None, *ACTIVATIONS)]
        found += [plain._replace(mask=True, note="mask"), plain._replace(nan=True, note="nan")]
        found += [plain._replace(shape=shape, note=note) for note, shape in ODD_SHAPES[layout].items()]
        found += [plain._replace(line=f"small {layout}")]
        gated = plain._replace(gate=True, note="gate")
        found += [gated._replace(activation=activation) for activation in GATED]
        found += [gated._replace(mask=True, nan=True, note="gate mask nan"), gated._replace(line=f"small {layout}")]
        found += [histogram._replace(edges=edges, note=f"{edges} edges") for edges in (1, MAX_EDGES)]
    return found


def compile_variant(variant: Variant, arch: str) -> CompiledKernel:
    """Compile the kernel that `launch_triton.add_states` would launch for `variant`.

    `add_states` is called on tensors of the meta device, which have no memory.

    Args:
        variant: the configuration.
        arch: a key of `TARGETS`, such as "sm_90".

    Returns:
        The compiled kernel.
    """

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
            gate=tensor(variant.shape) if variant.gate else None,
            launch=launch_triton.LAUNCHES[variant.line],
        )
    return compiled[0]


def issue_share(variant: Variant, arch: str, instructions: float | None) -> float | None:
    """Return the instructions per element, relative to those that the GPU can issue while memory moves the element.

    The GPU issues 9.6 (A100) or 10.0 (H100) instructions per byte, and so about 40 for a bfloat16 element that is read and
    written. Above 1, the schedulers limit the kernel.

    Args:
        variant: the configuration. Its dtype, activation and gate determine how many bytes an element moves.
        arch: the architecture, such as "sm_90".
        instructions: instructions of the main loop per element, or None if they are unknown.

    Returns:
        The ratio. None if `GPUS` lacks `arch` or `instructions` is None.
    """
    if arch not in GPUS or instructions is None:
        return None
    gpu = GPUS[arch]
    bytes_moved = DTYPES[variant.dtype].itemsize * (1 + bool(variant.activation) + variant.gate)
    return instructions / (bytes_moved / gpu.bandwidth * gpu.multiprocessors * gpu.clock * ISSUED_PER_CYCLE)


def examine(variant: Variant | ChainVariant, arch: str) -> Findings:
    """Compile a configuration and inspect the compiled code.

    Args:
        variant: a configuration of a kernel that counts states or of a fused chain.
        arch: a key of `TARGETS`.

    Returns:
        The findings.

    Raises:
        RuntimeError: the configuration does not compile.
    """
    try:
        if isinstance(variant, ChainVariant):
            return inspect(compile_chain(variant, arch))
        return inspect(compile_variant(variant, arch), DTYPES[variant.dtype].itemsize)
    except Exception as error:
        raise RuntimeError(f"{variant}: does not compile for {arch}") from error


def examine_all(work: Sequence[tuple[Variant | ChainVariant, str]]) -> Iterator[Findings]:
    """Examine configurations in parallel, in one process per core.

    Args:
        work: pairs of a configuration and an architecture.

    Yields:
        The findings, in the order of `work`.
    """
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        yield from pool.map(examine, *zip(*work, strict=True))


COLUMNS = "{:16} {:4} {:10} {:8} {:>4} {:>5} {:>4} {:>6} {:>3} {:>5} {:>5}"
HEADINGS = "line type activation with regs local smem in out instr issue"
CHAIN_COLUMNS = "{:19} {:4} {:25} {:>4} {:>5} {:>5} {:>8} {:>3}"
CHAIN_HEADINGS = "chain type with regs local smem in out"


def heading(variant: Variant | ChainVariant) -> str:
    """Return the heading of the table for configurations of this kind."""
    if isinstance(variant, ChainVariant):
        return CHAIN_COLUMNS.format(*CHAIN_HEADINGS.split())
    return COLUMNS.format(*HEADINGS.split())


def table_row(variant: Variant | ChainVariant, arch: str, findings: Findings) -> str:
    """Return the row of a configuration in the table of an architecture.

    Args:
        variant: the configuration.
        arch: the architecture.
        findings: what the compiled code shows.
    """
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
    """Return the cells that both kinds of tables share: registers, local and shared bytes, loads and stores."""
    widths = ("+".join(map(str, widths)) for widths in (findings.loads, findings.stores))
    return (findings.registers, findings.local_bytes, findings.shared_bytes, *widths)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: the arguments after the name of the command. None for those of the process.

    Returns:
        0, 1 if a kernel spills registers or uses local memory, or 2 for a wrong argument or environment.
    """
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
    """Print the reason why the command cannot run to stderr, and return the exit status 2."""
    print(reason, file=sys.stderr)
    return 2


def _report(work: Sequence[tuple[Variant | ChainVariant, str]]) -> int:
    """Print a table for each architecture, then a list of the slow configurations and a list of those that spill.

    Args:
        work: pairs of a configuration and an architecture.

    Returns:
        The exit status: 1 if a kernel spills registers or uses local memory, else 0.
    """
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
    """Replace the progress line by `text` if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
