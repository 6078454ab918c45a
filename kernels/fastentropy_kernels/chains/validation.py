"""Check all arguments of the fused chains before anything runs.

The message of an error is one line. It names the argument, the value that was given and the value that was expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.chains.operators import Convolution, LinearPair

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IMPLEMENTATIONS = ("auto", "triton", "reference")
MOST_MIDDLES = 128
"""The most hidden features that `linear_pair` takes, because a program keeps all of them in registers for its rows."""

MAX_PIXELS = 2**31 - 2**10
"""The most pixels of an output image, because the kernels number the pixels of an image in 32 bits."""


def check_conv_pointwise(
    convolution: Convolution,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    """Check the arguments of `conv_pointwise`.

    Args:
        convolution: the first convolution with its arguments.
        pointwise_weight: as for `conv_pointwise`.
        pointwise_bias: as for `conv_pointwise`.
        residual: as for `conv_pointwise`.
        activation: as for `conv_pointwise`.
        impl: as for `conv_pointwise`.

    Returns:
        `pointwise_weight` with the shape `[out, hidden]`.
    """
    x, weight, bias, *_ = convolution
    tensors = {
        "weight": weight,
        "bias": bias,
        "pointwise_weight": pointwise_weight,
        "pointwise_bias": pointwise_bias,
        "residual": residual,
    }
    _check_common(x, tensors, activation, impl)
    size = _checked_output_size(convolution)
    hidden = weight.shape[0]
    if pointwise_weight.ndim == 4 and pointwise_weight.shape[2:] == (1, 1):
        pointwise_weight = pointwise_weight.flatten(1)
    if pointwise_weight.ndim != 2 or pointwise_weight.shape[1] != hidden or pointwise_weight.shape[0] == 0:
        raise ValueError(
            f"pointwise_weight: got shape {list(pointwise_weight.shape)}, expected [out, {hidden}] or [out, {hidden}, 1, 1]"
        )
    outputs = pointwise_weight.shape[0]
    _check_shape("bias", bias, (hidden,))
    _check_shape("pointwise_bias", pointwise_bias, (outputs,))
    _check_shape("residual", residual, (x.shape[0], outputs, *size))
    return pointwise_weight


def check_conv_bordered(
    convolution: Convolution,
    tap_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    counts: Tensor | None,
    impl: str,
) -> None:
    """Check the arguments of `conv_bordered`.

    Args:
        convolution: the convolution with its arguments.
        tap_bias: as for `conv_bordered`.
        residual: as for `conv_bordered`.
        activation: as for `conv_bordered`.
        counts: as for `conv_bordered`.
        impl: as for `conv_bordered`.
    """
    x, weight, bias, *_ = convolution
    _check_common(x, {"weight": weight, "bias": bias, "tap_bias": tap_bias, "residual": residual}, activation, impl)
    size = _checked_output_size(convolution)
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


def check_linear_pair(pair: LinearPair, residual: Tensor | None, activation: str, impl: str) -> None:
    """Check the arguments of `linear_pair`.

    Args:
        pair: the two linear layers with their input.
        residual: as for `linear_pair`.
        activation: as for `linear_pair`.
        impl: as for `linear_pair`.
    """
    x, weight1, bias1, weight2, bias2 = pair
    tensors = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "residual": residual}
    _check_common(x, tensors, activation, impl)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [..., in]")
    if weight1.ndim != 2 or weight1.shape[1] != x.shape[-1] or weight1.shape[0] == 0:
        raise ValueError(f"weight1: got shape {list(weight1.shape)}, expected [hidden, {x.shape[-1]}], as in torch.nn.Linear")
    hidden = weight1.shape[0]
    if hidden > MOST_MIDDLES:
        raise ValueError(f"weight1: got {hidden} rows, expected at most {MOST_MIDDLES} (or use two calls of F.linear)")
    if weight2.ndim != 2 or weight2.shape[1] != hidden or weight2.shape[0] == 0:
        raise ValueError(f"weight2: got shape {list(weight2.shape)}, expected [out, {hidden}], as in torch.nn.Linear")
    _check_shape("bias1", bias1, (hidden,))
    _check_shape("bias2", bias2, (weight2.shape[0],))
    _check_shape("residual", residual, (*x.shape[:-1], weight2.shape[0]))


def _check_common(x: Tensor, tensors: dict[str, Tensor | None], activation: str, impl: str) -> None:
    """Check what all fused chains require of dtypes, devices, gradients, activation and implementation.

    Args:
        x: the input.
        tensors: the other tensors by the name of their argument, without `counts`. They must have the dtype and device of `x`.
        activation: the name of the activation.
        impl: the name of the implementation.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise TypeError(f"{name}: got {tensor.dtype} on {tensor.device}, expected {x.dtype} on {x.device}, as x")
    if torch.is_grad_enabled():
        for name, tensor in {"x": x, **tensors}.items():
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name}: requires a gradient, but fused chains have no backward pass; use torch.no_grad()")
    if activation not in ACTIVATIONS or activation == "prelu":
        names = ", ".join(name for name in ACTIVATIONS if name != "prelu")
        raise ValueError(f"activation: got {activation!r}, expected one of {names}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, expected {', '.join(IMPLEMENTATIONS)}")


def _checked_output_size(convolution: Convolution) -> tuple[int, int]:
    """Check the arguments of a convolution, and return the height and width of its output."""
    x, weight, _, stride, padding, dilation, groups = convolution
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
    _check_pair("stride", stride, 1)
    _check_pair("padding", padding, 0)
    _check_pair("dilation", dilation, 1)
    size = convolution.output_size()
    if min(size) < 1:
        raise ValueError(
            f"x: got images of {list(x.shape[2:])}, smaller than the kernel of {list(weight.shape[2:])}; give more padding"
        )
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"x: got images that become {size[0]} x {size[1]}, expected at most {MAX_PIXELS} pixels")
    return size


def _check_pair(name: str, values: Sequence[int], least: int) -> None:
    """Check that `values`, the argument called `name`, is a pair of integers that are at least `least`."""
    if not isinstance(values, (tuple, list)) or len(values) != 2 or not all(isinstance(value, int) for value in values):
        raise TypeError(f"{name}: got {values!r}, expected two integers, such as {name}=({least}, {least})")
    if min(values) < least:
        raise ValueError(f"{name}: got {tuple(values)}, expected {least} or more")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check that `tensor`, the argument called `name`, is None or has this shape."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {list(shape)}")
