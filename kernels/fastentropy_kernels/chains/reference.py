"""The oracle of the fused chains, in plain PyTorch: float32 from the first operator to the activation, rounded once.

float64 is computed in float64. On a GPU, float32 is multiplied as PyTorch's settings for TF32 say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastentropy_kernels import activations
from fastentropy_kernels.layout import empty_images
from fastentropy_kernels.states import reference


def conv_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
) -> Tensor:
    """Return activation(pointwise(conv(x) + bias) + pointwise_bias + residual), with pointwise_weight [out, mid]."""
    with activations.no_autocast(x.device.type):
        middle = F.conv2d(_wide(x), _wide(weight), _wide(bias), tuple(stride), tuple(padding), tuple(dilation), groups)
        values = F.conv2d(middle, _wide(pointwise_weight)[:, :, None, None], _wide(pointwise_bias))
        return _laid_out_as(x, _activated(_sum(values, residual), activation, x))


def conv_bordered(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tap_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    counts: Tensor | None,
) -> Tensor:
    """Return activation(conv(x) + bias + the sum of tap_bias [out, height, width] over taps inside of x + residual).

    The states of what the activation is taken of, rounded to the dtype of x, are added to `counts` [out, 3].
    """
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    with activations.no_autocast(x.device.type):
        values = F.conv2d(_wide(x), _wide(weight), _wide(bias), *geometry, groups)
        if tap_bias is not None:
            # Where a tap is inside, an image of ones has a one; outside it is padded like any other, with zero.
            ones = values.new_ones((1, 1, *x.shape[2:]))
            values = values + F.conv2d(ones, _wide(tap_bias)[:, None], None, *geometry)
        values = _sum(values, residual)
        if counts is not None:
            reference.add_states(values.to(x.dtype), counts, 1)
        return _laid_out_as(x, _activated(values, activation, x))


def linear_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """Return activation(linear2(linear1(x)) + residual), contiguous."""
    with activations.no_autocast(x.device.type):
        middle = F.linear(_wide(x), _wide(weight1), _wide(bias1))
        values = _sum(F.linear(middle, _wide(weight2), _wide(bias2)), residual)
        return _activated(values, activation, x).contiguous()


@overload
def _wide(tensor: Tensor) -> Tensor: ...


@overload
def _wide(tensor: Tensor | None) -> Tensor | None: ...


def _wide(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def _sum(values: Tensor, residual: Tensor | None) -> Tensor:
    return values if residual is None else values + residual


def _activated(values: Tensor, activation: str, x: Tensor) -> Tensor:
    parameters = tuple(activations.ACTIVATIONS[activation].parameters.values())
    return activations.activate(values, activation, parameters).to(x.dtype)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return images in the memory format of `x`, which PyTorch's convolutions do not always keep.

    The strides are those that tracers are told, also where axes of one leave a choice.
    """
    laid_out = empty_images(x, y.shape[1], (y.shape[2], y.shape[3]))
    return y if y.stride() == laid_out.stride() else laid_out.copy_(y)
