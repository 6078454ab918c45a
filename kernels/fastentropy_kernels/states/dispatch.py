"""Choose the implementation that counts states, and run it.

The Triton and Numba kernels get the tensor as rows or planes (see `layout`). The reference gets it as it is.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fastentropy_kernels.activations import activate, checked_parameters, no_autocast
from fastentropy_kernels.dispatch import increment_versions, unavailable_reason
from fastentropy_kernels.layout import arrange
from fastentropy_kernels.states import reference
from fastentropy_kernels.states.validation import Request


def is_fused(activation: str, x: Tensor) -> bool:
    """Return whether `activation_states(x, counts, activation)` activates and counts in one pass.

    The answer is cached for each activation, type of device and dtype.

    Args:
        activation: the name of an activation, as for `activation_states`.
        x: a tensor with the dtype and device in question. Its values are not read.

    Returns:
        True for one pass. False if the states are counted in a separate pass.

    Raises:
        ValueError: the activation is unknown.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import is_fused
        >>> is_fused("relu", torch.empty(4)), is_fused("gelu", torch.empty(4))  # on a CPU
        (True, False)
    """
    return _is_fused(activation, x.device.type, x.dtype)


def count(x: Tensor, counts: Tensor, nan: Tensor | None, request: Request) -> None:
    """Count the states of `x`, and add the counts to `counts` and the numbers of NaN to `nan`.

    Args:
        x: a tensor of any strides.
        counts: int64 `[neurons, states]`, contiguous.
        nan: int64 `[neurons]`, contiguous. None if NaN values are not counted.
        request: the other arguments, checked.
    """
    impl = _implementation(request.impl, x.device.type, x.dtype)
    if x.numel() == 0:
        return
    if impl == "reference":
        reference.add_states(x, counts, request.channel_axis, edges=request.edges, mask=request.mask, nan=nan)
        return
    arranged = arrange(x.resolve_neg() if x.is_neg() else x, request.channel_axis, request.mask)
    state_kernels(impl).add_states(arranged.values, counts, edges=request.edges, mask=arranged.mask, nan=nan)
    increment_versions(counts, nan)


def activate_and_count(x: Tensor, counts: Tensor, nan: Tensor | None, request: Request, inplace: bool) -> Tensor:
    """Return the activation of `x`, times the gate if there is one, and count the states of `x`.

    Args:
        x: a tensor of any strides.
        counts: int64 `[neurons, states]`, contiguous. The counts are added to it.
        nan: int64 `[neurons]`, contiguous. None if NaN values are not counted.
        request: the other arguments, checked.
        inplace: whether the activation is written over `x`, which is then returned.
    """
    impl = _implementation(request.impl, x.device.type, x.dtype)
    if x.numel() == 0:
        return x if inplace else torch.empty_like(x)
    kernels = None if impl == "reference" else state_kernels(impl)
    if request.gate is not None and (kernels is None or not kernels.multiplies(x.dtype, request.edges)):
        return activate_and_count(x, counts, nan, request._replace(gate=None), False).mul_(request.gate)
    if kernels is None or not (request.gate is not None or kernels.fuses(request.activation, request.edges)):
        count(x, counts, nan, request)
        y = _activation(x, request)
        return x.copy_(y) if inplace else y
    if x.is_neg():
        y = activate_and_count(x.resolve_neg(), counts, nan, request, inplace=request.gate is None)
        return x.copy_(y) if inplace else y
    is_activated = not kernels.fuses(request.activation, request.edges)
    y = x if inplace else _activation(x, request) if is_activated else torch.empty_like(x)
    _launch(kernels, x, y, counts, nan, request, is_activated)
    increment_versions(counts, nan, x if inplace else None)
    return y


def _activation(x: Tensor, request: Request) -> Tensor:
    """Return the activation of `x`, computed by PyTorch, as a new tensor with the strides of `torch.empty_like(x)`.

    Tracers expect these strides. Other ones, which are rare, cost a copy.
    """
    with no_autocast(x.device.type):
        y = activate(x, request.activation, request.parameters, request.weight, request.channel_axis)
    strides = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == strides else torch.empty_like(x).copy_(y)


def _launch(
    kernels: ModuleType, x: Tensor, y: Tensor, counts: Tensor, nan: Tensor | None, request: Request, is_activated: bool
) -> None:
    """Launch the kernel that counts the states of `x` and writes `y`.

    Args:
        kernels: the module that launches the kernels.
        x: a tensor of any strides, not empty, whose values are stored as they are (not negated).
        y: receives the activation, or its product with the gate. It has the shape of `x`, or is `x` itself.
        counts: int64 `[neurons, states]`, contiguous.
        nan: int64 `[neurons]`, contiguous, or None.
        request: the other arguments, checked.
        is_activated: whether `y` holds the activation already, so that it is only multiplied by the gate.
    """
    arranged = arrange(x, request.channel_axis, request.mask)
    written = target = arranged.view(y)
    if written is None:
        written = arranged.arrange(y) if is_activated else torch.empty_like(arranged.values)
    kernels.add_states(
        arranged.values,
        counts,
        edges=request.edges,
        mask=arranged.mask,
        nan=nan,
        y=written,
        activation=None if is_activated else request.activation,
        parameters=request.parameters,
        weight=None if request.weight is None else request.weight.resolve_neg(),
        gate=None if request.gate is None else arranged.arrange(request.gate.resolve_neg()),
    )
    if target is None:
        in_order = y.permute(arranged.order)
        in_order.copy_(written.view(in_order.shape))


@cache
def state_kernels(impl: str) -> ModuleType:
    """Return the module that launches the state kernels of "triton" or "numba".

    The module is imported on the first call, so a program that uses only one of the two compilers does not load the other.
    """
    if impl == "triton":
        from fastentropy_kernels.states import launch_triton

        return launch_triton
    from fastentropy_kernels.states import launch_numba

    return launch_numba


@cache
def _is_fused(activation: str, device_type: str, dtype: torch.dtype) -> bool:
    """Return the answer of `is_fused`, for a type of device (such as "cuda") instead of a tensor."""
    checked_parameters(activation, {})
    impl = _implementation("auto", device_type, dtype)
    return impl != "reference" and bool(state_kernels(impl).fuses(activation, None))


@cache
def _implementation(impl: str, device_type: str, dtype: torch.dtype) -> str:
    """Return the implementation that runs if `impl` is requested: "triton", "numba" or "reference".

    Args:
        impl: "auto" or the name of an implementation.
        device_type: "cpu", "cuda" or another type of device.
        dtype: the dtype of `x`.

    Raises:
        TypeError: Triton or Numba is requested for float64.
        ValueError: the requested implementation does not run on this type of device.
    """
    device = torch.device(device_type)
    if impl == "auto":
        fastest = {"cpu": "numba", "cuda": "triton"}.get(device_type, "reference")
        return fastest if dtype != torch.float64 and not unavailable_reason(fastest, device) else "reference"
    if reason := unavailable_reason(impl, device):
        raise ValueError(f"impl: {impl!r} {reason}")
    if dtype == torch.float64 and impl != "reference":
        raise TypeError(f"x: got torch.float64, expected float16, bfloat16 or float32 for impl={impl!r}")
    return impl
