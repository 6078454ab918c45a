"""What a caller may ask of the fused chains: every argument checked before anything runs, one line for what does not fit.

What comes out is complete, in the order in which the operators and all implementations take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.layout import convolved_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IMPLEMENTATIONS = ("auto", "triton", "reference")
MOST_MIDDLES = 128
"""How wide the values between two linear layers may be: a program keeps whole rows of them in registers."""

MOST_PIXELS = 2**31 - 2**10
"""How large an image may be: the kernels count pixels in 32 bits."""


class ConvPointwise(NamedTuple):
    """The arguments of `conv_pointwise`; pointwise_weight is [out, mid]."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    pointwise_weight: Tensor
    pointwise_bias: Tensor | None
    residual: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str


class ConvBordered(NamedTuple):
    """The arguments of `conv_bordered`, without counts."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    tap_bias: Tensor | None
    residual: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    activation: str


class LinearPair(NamedTuple):
    """The arguments of `linear_pair`."""

    x: Tensor
    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None
    residual: Tensor | None
    activation: str


def checked_conv_pointwise(request: ConvPointwise, impl: str) -> ConvPointwise:
    """Check the arguments of `conv_pointwise`."""
    x, weight, bias, pointwise_weight, pointwise_bias, residual, *_ = request
    tensors = {
        "weight": weight,
        "bias": bias,
        "pointwise_weight": pointwise_weight,
        "pointwise_bias": pointwise_bias,
        "residual": residual,
    }
    _check_common(x, tensors, request.activation, impl)
    size = _checked_convolution(request)
    middles = weight.shape[0]
    if pointwise_weight.ndim == 4 and pointwise_weight.shape[2:] == (1, 1):
        pointwise_weight = pointwise_weight.flatten(1)
    if pointwise_weight.ndim != 2 or pointwise_weight.shape[1] != middles or pointwise_weight.shape[0] == 0:
        raise ValueError(
            f"pointwise_weight: got shape {list(pointwise_weight.shape)}, expected [out, {middles}] or [out, {middles}, 1, 1]"
        )
    outputs = pointwise_weight.shape[0]
    _check_shape("bias", bias, (middles,))
    _check_shape("pointwise_bias", pointwise_bias, (outputs,))
    _check_shape("residual", residual, (x.shape[0], outputs, *size))
    return request._replace(pointwise_weight=pointwise_weight)


def checked_conv_bordered(request: ConvBordered, counts: Tensor | None, impl: str) -> ConvBordered:
    """Check the arguments of `conv_bordered`."""
    x, weight, bias, tap_bias, residual, *_ = request
    tensors = {"weight": weight, "bias": bias, "tap_bias": tap_bias, "residual": residual}
    _check_common(x, tensors, request.activation, impl)
    size = _checked_convolution(request)
    outputs = weight.shape[0]
    _check_shape("bias", bias, (outputs,))
    _check_shape("tap_bias", tap_bias, (outputs, *weight.shape[2:]))
    _check_shape("residual", residual, (x.shape[0], outputs, *size))
    if counts is not None:
        if counts.dtype != torch.int64 or counts.device != x.device:
            raise TypeError(f"counts: got {counts.dtype} on {counts.device}, expected torch.int64 on {x.device}")
        _check_shape("counts", counts, (outputs, 3))
        if not counts.is_contiguous():
            raise ValueError(f"counts: got strides {list(counts.stride())}, expected contiguous memory")
    return request


def checked_linear_pair(request: LinearPair, impl: str) -> LinearPair:
    """Check the arguments of `linear_pair`."""
    x, weight1, bias1, weight2, bias2, residual, activation = request
    tensors = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "residual": residual}
    _check_common(x, tensors, activation, impl)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., in]")
    if weight1.ndim != 2 or weight1.shape[1] != x.shape[-1] or weight1.shape[0] == 0:
        raise ValueError(f"weight1: got shape {list(weight1.shape)}, expected [mid, {x.shape[-1]}], as in torch.nn.Linear")
    middles = weight1.shape[0]
    if middles > MOST_MIDDLES:
        raise ValueError(f"weight1: got {middles} rows, expected at most {MOST_MIDDLES} (or use two calls of F.linear)")
    if weight2.ndim != 2 or weight2.shape[1] != middles or weight2.shape[0] == 0:
        raise ValueError(f"weight2: got shape {list(weight2.shape)}, expected [out, {middles}], as in torch.nn.Linear")
    _check_shape("bias1", bias1, (middles,))
    _check_shape("bias2", bias2, (weight2.shape[0],))
    _check_shape("residual", residual, (*x.shape[:-1], weight2.shape[0]))
    return request


def _check_common(x: Tensor, tensors: dict[str, Tensor | None], activation: str, impl: str) -> None:
    """Check what all have in common: dtype, device, no gradient, activation and implementation."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise TypeError(f"{name}: got {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device}, as x")
    if torch.is_grad_enabled():
        for name, tensor in {"x": x, **tensors}.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, which a fused chain does not have; use torch.no_grad()")
    if activation not in ACTIVATIONS or activation == "prelu":
        names = ", ".join(name for name in ACTIVATIONS if name != "prelu")
        raise ValueError(f"activation: got {activation!r}, expected one of {names}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected {', '.join(IMPLEMENTATIONS)}")


def _checked_convolution(request: ConvPointwise | ConvBordered) -> tuple[int, int]:
    """Check the convolution and return the height and width of what it makes."""
    x, weight, groups = request.x, request.weight, request.groups
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [batch, in, height, width] (or x[None] for one image)")
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [out, in / groups, height, width]")
    inputs = x.shape[1]
    if groups != 1 and not groups == inputs == weight.shape[0]:
        raise ValueError(
            f"groups: got {groups} for {inputs} channels to {weight.shape[0]}, expected 1 or as many as both (or use F.conv2d)"
        )
    if weight.shape[1] != inputs // groups:
        raise ValueError(f"weight: got {weight.shape[1]} inputs, expected {inputs // groups}: {inputs} channels / {groups}")
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        _check_pair(name, getattr(request, name), least)
    size = convolved_size(x, weight, request.stride, request.padding, request.dilation)
    if min(size) < 1:
        raise ValueError(
            f"x: got images of {list(x.shape[2:])}, smaller than the kernel of {list(weight.shape[2:])}; give more padding"
        )
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"x: got images that become {size[0]} x {size[1]}, expected at most {MOST_PIXELS} pixels")
    return size


def _check_pair(name: str, values: Sequence[int], least: int) -> None:
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not all(isinstance(value, int) for value in values):
        raise TypeError(f"{name}: got {values!r}, expected two integers, such as {name}=({least}, {least})")
    if min(values) < least:
        raise ValueError(f"{name}: got {tuple(values)}, expected {least} or more")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {list(shape)}")
