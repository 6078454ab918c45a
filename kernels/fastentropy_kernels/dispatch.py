"""Find out which implementations run on a device, and whether a kernel may be launched directly.

An implementation is "triton" (GPU), "numba" (CPU) or "reference" (plain PyTorch). A direct launch bypasses the registered
operator of `torch.library`, which costs several microseconds a call.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fastentropy_kernels._compat import is_plain_eager

IMPLEMENTATIONS = ("triton", "numba", "reference")


def available_implementations(device: torch.device) -> dict[str, str]:
    """Return, for each implementation, the reason why it does not run on `device`.

    Args:
        device: the device of the tensors.

    Returns:
        A dictionary with the keys "triton", "numba" and "reference". A value is "" if the implementation runs on `device`;
        otherwise it is the reason in one line.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import available_implementations
        >>> available_implementations(torch.device("meta"))["numba"]
        'runs on CPU tensors, not on meta'
    """
    return {impl: unavailable_reason(impl, device) for impl in IMPLEMENTATIONS}


def unavailable_reason(impl: str, device: torch.device) -> str:
    """Return in one line why an implementation does not run on tensors of a device.

    Args:
        impl: one of `IMPLEMENTATIONS`.
        device: the device of the tensors.

    Returns:
        The reason, or "" if the implementation runs on `device`.
    """
    if impl == "reference":
        return ""
    if not _is_installed(impl):
        return f"{impl} is not installed"
    if impl == "numba":
        return "" if device.type == "cpu" else f"runs on CPU tensors, not on {device.type}"
    if device.type == "cuda":
        return "" if torch.cuda.is_available() else "PyTorch sees no GPU"
    from fastentropy_kernels import activations_triton

    if device.type == "cpu" and activations_triton.INTERPRETED:
        return ""
    return f"runs on CUDA tensors, not on {device.type} (a CPU needs TRITON_INTERPRET=1 set before the import)"


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def launches_directly(x: Tensor) -> bool:
    """Return whether a kernel may be launched directly on the memory of `x`, without a registered operator.

    It may not for subclasses of Tensor, under torch.compile, or while a tracer, mode or transform is active: these would not
    see the kernel.
    """
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling() and is_plain_eager(x)


def increment_versions(*written: Tensor | None) -> None:
    """Increment the version counter of each tensor that a kernel wrote to; None is skipped.

    Autograd compares these counters. If a backward pass needs a value that has been overwritten, it then raises.
    """
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
