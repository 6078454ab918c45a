"""Check all arguments of the public functions that count states, before anything is written.

The message of an error is one line. It names the argument, the value that was given and the value that was expected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastentropy_kernels.activations import checked_parameters, linear_regions
from fastentropy_kernels.dispatch import IMPLEMENTATIONS

States = Literal["sign", "regions"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_EDGES = 15


class Request(NamedTuple):
    """The checked arguments of a call of `count_states` or `activation_states`.

    Attributes:
        activation: a key of `activations.ACTIVATIONS`; "identity" for `count_states`.
        parameters: the parameters of the activation, in the order of the table.
        weight: the slopes of prelu, `[neurons]` or `[1]`. None for other activations.
        channel_axis: the axis of the neurons, not negative.
        mask: bool, with the shape of `x` without the channel axis. None to count all positions.
        edges: the edges of the histogram. None to count off, zero and on.
        impl: "auto", "triton", "numba" or "reference".
        gate: what the activation is multiplied by, with the shape, dtype and device of `x`. None not to multiply.
    """

    activation: str
    parameters: tuple[float, ...]
    weight: Tensor | None
    channel_axis: int
    mask: Tensor | None
    edges: tuple[float, ...] | None
    impl: str
    gate: Tensor | None = None


def count_request(
    x: Tensor,
    counts: Tensor,
    nan: Tensor | None,
    channel_axis: int,
    mask: Tensor | None,
    edges: Sequence[float] | None,
    impl: str,
) -> Request:
    """Check the arguments of `count_states` and return them as a request.

    The arguments are those of `count_states`. If one does not fit, TypeError or ValueError is raised.
    """
    _check_implementation(impl)
    channel_axis = _checked_axis(x, channel_axis)
    checked_edges = None if edges is None else _checked_edges(edges)
    _check_counters(x, counts, nan, channel_axis, 3 if checked_edges is None else len(checked_edges) + 1)
    _check_mask(x, mask, channel_axis)
    return Request("identity", (), None, channel_axis, mask, checked_edges, impl)


def activation_request(
    x: Tensor,
    counts: Tensor,
    activation: str,
    nan: Tensor | None,
    channel_axis: int,
    mask: Tensor | None,
    states: States,
    edges: Sequence[float] | None,
    weight: Tensor | None,
    parameters: Mapping[str, float],
    inplace: bool,
    impl: str,
    gate: Tensor | None,
) -> Request:
    """Check the arguments of `activation_states` and return them as a request.

    The arguments are those of `activation_states`, with its keyword arguments in the dictionary `parameters`. For
    `states="regions"`, the linear regions become the edges of the request. If an argument does not fit, TypeError or
    ValueError is raised.
    """
    values = checked_parameters(activation, parameters)
    if states not in ("sign", "regions"):
        raise ValueError(f"states: got {states!r}, expected 'sign' or 'regions'")
    if states == "regions":
        if edges is not None:
            raise ValueError("edges: got edges with states='regions', expected one of the two")
        edges = linear_regions(activation, **parameters)
    request = count_request(x, counts, nan, channel_axis, mask, edges, impl)
    _check_weight(x, activation, weight, request.channel_axis)
    if inplace:
        _check_inplace(x, weight)
    if gate is not None:
        _check_gate(x, gate, inplace)
    return request._replace(activation=activation, parameters=values, weight=weight, gate=gate)


def _check_implementation(impl: str) -> None:
    if impl not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"impl: got {impl!r}, expected auto, {', '.join(IMPLEMENTATIONS)}")


def _checked_axis(x: Tensor, channel_axis: int) -> int:
    """Check that `channel_axis` is an axis of `x`, and return it as a number that is not negative."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(f"channel_axis: got {channel_axis}, expected an axis of x, which has {x.ndim} axes")
    return channel_axis % x.ndim


def _checked_edges(edges: Sequence[float]) -> tuple[float, ...]:
    """Check that there are 1 to MAX_EDGES edges in rising order, none of them NaN, and return them as floats."""
    try:
        values = tuple(float(edge) for edge in edges)
    except (TypeError, ValueError):
        raise TypeError(f"edges: got {edges!r}, expected 1 to {MAX_EDGES} numbers") from None
    if not 1 <= len(values) <= MAX_EDGES:
        raise ValueError(f"edges: got {len(values)} of them, expected 1 to {MAX_EDGES}")
    if any(edge != edge for edge in values) or list(values) != sorted(set(values)):
        raise ValueError(f"edges: got {list(values)}, expected numbers in rising order, each once")
    return values


def _check_counters(x: Tensor, counts: Tensor, nan: Tensor | None, channel_axis: int, states: int) -> None:
    """Check dtype, shape, strides and device of `counts` `[neurons, states]` and, if given, of `nan` `[neurons]`."""
    neurons = x.shape[channel_axis]
    where = f"for axis {channel_axis} of x"
    _check_counter("counts", counts, x)
    if counts.shape != (neurons, states):
        raise ValueError(f"counts: got shape {list(counts.shape)}, expected [{neurons}, {states}], {where}")
    if nan is not None:
        _check_counter("nan", nan, x)
        if nan.shape != (neurons,):
            raise ValueError(f"nan: got shape {list(nan.shape)}, expected [{neurons}], {where}")


def _check_counter(name: str, counter: Tensor, x: Tensor) -> None:
    """Check dtype, strides and device of `counter`, the argument called `name`."""
    if counter.dtype != torch.int64:
        raise TypeError(f"{name}: got {counter.dtype}, expected torch.int64")
    if not counter.is_contiguous():
        raise ValueError(f"{name}: got strides {list(counter.stride())}, expected contiguous memory")
    if counter.device != x.device:
        raise ValueError(f"{name}: got a tensor on {counter.device}, expected {x.device}, the device of x")


def _check_mask(x: Tensor, mask: Tensor | None, channel_axis: int) -> None:
    """Check that `mask` is None, or a bool tensor with the shape of `x` without its channel axis, on the device of `x`."""
    if mask is None:
        return
    shape = [*x.shape[:channel_axis], *x.shape[channel_axis + 1 :]]
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {mask.dtype}, expected torch.bool")
    if list(mask.shape) != shape:
        raise ValueError(f"mask: got shape {list(mask.shape)}, expected {shape}, that of x without its channel axis")
    if mask.device != x.device:
        raise ValueError(f"mask: got a tensor on {mask.device}, expected {x.device}, the device of x")


def _check_weight(x: Tensor, activation: str, weight: Tensor | None, channel_axis: int) -> None:
    """Check that prelu has 1 or `neurons` slopes with the dtype and device of `x`, and other activations none."""
    if activation != "prelu":
        if weight is not None:
            raise TypeError(f"weight: not a parameter of {activation}, only of prelu")
        return
    neurons = x.shape[channel_axis]
    if weight is None:
        raise TypeError(f"weight: got None, expected a tensor of 1 or {neurons} slopes for prelu")
    if weight.ndim != 1 or weight.numel() not in (1, neurons):
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [1] or [{neurons}]")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight: got {weight.dtype} on {weight.device}, expected {x.dtype} on {x.device}, as x")


def _check_gate(x: Tensor, gate: Tensor, inplace: bool) -> None:
    """Check that `gate` has the shape, dtype and device of `x`, and that the result is not written over `x`."""
    if inplace:
        raise ValueError("inplace: got True with a gate, expected False: the product is a new tensor")
    if gate.dtype != x.dtype:
        raise TypeError(f"gate: got {gate.dtype}, expected {x.dtype}, the dtype of x; use gate.to(x.dtype)")
    if gate.shape != x.shape:
        raise ValueError(f"gate: got shape {list(gate.shape)}, expected {list(x.shape)}, that of x; use gate.expand_as(x)")
    if gate.device != x.device:
        raise ValueError(f"gate: got a tensor on {gate.device}, expected {x.device}, the device of x")


def _check_inplace(x: Tensor, weight: Tensor | None) -> None:
    """Check that no gradient is required, and that no two elements of `x` share memory."""
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        raise ValueError("inplace: got True with a gradient required, expected False (or use torch.no_grad())")
    if x.is_contiguous():
        return
    span = 1
    axes = sorted(zip(x.stride(), x.shape, strict=True)) if x.numel() > 1 else []
    for stride, size in axes:
        if size == 1:
            continue
        if stride < span:
            raise ValueError(f"inplace: got True for x with strides {list(x.stride())}, whose values overlap; use x.clone()")
        span = stride * (size - 1) + span
