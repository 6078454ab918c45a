"""The fused chains as PyTorch operators: what torch.compile and torch.export trace. They have no gradients.

Arguments are those of `chain_arguments`, complete. Plain eager calls do not come here, as in `registration`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastentropy_kernels.chains.dispatch import chain_kernels
from fastentropy_kernels.layout import convolved_size, empty_images


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
    """Return y."""
    y: Tensor = chain_kernels(impl, x.device.type).conv_pointwise(
        x, weight, bias, pointwise_weight, pointwise_bias, residual, stride, padding, dilation, groups, activation
    )
    return y


@conv_pointwise.register_fake
def _(
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
    return empty_images(x, pointwise_weight.shape[0], convolved_size(x, weight, stride, padding, dilation))


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
    """Return y and the counts [out, 3] of this call, [0, 3] unless `counted`."""
    counts = _counters(x, weight, counted)
    y: Tensor = chain_kernels(impl, x.device.type).conv_bordered(
        *(x, weight, bias, tap_bias, residual, stride, padding, dilation, groups, activation),
        counts if counted else None,
    )
    return y, counts


@conv_bordered.register_fake
def _(
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
    y = empty_images(x, weight.shape[0], convolved_size(x, weight, stride, padding, dilation))
    return y, _counters(x, weight, counted)


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
    """Return y."""
    kernels = chain_kernels(impl, x.device.type)
    y: Tensor = kernels.linear_pair(x, weight1, bias1, weight2, bias2, residual, activation)
    return y


@linear_pair.register_fake
def _(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    impl: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight2.shape[0]))


def _counters(x: Tensor, weight: Tensor, counted: bool) -> Tensor:
    return x.new_zeros((weight.shape[0] if counted else 0, 3), dtype=torch.int64)
