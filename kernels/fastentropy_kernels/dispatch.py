"""Which implementation runs on which tensor, and running it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fastentropy_kernels._compat import is_plain_eager

IMPLEMENTATIONS = ("triton", "numba", "reference")


def available_implementations(device: torch.device) -> dict[str, str]:
    """Map every implementation to "" where it runs on tensors of `device`, else to the reason why not, one line."""
    return {impl: why_not(impl, device) for impl in IMPLEMENTATIONS}


def launches_directly(x: Tensor) -> bool:
    """Whether `x` is plain memory and nobody looks on: tracers, modes and forward derivatives get the operators."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling() and is_plain_eager(x)


def tell_autograd(*written: Tensor | None) -> None:
    """Count up the version of what a kernel wrote to, so that a backward that needs the old values says so."""
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


def why_not(impl: str, device: torch.device) -> str:
    if impl == "reference":
        return ""
    if impl == "numba":
        if not _installed("numba"):
            return "numba is not installed"
        return "" if device.type == "cpu" else f"runs on CPU tensors, not on {device.type}"
    if not _installed("triton"):
        return "triton is not installed"
    if device.type == "cuda":
        return "" if torch.cuda.is_available() else "PyTorch sees no GPU"
    from fastentropy_kernels import activations_triton

    if device.type == "cpu" and activations_triton.INTERPRETED:
        return ""
    return f"runs on CUDA tensors, not on {device.type} (a CPU needs TRITON_INTERPRET=1 set before the import)"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
