"""Compile kernels for a GPU that need not be present, and read the compiler's output.

Inside of `compiling_for`, a launch compiles its kernel and does not start it. The inspected code is therefore the code that a
launch would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from fastentropy_kernels import activations_triton
from fastentropy_kernels._compat import triton_driver
from fastentropy_kernels.chains import conv_triton, linear_triton
from fastentropy_kernels.states import kernels_triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS = (
    kernels_triton.states_rows_kernel,
    kernels_triton.states_planes_kernel,
    conv_triton.conv_pointwise_kernel,
    conv_triton.conv_bordered_kernel,
    linear_triton.linear_pair_kernel,
)


NO_COMPILER = "TRITON_INTERPRET: set, expected a compiler; run again with env -u TRITON_INTERPRET"


class Findings(NamedTuple):
    """Facts read from the compiled code of a kernel.

    Attributes:
        registers: registers of a thread.
        spills: number of instructions that access local memory; on AMD, number of spilled registers.
        local_bytes: bytes of local memory of a thread, including its stack.
        shared_bytes: bytes of shared memory of a program.
        loads: every width in bytes of a load from global memory, widest first. Copies to shared memory are included.
        stores: every width in bytes of a store to global memory, widest first.
        instructions: instructions of the main loop per element. None on AMD, and for kernels that do more than read, activate,
            count and write.
    """

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]
    instructions: float | None

    @property
    def spilled(self) -> bool:
        """Return whether the registers were too few, so that the kernel uses local memory."""
        return self.spills > 0 or self.local_bytes > 0


@contextmanager
def compiling_for(arch: str) -> Iterator[list[CompiledKernel]]:
    """Return a context in which a launch of a kernel compiles it for `arch` and does not start it.

    Args:
        arch: a key of `TARGETS`, such as "sm_90".

    Yields:
        A list, to which each launch appends its compiled kernel.

    Raises:
        RuntimeError: the kernels run in Triton's interpreter, so there is no compiler.
    """
    if activations_triton.INTERPRETED:
        raise RuntimeError(NO_COMPILER)
    compiled: list[CompiledKernel] = []

    def compile_only(run: Any) -> Any:
        return lambda *arguments, warmup, **options: compiled.append(run(*arguments, warmup=True, **options))

    for kernel in KERNELS:
        kernel.run = compile_only(kernel.run)
    try:
        with triton_driver(_AbsentDriver(arch)):
            yield compiled
    finally:
        for kernel in KERNELS:
            del kernel.run


class _AbsentDriver(NamedTuple):
    """A replacement for the driver of a GPU, with the functions that Triton's compiler calls.

    Triton caches compiled kernels by device. The name of the architecture therefore serves as the device.

    Attributes:
        arch: a key of `TARGETS`.
    """

    arch: str

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]


def inspect(compiled: CompiledKernel, streamed: int | None = None) -> Findings:
    """Read registers, memory and accesses from a compiled kernel.

    Args:
        compiled: the compiled kernel.
        streamed: for a kernel that reads and writes each element once in a loop, the bytes of an element. Accesses and
            instructions are then those of the main loop. None for other kernels, of which all code is read.

    Returns:
        The findings.
    """
    return _inspect_amd(compiled) if "amdgcn" in compiled.asm else _inspect_nvidia(compiled, streamed)


def _inspect_nvidia(compiled: CompiledKernel, streamed: int | None) -> Findings:
    """Inspect a kernel for an NVIDIA GPU. The arguments are those of `inspect`."""
    sass = disassemble(compiled)
    code = main_loop(sass) if streamed else sass.splitlines()
    loads, stores = accesses(code, "LDG"), accesses(code, "STG")
    return Findings(
        registers=_number(r"REG:(\d+)", sass),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        local_bytes=_number(r"STACK:(\d+)", sass) + _number(r"LOCAL:(\d+)", sass),
        shared_bytes=compiled.metadata.shared,
        loads=_widths(loads),
        stores=_widths(stores),
        # Stores write y, so the bytes that are stored give the number of elements. If there are no stores, the loads do: they
        # read only x, because no configuration that only counts has a mask.
        instructions=len(code) / (sum(stores or loads) // streamed) if streamed else None,
    )


def disassemble(compiled: CompiledKernel) -> str:
    """Return the machine code and the resource usage of a kernel as text.

    Args:
        compiled: a kernel for an NVIDIA GPU.

    Returns:
        The output of the `cuobjdump` that comes with Triton.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main_loop(sass: str) -> list[str]:
    """Return the instructions of the loop that loads the most bytes.

    A loop extends from the target of a backward branch to the branch. The compiler may remove a loop that runs only once.

    Args:
        sass: the output of `disassemble`.

    Returns:
        The instructions, one a string. They are all those of the kernel if it has no loop.
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
    """Return how many bytes each access to global memory moves.

    Args:
        code: instructions in NVIDIA's assembly language SASS.
        opcode: "LDG" for loads (LDGSTS, a copy to shared memory, included) or "STG" for stores.

    Returns:
        The bytes of each access: 16 for LDG.E.128, LDGSTS.E.128 and STG.E.128, 4 for a plain LDG.E, 2 for LDG.E.U16.
    """
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    found = filter(None, (re.search(rf"\b{opcode}(?!DEPBAR)([.\w]*)", instruction) for instruction in code))
    return [next((widths[suffix] for suffix in match[1].split(".") if suffix in widths), 4) for match in found]


def _inspect_amd(compiled: CompiledKernel) -> Findings:
    """Inspect a kernel for an AMD GPU."""
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
    """Return the number that the first group of `pattern` matches in `text`. The pattern must match."""
    match = re.search(pattern, text)
    assert match, f"no {pattern} in the output of the compiler"
    return int(match[1])


def _widths(sizes: Iterable[int]) -> tuple[int, ...]:
    """Return the distinct sizes, largest first."""
    return tuple(sorted(set(sizes), reverse=True))
