"""Choose the implementation that runs a fused chain."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from fastentropy_kernels.dispatch import unavailable_reason


@cache
def chain_kernels(impl: str, device_type: str) -> ModuleType:
    """Return the module with the fused chains of an implementation.

    Args:
        impl: "triton", "reference", or "auto" for Triton on CUDA and the reference elsewhere.
        device_type: the type of the tensors' device, such as "cuda".

    Raises:
        ValueError: the implementation does not run on this type of device.
    """
    device = torch.device(device_type)
    if impl == "auto":
        impl = "triton" if device_type == "cuda" and not unavailable_reason("triton", device) else "reference"
    if reason := unavailable_reason(impl, device):
        raise ValueError(f"impl: {impl!r} {reason}")
    if impl == "triton":
        from fastentropy_kernels.chains import launch_triton

        return launch_triton
    from fastentropy_kernels.chains import reference

    return reference
