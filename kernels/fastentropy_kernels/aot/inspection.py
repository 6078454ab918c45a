"""Compile what the kernels' own launches ask for, for a GPU that is not there, and read what the compiler made of it."""

# Triton has no types.
# mypy: disable-error-code="misc"
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
from triton.runtime import driver

from fastentropy_kernels import activations_triton
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


class Findings(NamedTuple):
    """What the compiled code shows."""

    registers: int  # of a thread
    spills: int  # instructions that access local memory; on AMD registers
    local_bytes: int  # of a thread, stack included
    shared_bytes: int  # of a program
    loads: tuple[int, ...]  # bytes of an access to global memory, copies to shared included: every width, the widest first
    stores: tuple[int, ...]
    instructions: float | None  # of the main loop, per element; None on AMD and where nothing streams

    @property
    def spilled(self) -> bool:
        """Whether the registers did not suffice."""
        return self.spills > 0 or self.local_bytes > 0


@contextmanager
def compiling_for(arch: str) -> Iterator[list[CompiledKernel]]:
    """Make launches compile for `arch` and add the kernel to a list in place of starting it."""
    if activations_triton.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET: set, expected a compiler; run again with env -u TRITON_INTERPRET")
    compiled: list[CompiledKernel] = []

    def compile_only(run: Any) -> Any:
        return lambda *arguments, warmup, **options: compiled.append(run(*arguments, warmup=True, **options))

    driver.set_active(_AbsentDriver(arch))
    for kernel in KERNELS:
        kernel.run = compile_only(kernel.run)
    try:
        yield compiled
    finally:
        driver.set_active(None)  # the GPU's own is found again when it is asked for
        for kernel in KERNELS:
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


def inspect(compiled: CompiledKernel, streamed: int | None = None) -> Findings:
    """Read the compiler's output. What streams elements of `streamed` bytes is judged by its main loop, else all counts."""
    return _inspect_amd(compiled) if "amdgcn" in compiled.asm else _inspect_nvidia(compiled, streamed)


def _inspect_nvidia(compiled: CompiledKernel, streamed: int | None) -> Findings:
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
        # What is written is y. Where nothing is, what is read is x alone: no variant counts alone and has a mask.
        instructions=len(code) / (sum(stores or loads) // streamed) if streamed else None,
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
    """Return the bytes of each access: 16 for LDG.E.128, LDGSTS.E.128 and STG.E.128, 4 for a plain LDG.E, 2 for LDG.E.U16."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    found = filter(None, (re.search(rf"\b{opcode}(?!DEPBAR)([.\w]*)", instruction) for instruction in code))
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
