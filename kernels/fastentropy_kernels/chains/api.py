"""Linearised chains of operators as one: what was between them is not written to memory on a GPU."""

from __future__ import annotations

from torch import Tensor

from fastentropy_kernels.chains import ops
from fastentropy_kernels.chains.dispatch import chain_kernels
from fastentropy_kernels.chains.validation import (
    ConvBordered,
    ConvPointwise,
    LinearPair,
    checked_conv_bordered,
    checked_conv_pointwise,
    checked_linear_pair,
)
from fastentropy_kernels.dispatch import increment_versions, launches_directly


def conv_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "identity",
    impl: str = "auto",
) -> Tensor:
    """Return activation(pointwise(conv(x) + bias) + pointwise_bias + residual): a convolution, then one of 1 x 1.

    Args:
        x: `[batch, in, height, width]`, float16, bfloat16 or float32. Contiguous and channels-last images are read where
            they are, and so are slices of them without gaps in the fastest axis. All other tensors have its dtype and
            device.
        weight: `[mid, in / groups, kernel height, kernel width]`. Without groups, channels-last is the format that is read
            where it is; another is copied in each call.
        bias: `[mid]`, or None.
        pointwise_weight: `[out, mid]` or `[out, mid, 1, 1]`.
        pointwise_bias: `[out]`, or None.
        stride: of the convolution, along height and width; so are padding (with zeros) and dilation.
        padding: see above.
        dilation: see above.
        groups: 1, or `in` (depthwise) where that is `mid`.
        residual: has the shape of y.
        activation: a key of `reference.ACTIVATIONS` other than prelu, with the defaults of its parameters.
        impl: "auto" takes Triton on CUDA and the reference elsewhere; "triton" and "reference" run as named or raise.

    Returns:
        `[batch, out, …]` in the dtype and memory format of `x`. Sums and activation are in float32. Triton rounds what is
        between the two convolutions to the dtype of `x`, which its matrix units multiply; the reference does not.

    There are no gradients. The function can be traced by torch.compile (fullgraph) and torch.export.

    Raises:
        TypeError: a dtype or device does not fit.
        ValueError: any other argument does not fit, or a tensor requires a gradient outside of torch.no_grad().
    """
    request = checked_conv_pointwise(
        ConvPointwise(
            *(x, weight, bias, pointwise_weight, pointwise_bias, residual, stride, padding, dilation, groups, activation)
        ),
        impl,
    )
    if launches_directly(x):
        y: Tensor = chain_kernels(impl, x.device.type).conv_pointwise(*request)
    else:
        y = ops.conv_pointwise(*request, impl)
    return y


def conv_bordered(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tap_bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "identity",
    counts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return activation(conv(x) + bias + what each tap inside of the image adds + residual).

    Args:
        x: as in `conv_pointwise`, and so are weight (`[out, in / groups, …]`), bias (`[out]`) and all that follows.
        weight: see above.
        bias: see above.
        tap_bias: `[out, kernel height, kernel width]`: what a tap adds to an output where it does not lie in the padding.
            That is the bias of an operator that was merged into this one, and whose output was padded with zeros.
        stride: see above.
        padding: see above.
        dilation: see above.
        groups: see above.
        residual: see above.
        activation: see above.
        counts: int64 `[out, 3]`, contiguous: off, zero, on. The states of what the activation is taken of, rounded to the
            dtype of `x`, are added to it: what `activation_states` would count after the convolution.
        impl: see above.

    Raises:
        TypeError: a dtype or device does not fit.
        ValueError: as for `conv_pointwise`. In both cases `counts` is unchanged.
    """
    request = checked_conv_bordered(
        ConvBordered(x, weight, bias, tap_bias, residual, stride, padding, dilation, groups, activation), counts, impl
    )
    if launches_directly(x):
        y: Tensor = chain_kernels(impl, x.device.type).conv_bordered(*request, counts)
        increment_versions(counts)
        return y
    y, added = ops.conv_bordered(*request, counts is not None, impl)
    if counts is not None:
        counts += added
    return y


def linear_pair(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    impl: str = "auto",
) -> Tensor:
    """Return activation(linear2(linear1(x)) + residual): a matrix of low rank as its two factors.

    Args:
        x: `[..., in]`, float16, bfloat16 or float32. All other tensors have its dtype and device.
        weight1: `[mid, in]`, as in torch.nn.Linear, with `mid` at most 128.
        bias1: `[mid]`, or None.
        weight2: `[out, mid]`.
        bias2: `[out]`, or None.
        residual: `[..., out]`.
        activation: as in `conv_pointwise`, and so are impl, rounding, gradients and what is raised.
        impl: see above.

    Returns:
        `[..., out]`, contiguous, in the dtype of `x`.
    """
    request = checked_linear_pair(LinearPair(x, weight1, bias1, weight2, bias2, residual, activation), impl)
    if launches_directly(x):
        y: Tensor = chain_kernels(impl, x.device.type).linear_pair(*request)
    else:
        y = ops.linear_pair(*request, impl)
    return y
