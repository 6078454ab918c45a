"""The fused chains as registered operators, which torch.compile and torch.export trace. They have no gradients.

The functions of `api` call them with checked and complete arguments. In plain eager mode, `api` bypasses them and launches the
kernels directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastentropy_kernels.chains.dispatch import chain_kernels
from fastentropy_kernels.chains.operators import Convolution, LinearPair


@torch.library.custom_op("fastentropy_kernels::conv_pointwise", mutates_args=())
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
    impl: str,
) -> Tensor:
    """Return the output of the public `conv_pointwise`, whose arguments these are."""
    convolution = Convolution(x, weight, bias, stride, padding, dilation, groups)
    kernels = chain_kernels(impl, x.device.type)
    y: Tensor = kernels.conv_pointwise(convolution, pointwise_weight, pointwise_bias, residual, activation)
    return y


@conv_pointwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, pointwise_weight: Tensor, *others: Any) -> Tensor:
    _pointwise_bias, _residual, *geometry, _activation, _impl = others
    return Convolution(x, weight, bias, *geometry).empty_output(pointwise_weight.shape[0])


@torch.library.custom_op("fastentropy_kernels::conv_bordered", mutates_args=())
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
    counted: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the output of the public `conv_bordered` and the counts of this call.

    The arguments are those of the public function. `counted` says whether it was called with counts.

    Returns:
        The output; the counts of off, zero and on, int64 `[out, 3]` if `counted`, otherwise `[0, 3]`.
    """
    convolution = Convolution(x, weight, bias, stride, padding, dilation, groups)
    counts = _counters(x, weight, counted)
    kernels = chain_kernels(impl, x.device.type)
    y: Tensor = kernels.conv_bordered(convolution, tap_bias, residual, activation, counts if counted else None)
    return y, counts


@conv_bordered.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tap_bias: Tensor | None, *others: Any) -> tuple[Tensor, Tensor]:
    _residual, *geometry, _activation, counted, _impl = others
    return Convolution(x, weight, bias, *geometry).empty_output(weight.shape[0]), _counters(x, weight, counted)


def _counters(x: Tensor, weight: Tensor, counted: bool) -> Tensor:
    """Return zeros for the counts: int64 `[out, 3]` if `counted`, otherwise `[0, 3]`."""
    return x.new_zeros((weight.shape[0] if counted else 0, 3), dtype=torch.int64)


@torch.library.custom_op("fastentropy_kernels::linear_pair", mutates_args=())
def linear_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    """Return the output of the public `linear_pair`, whose arguments these are."""
    pair = LinearPair(x, weight1, bias1, weight2, bias2)
    y: Tensor = chain_kernels(impl, x.device.type).linear_pair(pair, residual, activation)
    return y


@linear_pair.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, *_others: Any) -> Tensor:
    return LinearPair(x, weight1, bias1, weight2, bias2).empty_output()
