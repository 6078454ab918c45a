"""Activations that count, per neuron, the states of their input: on tensors only, no modules.

A state is `off` (x < 0), `zero` (x == 0) or `on` (x > 0); NaN is in none of them.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import reference
from .layout import arrange

__all__ = ["activation_states", "available_implementations", "count_states"]

_IMPLEMENTATIONS = ("triton", "numba", "reference")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def count_states(x: Tensor, counts: Tensor, *, channel_axis: int = 1, mask: Tensor | None = None, impl: str = "auto") -> None:
    """Add the states of `x`, per neuron, to `counts` in place.

    Args:
        x: float16, bfloat16, float32 or float64, any strides. What is neither rows nor planes (see `layout.arrange`)
            is copied to contiguous memory first.
        counts: int64 `[neurons, 3]`, contiguous, on the device of `x`: columns off, zero, on.
        channel_axis: the axis of `x` that runs over the neurons.
        mask: bool, the shape of `x` without the channel axis; positions where it is False are not counted.
        impl: "auto" takes Triton on CUDA, Numba on a CPU, and the reference for float64 and other devices.
            "triton", "numba" and "reference" run as named or raise.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: any other argument does not fit. In both cases `counts` is unchanged.
    """
    channel_axis = _validate(x, counts, channel_axis, mask)
    impl = _choose(impl, x)
    if x.numel() == 0:
        return
    if impl == "reference":
        reference.count_states(x, counts, channel_axis, mask)
        return
    arranged = arrange(x.detach(), channel_axis, mask)
    if impl == "triton":
        from . import states_triton

        states_triton.count_states(arranged.values, counts, arranged.mask)
    else:
        from . import states_numba

        states_numba.count_states(arranged.values, counts, arranged.mask)


def activation_states(
    x: Tensor, counts: Tensor, activation: str, *, channel_axis: int = 1, mask: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Return the activation of `x`, a new tensor, and add the states of `x` to `counts` in place.

    `activation` is a key of `reference.ACTIVATIONS`; `y` is computed at every position, also where `mask` is False.
    The other arguments and the errors are those of `count_states`.

    Triton fuses every activation with the count, Numba fuses identity and relu. Neither has a backward. So "auto"
    runs PyTorch's activation and then counts, in two passes over `x`, where `x` requires a gradient and, on a CPU,
    for the activations that Numba does not fuse.
    """
    channel_axis = _validate(x, counts, channel_axis, mask)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}")
    chosen = _choose(impl, x)
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    if impl != "auto":
        _refuse_unfused(chosen, activation, needs_grad)
    if x.numel() == 0 or chosen == "reference":
        return reference.activation_states(x, counts, activation, channel_axis, mask)
    if needs_grad or not _is_fused(chosen, activation):
        y = reference.ACTIVATIONS[activation](x)
        count_states(x, counts, channel_axis=channel_axis, mask=mask, impl=chosen)
        return y
    arranged = arrange(x, channel_axis, mask)
    if chosen == "triton":
        from . import states_triton

        y = states_triton.activation_states(arranged.values, counts, activation, arranged.mask)
    else:
        from . import states_numba

        y = states_numba.activation_states(arranged.values, counts, activation, arranged.mask)
    return arranged.restore(y)


def available_implementations(device: torch.device) -> dict[str, str]:
    """Map every implementation to "" where it runs on tensors of `device`, else to the reason why not, one line."""
    return {impl: _why_not(impl, device) for impl in _IMPLEMENTATIONS}


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


def _choose(impl: str, x: Tensor) -> str:
    if impl == "auto":
        fastest = {"cpu": "numba", "cuda": "triton"}.get(x.device.type, "reference")
        return fastest if x.dtype != torch.float64 and not _why_not(fastest, x.device) else "reference"
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected auto, {', '.join(_IMPLEMENTATIONS)}")
    reason = _why_not(impl, x.device)
    if reason:
        raise ValueError(f"impl: {impl!r} {reason}")
    if x.dtype == torch.float64 and impl != "reference":
        raise TypeError(f"x: got torch.float64, expected float16, bfloat16 or float32 for impl={impl!r}")
    return impl


def _validate(x: Tensor, counts: Tensor, channel_axis: int, mask: Tensor | None) -> int:
    """Raise where an argument does not fit; return the channel axis, not negative."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(f"channel_axis: got {channel_axis}, expected an axis of x, which has {x.ndim} axes")
    channel_axis %= x.ndim
    neurons = x.shape[channel_axis]
    if counts.dtype != torch.int64:
        raise TypeError(f"counts: got {counts.dtype}, expected torch.int64")
    if counts.shape != (neurons, 3):
        raise ValueError(f"counts: got shape {list(counts.shape)}, expected [{neurons}, 3], for axis {channel_axis} of x")
    if not counts.is_contiguous():
        raise ValueError(f"counts: got strides {list(counts.stride())}, expected contiguous memory")
    if counts.device != x.device:
        raise ValueError(f"counts: got a tensor on {counts.device}, expected {x.device}, the device of x")
    if mask is not None:
        _validate_mask(mask, [*x.shape[:channel_axis], *x.shape[channel_axis + 1 :]], x.device)
    return channel_axis


def _validate_mask(mask: Tensor, shape: list[int], device: torch.device) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected torch.bool")
    if list(mask.shape) != shape:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected {shape}, that of x without its channel axis")
    if mask.device != device:
        raise ValueError(f"mask: got a tensor on {mask.device}, expected {device}, the device of x")


def _is_fused(impl: str, activation: str) -> bool:
    if impl == "triton":
        return True
    from . import states_numba

    return activation in states_numba.FUSED_ACTIVATIONS


def _refuse_unfused(impl: str, activation: str, needs_grad: bool) -> None:
    """Raise where an implementation chosen by name would have to be swapped for another."""
    if impl == "reference":
        return
    if not _is_fused(impl, activation):
        from . import states_numba

        supported = ", ".join(states_numba.FUSED_ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected {supported} for impl='numba' (or use impl='auto')")
    if needs_grad:
        raise ValueError(f"x: requires a gradient, expected none for impl={impl!r} (use impl='auto' or torch.no_grad())")
