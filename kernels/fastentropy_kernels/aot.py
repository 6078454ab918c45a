"""Compile every kernel and configuration for GPUs that need not be there, and say what came out.

    python -m fastentropy_kernels.aot [--arch sm_80 sm_90 sm_100 gfx942]

A row for each: the registers and local bytes (spills, stack) of a thread, the shared bytes of a program, and of the main
loop the bytes that one access reads or writes, its instructions per element, and these as a share of what the GPU can
issue while its memory moves the element. Where that share is small, memory is the bound. The exit status is 1 if anything
spills or uses local memory.
"""

# Triton has no types.
# mypy: disable-error-code="misc"
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from . import states_triton
from .arguments import MOST_EDGES
from .reference import ACTIVATIONS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Gpu(NamedTuple):
    """What bounds a kernel that streams."""

    multiprocessors: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second


# NVIDIA's datasheets, whose FP32 rate gives the clock. A100 80 GB SXM: 19.5 TFLOPS = 108 multiprocessors x 64 lanes x 2
# x 1.41 GHz, 2,039 GB/s. H100 SXM: 67 TFLOPS = 132 x 128 x 2 x 1.98 GHz, 3.35 TB/s.
GPUS = {"sm_80": Gpu(108, 1.41e9, 2.039e12), "sm_90": Gpu(132, 1.98e9, 3.35e12)}

# Each of a multiprocessor's four schedulers issues an instruction per cycle, for the 32 threads of a warp.
ISSUED_PER_CYCLE = 4 * 32

# Comparisons, selections and integers go to units half as wide as the schedulers (CUDA C++ Programming Guide, table of
# throughputs: 64 per cycle for compute capability 8.0 and 9.0). Below half of the issue rate these are no bound either.
ISSUE_LIMIT = 0.5

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"rows": (64 * 56 * 56, 256), "planes": (64, 256, 56 * 56)}
# Without alignment there are no wide accesses; a size of 1 becomes a constant of the kernel.
ODD_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rows": {"37 wide": (1023, 37), "1 row": (1, 256)},
    "planes": {"7x7": (64, 256, 7 * 7), "11x93": (3, 37, 11 * 93), "1 image": (1, 256, 56 * 56)},
}


class Variant(NamedTuple):
    """What a kernel is compiled for."""

    line: str  # of states_triton.LAUNCHES
    dtype: str  # of DTYPES
    activation: str | None  # None: the count alone
    shape: tuple[int, ...]
    edges: int = 0
    mask: bool = False
    nan: bool = False
    note: str = ""  # what sets it apart

    def __str__(self) -> str:
        """Return a name for a line of text."""
        return " ".join(filter(None, (self.activation or "count", self.dtype, self.line, self.note)))


class Findings(NamedTuple):
    """What the compiled code shows."""

    registers: int  # of a thread
    spills: int  # instructions that access local memory; on AMD registers
    local_bytes: int  # of a thread, stack included
    shared_bytes: int  # of a program
    loads: tuple[int, ...]  # bytes of an access to global memory in the main loop: every width, the widest first
    stores: tuple[int, ...]
    instructions: float | None  # of the main loop, per element; None on AMD

    @property
    def spilled(self) -> bool:
        """Whether the registers did not suffice."""
        return self.spills > 0 or self.local_bytes > 0


def variants() -> list[Variant]:
    """Return every kernel and configuration. What does not depend on the activation is there with ReLU alone."""
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
    """Compile what `states_triton` launches for `variant`: by that launch, on tensors without memory, up to the start."""

    def tensor(shape: tuple[int, ...], dtype: torch.dtype = DTYPES[variant.dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    _, channels, *inner = variant.shape
    activation = variant.activation or "identity"
    with _compiling_for(arch) as compiled:
        states_triton.add_states(
            tensor(variant.shape),
            tensor((channels, variant.edges + 1 if variant.edges else 3), torch.int64),
            edges=tuple(range(variant.edges)) or None,
            mask=tensor((variant.shape[0], *inner), torch.bool) if variant.mask else None,
            nan=tensor((channels,), torch.int64) if variant.nan else None,
            y=tensor(variant.shape) if variant.activation else None,
            activation=activation,
            parameters=tuple(ACTIVATIONS[activation].parameters.values()),
            weight=tensor((channels,)) if activation == "prelu" else None,
            launch=states_triton.LAUNCHES[variant.line],
        )
    return compiled[0]


@contextmanager
def _compiling_for(arch: str) -> Iterator[list[CompiledKernel]]:
    """Make launches compile for `arch` and add the kernel to a list in place of starting it."""
    if states_triton.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: set, expected a compiler; run again with env -u TRITON_INTERPRET")
    compiled: list[CompiledKernel] = []
    kernels = (states_triton.states_rows_kernel, states_triton.states_planes_kernel)

    def compile_only(run: Any) -> Any:
        return lambda *arguments, warmup, **options: compiled.append(run(*arguments, warmup=True, **options))

    active, driver._active = driver._active, _AbsentDriver(arch)
    for kernel in kernels:
        kernel.run = compile_only(kernel.run)
    try:
        yield compiled
    finally:
        driver._active = active
        for kernel in kernels:
            del kernel.run


class _AbsentDriver(NamedTuple):
    """As much of a GPU's driver as Triton's compiler asks for. Kernels are kept by device: each architecture is one."""

    arch: str

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]


def inspect(compiled: CompiledKernel, variant: Variant) -> Findings:
    """Read the compiler's output."""
    return _inspect_amd(compiled) if "amdgcn" in compiled.asm else _inspect_nvidia(compiled, variant)


def _inspect_nvidia(compiled: CompiledKernel, variant: Variant) -> Findings:
    sass = disassemble(compiled)
    loop = main_loop(sass)
    loads, stores = accesses(loop, "LDG"), accesses(loop, "STG")
    # What is written is y. Where nothing is, what is read is x alone: no variant counts alone and has a mask.
    elements = sum(stores or loads) // DTYPES[variant.dtype].itemsize
    return Findings(
        registers=_number(r"REG:(\d+)", sass),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        local_bytes=_number(r"STACK:(\d+)", sass) + _number(r"LOCAL:(\d+)", sass),
        shared_bytes=compiled.metadata.shared,
        loads=_widths(loads),
        stores=_widths(stores),
        instructions=len(loop) / elements,
    )


def disassemble(compiled: CompiledKernel) -> str:
    """Return the machine code as text, and the resources that it takes, from the cuobjdump that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main_loop(sass: str) -> list[str]:
    """Return the instructions from a backward branch's target to the branch: those of the loop that reads most bytes.

    A loop that runs once may be none. Then it is the whole kernel.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", sass)
    code = {int(address, 16): instruction for address, instruction in lines}
    loops = []
    for end, instruction in code.items():
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", instruction)
        if branch and (start := int(branch[1], 16)) < end:
            loops.append([code[address] for address in code if start <= address <= end])
    return max(loops, key=lambda loop: sum(accesses(loop, "LDG")), default=list(code.values()))


def accesses(code: Iterable[str], opcode: str) -> list[int]:
    """Return the bytes of each access: 16 for LDG.E.128 and STG.E.128, 4 for a plain LDG.E, 2 for LDG.E.U16."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    found = filter(None, (re.search(rf"\b{opcode}([.\w]*)", instruction) for instruction in code))
    return [next((widths[suffix] for suffix in match[1].split(".") if suffix in widths), 4) for match in found]


def _inspect_amd(compiled: CompiledKernel) -> Findings:
    text = compiled.asm["amdgcn"]
    widths = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}

    def moved(direction: str) -> tuple[int, ...]:
        sizes = re.findall(rf"\b(?:global|buffer|flat)_{direction}_[us]?(byte|short|dword(?:x\d)?)", text)
        return _widths(widths[size] for size in sizes)

    return Findings(
        registers=_number(r"\.vgpr_count:\s+(\d+)", text),
        spills=_number(r"\.vgpr_spill_count:\s+(\d+)", text),
        local_bytes=_number(r"\.private_segment_fixed_size:\s+(\d+)", text),
        shared_bytes=compiled.metadata.shared,
        loads=moved("load"),
        stores=moved("store"),
        instructions=None,
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"no {pattern} in what the compiler wrote"
    return int(match[1])


def _widths(sizes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes), reverse=True))


def issue_share(variant: Variant, arch: str, instructions: float | None) -> float | None:
    """Return the instructions of an element over those that the GPU can issue while memory moves its bytes.

    It issues 9.6 (A100) or 10.0 (H100) for each byte, and so about 40 for a bfloat16 element that is read and written.
    Above 1 the schedulers are the bound. None where GPUS has nothing for `arch`.
    """
    if arch not in GPUS or instructions is None:
        return None
    gpu = GPUS[arch]
    bytes_moved = DTYPES[variant.dtype].itemsize * (2 if variant.activation else 1)
    return instructions / (bytes_moved / gpu.bandwidth * gpu.multiprocessors * gpu.clock * ISSUED_PER_CYCLE)


def examine(variant: Variant, arch: str) -> Findings:
    """Compile and inspect."""
    try:
        return inspect(compile_variant(variant, arch), variant)
    except Exception as error:
        raise RuntimeError(f"{variant}: does not compile for {arch}") from error


def examine_all(work: Sequence[tuple[Variant, str]]) -> Iterator[Findings]:
    """Examine on every core, in processes of their own; what they find comes in the order of `work`."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        yield from pool.map(examine, *zip(*work, strict=True))


COLUMNS = "{:16} {:4} {:10} {:8} {:>4} {:>5} {:>4} {:>6} {:>3} {:>5} {:>5}"
HEADINGS = "line type activation with regs local smem in out instr issue"


def table_row(variant: Variant, arch: str, findings: Findings) -> str:
    """Return a row of the table of an architecture."""
    share = issue_share(variant, arch, findings.instructions)
    cells = (
        *(variant.line, variant.dtype, variant.activation, variant.note),
        *(findings.registers, findings.local_bytes, findings.shared_bytes),
        *("+".join(map(str, widths)) for widths in (findings.loads, findings.stores)),
        f"{findings.instructions:.1f}" if findings.instructions else None,
        f"{share:.0%}{'!' if share > ISSUE_LIMIT else ' '}" if share else None,
    )
    return COLUMNS.format(*("-" if cell in (None, "") else cell for cell in cells)).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        "python -m fastentropy_kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all by default")
    architectures = parser.parse_args(arguments).arch
    if unknown := [arch for arch in architectures if arch not in TARGETS]:
        return _refuse(f"--arch: got {unknown[0]!r}, expected one of {', '.join(TARGETS)}")
    if states_triton.INTERPRETED:
        return _refuse("TRITON_INTERPRET: set, expected a compiler; run again with env -u TRITON_INTERPRET")
    return _report([(variant, arch) for arch, variant in product(architectures, variants())])


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


def _report(work: Sequence[tuple[Variant, str]]) -> int:
    slow, spilled, shown = [], [], None
    for number, ((variant, arch), findings) in enumerate(zip(work, examine_all(work), strict=True), 1):
        _progress("")
        if arch != shown:
            print(f"{arch}\n{COLUMNS.format(*HEADINGS.split())}")
            shown = arch
        print(table_row(variant, arch, findings), flush=True)
        _progress(f"{number} of {len(work)} compiled")
        share = issue_share(variant, arch, findings.instructions)
        if share and share > ISSUE_LIMIT:
            slow.append(f"{variant} {arch} {share:.0%}")
        if findings.spilled:
            spilled.append(f"{variant} {arch}")
    _progress("")
    for title, names in (("above half of the issue rate", slow), ("spills or local memory", spilled)):
        print(f"\n{title}: {len(names)} of {len(work)}", *names, sep="\n  ")
    return 1 if spilled else 0


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
