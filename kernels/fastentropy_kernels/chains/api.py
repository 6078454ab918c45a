"""The public functions that run a chain of linear operators as one operator.

A chain is a stretch of a network without an activation between its convolutions or linear layers. On a GPU, the values between
two operators of a chain are never written to memory.
"""

from __future__ import annotations

from torch import Tensor

from fastentropy_kernels.chains import ops
from fastentropy_kernels.chains.dispatch import chain_kernels
from fastentropy_kernels.chains.operators import Convolution, LinearPair
from fastentropy_kernels.chains.validation import check_conv_bordered, check_conv_pointwise, check_linear_pair
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
    """Return a convolution followed by a 1 x 1 convolution, a residual and an activation.

    The result is activation(pointwise(conv(x) + bias) + pointwise_bias + residual). Sums and activation are computed in
    float32. Triton rounds the values between the two convolutions to the dtype of `x`, because the matrix units multiply this
    dtype. The reference does not round them. There is no backward pass. torch.compile (fullgraph) and torch.export can trace
    the function.

    Args:
        x: `[batch, in, height, width]`, float16, bfloat16 or float32. Contiguous and channels-last images are read in place,
            and so are slices of them without gaps in the fastest axis. All other images are copied. All other tensors have the
            dtype and the device of `x`.
        weight: `[hidden, in / groups, kernel height, kernel width]`. With `groups=1`, a weight in channels-last is read in
            place, and any other is copied in each call.
        bias: `[hidden]`, or None.
        pointwise_weight: `[out, hidden]` or `[out, hidden, 1, 1]`.
        pointwise_bias: `[out]`, or None.
        stride: step of the first convolution in pixels, along height and width.
        padding: number of rows of zeros at the top and at the bottom each, and of columns of zeros on the left and on the
            right each.
        dilation: distance in pixels between neighbouring elements of the first convolution's kernel, along height and width.
        groups: 1, or `in` for a depthwise convolution. `hidden` must then equal `in`.
        residual: `[batch, out, out height, out width]`, which is added before the activation, or None.
        activation: the name of an activation as in `activation_states`, except prelu. Its parameters have their defaults.
        impl: "auto" chooses Triton on CUDA and the reference elsewhere. "triton" and "reference" choose one of these, or raise
            if it cannot run.

    Returns:
        `[batch, out, out height, out width]`, in the dtype and memory format of `x`.

    Raises:
        TypeError: a dtype or device does not fit.
        ValueError: any other argument does not fit, or a tensor requires a gradient outside of torch.no_grad().

    Examples:
        >>> import torch
        >>> from torch.nn.functional import conv2d
        >>> from fastentropy_kernels import conv_pointwise
        >>> x, weight, bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
        >>> pointwise_weight, pointwise_bias = torch.randn(6, 4), torch.randn(6)
        >>> y = conv_pointwise(x, weight, bias, pointwise_weight, pointwise_bias, padding=(1, 1), activation="relu")
        >>> hidden = conv2d(x, weight, bias, padding=1)
        >>> torch.allclose(y, conv2d(hidden, pointwise_weight[:, :, None, None], pointwise_bias).relu(), atol=1e-4)
        True
    """
    convolution = Convolution(x, weight, bias, stride, padding, dilation, groups)
    pointwise_weight = check_conv_pointwise(convolution, pointwise_weight, pointwise_bias, residual, activation, impl)
    if launches_directly(x):
        kernels = chain_kernels(impl, x.device.type)
        y: Tensor = kernels.conv_pointwise(convolution, pointwise_weight, pointwise_bias, residual, activation)
    else:
        tensors = (x, weight, bias, pointwise_weight, pointwise_bias, residual)
        y = ops.conv_pointwise(*tensors, stride, padding, dilation, groups, activation, impl)
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
    """Return a convolution with a bias for each tap that lies inside the image, a residual and an activation.

    A tap is one element of the convolution's kernel. At the border, some taps read the padding. The result is
    activation(conv(x) + bias + residual + s), where s is the sum of `tap_bias` over the taps that lie inside the image.
    `tap_bias` makes the merging of two convolutions exact at the border too: the bias of the first convolution reaches an
    output only through those taps of the second that read an output of the first, not through those that read padding.

    Sums and activation are computed in float32. There is no backward pass. torch.compile (fullgraph) and torch.export can
    trace the function.

    Args:
        x: `[batch, in, height, width]`, float16, bfloat16 or float32. Contiguous and channels-last images are read in place,
            and so are slices of them without gaps in the fastest axis. All other images are copied. All other tensors but
            `counts` have the dtype and the device of `x`.
        weight: `[out, in / groups, kernel height, kernel width]`. With `groups=1`, a weight in channels-last is read in place,
            and any other is copied in each call.
        bias: `[out]`, or None.
        tap_bias: `[out, kernel height, kernel width]`, or None. Each element is added to an output if its tap lies inside the
            image.
        stride: step of the convolution in pixels, along height and width.
        padding: number of rows of zeros at the top and at the bottom each, and of columns of zeros on the left and on the
            right each.
        dilation: distance in pixels between neighbouring taps, along height and width.
        groups: 1, or `in` for a depthwise convolution. `out` must then equal `in`.
        residual: `[batch, out, out height, out width]`, which is added before the activation, or None.
        activation: the name of an activation as in `activation_states`, except prelu. Its parameters have their defaults.
        counts: int64 `[out, 3]`, contiguous, on the device of `x`, or None. The states of the activation's argument are
            counted, and the counts of off, zero and on are added to the columns. The argument is rounded to the dtype of `x`
            first, so the counts are those of `activation_states` after the convolution.
        impl: "auto" chooses Triton on CUDA and the reference elsewhere. "triton" and "reference" choose one of these, or raise
            if it cannot run.

    Returns:
        `[batch, out, out height, out width]`, in the dtype and memory format of `x`.

    Raises:
        TypeError: a dtype or device does not fit. `counts` is unchanged.
        ValueError: any other argument does not fit, or a tensor requires a gradient outside of torch.no_grad(). `counts` is
            unchanged.

    Examples:
        A 1 x 1 convolution and a padded 3 x 3 convolution, merged into one:

        >>> import torch
        >>> from torch.nn.functional import conv2d
        >>> from fastentropy_kernels import conv_bordered
        >>> x, first, first_bias = torch.randn(2, 3, 8, 8), torch.randn(4, 3), torch.randn(4)
        >>> second, second_bias = torch.randn(5, 4, 3, 3), torch.randn(5)
        >>> weight = torch.einsum("omhw,mi->oihw", second, first)
        >>> tap_bias = torch.einsum("omhw,m->ohw", second, first_bias)
        >>> y = conv_bordered(x, weight, second_bias, tap_bias, padding=(1, 1))
        >>> hidden = conv2d(x, first[:, :, None, None], first_bias)
        >>> torch.allclose(y, conv2d(hidden, second, second_bias, padding=1), atol=1e-4)
        True
    """
    convolution = Convolution(x, weight, bias, stride, padding, dilation, groups)
    check_conv_bordered(convolution, tap_bias, residual, activation, counts, impl)
    if launches_directly(x):
        y: Tensor = chain_kernels(impl, x.device.type).conv_bordered(convolution, tap_bias, residual, activation, counts)
        increment_versions(counts)
        return y
    tensors = (x, weight, bias, tap_bias, residual)
    y, added = ops.conv_bordered(*tensors, stride, padding, dilation, groups, activation, counts is not None, impl)
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
    """Return two linear layers in sequence, a residual and an activation.

    The result is activation(linear2(linear1(x)) + residual). If `hidden` is small, the two layers are a weight of low rank,
    given by its two factors. Sums and activation are computed in float32. Triton rounds the values between the two layers to
    the dtype of `x`, because the matrix units multiply this dtype. The reference does not round them. There is no backward
    pass. torch.compile (fullgraph) and torch.export can trace the function.

    Args:
        x: `[..., in]`, float16, bfloat16 or float32. All other tensors have its dtype and device.
        weight1: `[hidden, in]`, as in torch.nn.Linear, with `hidden` at most `MOST_MIDDLES` (128).
        bias1: `[hidden]`, or None.
        weight2: `[out, hidden]`.
        bias2: `[out]`, or None.
        residual: `[..., out]`, which is added before the activation, or None.
        activation: the name of an activation as in `activation_states`, except prelu. Its parameters have their defaults.
        impl: "auto" chooses Triton on CUDA and the reference elsewhere. "triton" and "reference" choose one of these, or raise
            if it cannot run.

    Returns:
        `[..., out]`, contiguous, in the dtype of `x`.

    Raises:
        TypeError: a dtype or device does not fit.
        ValueError: any other argument does not fit, or a tensor requires a gradient outside of torch.no_grad().

    Examples:
        >>> import torch
        >>> from torch.nn.functional import linear
        >>> from fastentropy_kernels import linear_pair
        >>> x, residual = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
        >>> down, up, bias = torch.randn(4, 16), torch.randn(16, 4), torch.randn(16)
        >>> y = linear_pair(x, down, None, up, bias, residual=residual)
        >>> torch.allclose(y, linear(linear(x, down), up, bias) + residual, atol=1e-4)
        True
    """
    pair = LinearPair(x, weight1, bias1, weight2, bias2)
    check_linear_pair(pair, residual, activation, impl)
    if launches_directly(x):
        y: Tensor = chain_kernels(impl, x.device.type).linear_pair(pair, residual, activation)
    else:
        y = ops.linear_pair(*pair, residual, activation, impl)
    return y
