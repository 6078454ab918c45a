"""The reference of the fused chains, in plain PyTorch. The tests compare the kernels with it.

All operators are computed in float32, or in float64 for float64, and the result is rounded once to the dtype of the input. On
a GPU, PyTorch's settings decide whether float32 products use TF32.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastentropy_kernels import activations
from fastentropy_kernels.chains.operators import Convolution, LinearPair
from fastentropy_kernels.states import reference


def conv_pointwise(
    convolution: Convolution,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """Return activation(pointwise(convolution) + pointwise_bias + residual).

    Args:
        convolution: the first convolution with its arguments.
        pointwise_weight: `[out, hidden]`.
        pointwise_bias: `[out]`, or None.
        residual: `[batch, out, out height, out width]`, or None.
        activation: the name of the activation.
    """
    with activations.no_autocast(convolution.x.device.type):
        hidden = _convolve(convolution)
        values = F.conv2d(hidden, _wide(pointwise_weight)[:, :, None, None], _wide(pointwise_bias))
        return _formatted(_activated(_sum(values, residual), activation, convolution.x), convolution)


def conv_bordered(
    convolution: Convolution,
    tap_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    counts: Tensor | None,
) -> Tensor:
    """Return activation(convolution + residual + the sum of `tap_bias` over the taps that lie inside the image).

    Args:
        convolution: the convolution with its arguments.
        tap_bias: `[out, kernel height, kernel width]`, or None. A tap is one element of the convolution's kernel.
        residual: `[batch, out, out height, out width]`, or None.
        activation: the name of the activation.
        counts: int64 `[out, 3]`, or None. The states of the activation's argument, rounded to the dtype of x, are added to it.
    """
    x = convolution.x
    with activations.no_autocast(x.device.type):
        values = _convolve(convolution)
        if tap_bias is not None:
            # In an image of ones, a tap reads 1 if it lies inside the image and 0 if it lies in the padding.
            ones = values.new_ones((1, 1, *x.shape[2:]))
            values = values + _convolve(convolution._replace(x=ones, weight=tap_bias[:, None], bias=None, groups=1))
        values = _sum(values, residual)
        if counts is not None:
            reference.add_states(values.to(x.dtype), counts, 1)
        return _formatted(_activated(values, activation, x), convolution)


def linear_pair(pair: LinearPair, residual: Tensor | None, activation: str) -> Tensor:
    """Return activation(linear2(linear1(x)) + residual), contiguous.

    Args:
        pair: the two linear layers with their input.
        residual: `[..., out]`, or None.
        activation: the name of the activation.
    """
    x, weight1, bias1, weight2, bias2 = pair
    with activations.no_autocast(x.device.type):
        hidden = F.linear(_wide(x), _wide(weight1), _wide(bias1))
        values = _sum(F.linear(hidden, _wide(weight2), _wide(bias2)), residual)
        return _activated(values, activation, x).contiguous()


def _convolve(convolution: Convolution) -> Tensor:
    """Return the output of a convolution in float32, or in float64 for float64.

    The bias is added apart: with a bias, PyTorch crashes on images one pixel wide whose padding alone fills an output (issue
    195394 of pytorch/pytorch).
    """
    x, weight, bias, stride, padding, dilation, groups = convolution
    values = F.conv2d(_wide(x), _wide(weight), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    return values if bias is None else values + _wide(bias)[:, None, None]


@overload
def _wide(tensor: Tensor) -> Tensor: ...


@overload
def _wide(tensor: Tensor | None) -> Tensor | None: ...


def _wide(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def _sum(values: Tensor, residual: Tensor | None) -> Tensor:
    """Return `values` plus the residual, if there is one."""
    return values if residual is None else values + residual


def _activated(values: Tensor, activation: str, x: Tensor) -> Tensor:
    """Return the activation of `values`, with its default parameters, in the dtype of `x`."""
    parameters = tuple(activations.ACTIVATIONS[activation].parameters.values())
    return activations.activate(values, activation, parameters).to(x.dtype)


def _formatted(y: Tensor, convolution: Convolution) -> Tensor:
    """Return the images `y` in the memory format of the convolution's input.

    PyTorch's convolutions do not always keep the format. The strides are exactly those that `empty_output` tells tracers, also
    for axes of size 1, whose strides have no effect.
    """
    output = convolution.empty_output(y.shape[1])
    return y if y.stride() == output.stride() else output.copy_(y)
