"""Which implementation runs on which tensor, and running it."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from . import reference
from .arguments import IMPLEMENTATIONS, Request, checked_parameters
from .layout import arrange


def available_implementations(device: torch.device) -> dict[str, str]:
    """Map every implementation to "" where it runs on tensors of `device`, else to the reason why not, one line."""
    return {impl: _why_not(impl, device) for impl in IMPLEMENTATIONS}


def is_fused(activation: str, x: Tensor) -> bool:
    """Whether `activation_states(x, counts, activation)` does both in one pass; where not, it counts in a pass of its own.

    The answer is remembered for each activation, type of device and dtype. Raises ValueError for an unknown activation.
    """
    return _is_fused(activation, x.device.type, x.dtype)


def count(x: Tensor, counts: Tensor, nan: Tensor | None, request: Request) -> None:
    """Add the states of `x` to `counts` and its NaN to `nan`."""
    impl = _choose(request.impl, x)
    if x.numel() == 0:
        return
    if impl == "reference":
        reference.add_states(x, counts, request.channel_axis, edges=request.edges, mask=request.mask, nan=nan)
        return
    arranged = arrange(x.resolve_neg() if x.is_neg() else x, request.channel_axis, request.mask)
    _kernels(impl).add_states(arranged.values, counts, edges=request.edges, mask=arranged.mask, nan=nan)
    tell_autograd(counts, nan)


def activate_and_count(x: Tensor, counts: Tensor, nan: Tensor | None, request: Request, inplace: bool) -> Tensor:
    """Return the activation of `x`, which is `x` itself where `inplace`, and count as `count` does."""
    impl = _choose(request.impl, x)
    if x.numel() == 0:
        return x if inplace else torch.empty_like(x)
    if impl == "reference" or not _kernels(impl).fuses(request.activation, request.edges):
        count(x, counts, nan, request)
        with reference.no_autocast(x.device.type):
            y = reference.activate(x, request.activation, request.parameters, request.weight, request.channel_axis)
        return x.copy_(y) if inplace else _laid_out_as(x, y)
    if x.is_neg():
        y = activate_and_count(x.resolve_neg(), counts, nan, request, inplace=True)
        return x.copy_(y) if inplace else y
    arranged = arrange(x, request.channel_axis, request.mask)
    y = x if inplace else torch.empty_like(x)
    target = arranged.view(y)
    written = torch.empty_like(arranged.values) if target is None else target
    _kernels(impl).add_states(
        arranged.values,
        counts,
        edges=request.edges,
        mask=arranged.mask,
        nan=nan,
        y=written,
        activation=request.activation,
        parameters=request.parameters,
        weight=None if request.weight is None else request.weight.resolve_neg(),
    )
    if target is None:
        in_order = y.permute(arranged.order)
        in_order.copy_(written.view(in_order.shape))
    tell_autograd(counts, nan, x if inplace else None)
    return y


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the strides of `torch.empty_like(x)`, which is what tracers are told; it nearly always has them."""
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x).copy_(y)


def launches_directly(x: Tensor) -> bool:
    """Whether `x` is plain memory and nobody looks on: tracers, modes and forward derivatives get the operators."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and not is_functorch_wrapped_tensor(x)
    )


def tell_autograd(*written: Tensor | None) -> None:
    """Count up the version of what a kernel wrote to, so that a backward that needs the old values says so."""
    if not torch.is_inference_mode_enabled():
        torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])


@cache
def chain_kernels(impl: str, device_type: str) -> ModuleType:
    """Return the module whose functions run fused chains: for "auto" Triton on CUDA, the reference elsewhere."""
    device = torch.device(device_type)
    if impl == "auto":
        impl = "triton" if device_type == "cuda" and not _why_not("triton", device) else "reference"
    if reason := _why_not(impl, device):
        raise ValueError(f"impl: {impl!r} {reason}")
    if impl == "triton":
        from . import chain_triton

        return chain_triton
    from . import chain_reference

    return chain_reference


@cache
def _kernels(impl: str) -> ModuleType:
    """Import an implementation on its first use: a compiler is loaded by those who need it."""
    if impl == "triton":
        from . import states_triton

        return states_triton
    from . import states_numba

    return states_numba


def _choose(impl: str, x: Tensor) -> str:
    return _implementation(impl, x.device.type, x.dtype)


@cache
def _is_fused(activation: str, device_type: str, dtype: torch.dtype) -> bool:
    checked_parameters(activation, {})
    impl = _implementation("auto", device_type, dtype)
    return impl != "reference" and bool(_kernels(impl).fuses(activation, None))


@cache
def _implementation(impl: str, device_type: str, dtype: torch.dtype) -> str:
    device = torch.device(device_type)
    if impl == "auto":
        fastest = {"cpu": "numba", "cuda": "triton"}.get(device_type, "reference")
        return fastest if dtype != torch.float64 and not _why_not(fastest, device) else "reference"
    reason = _why_not(impl, device)
    if reason:
        raise ValueError(f"impl: {impl!r} {reason}")
    if dtype == torch.float64 and impl != "reference":
        raise TypeError(f"x: got torch.float64, expected float16, bfloat16 or float32 for impl={impl!r}")
    return impl


def _why_not(impl: str, device: torch.device) -> str:
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
    from . import states_triton

    if device.type == "cpu" and states_triton.INTERPRETED:
        return ""
    return f"runs on CUDA tensors, not on {device.type} (a CPU needs TRITON_INTERPRET=1 set before the import)"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
