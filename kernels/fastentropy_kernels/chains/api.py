"""The public functions that run a linearised chain of operators as one.

On a GPU, what lies between two operators of a chain is never written to memory.
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
    float32. Triton rounds what lies between the two convolutions to the dtype of `x`, because the matrix units multiply
    that dtype; the reference does not round it. There is no backward pass. torch.compile (fullgraph) and torch.export
    can trace the function.

    Args:
        x: `[batch, in, height, width]`, float16, bfloat16 or float32. Contiguous and channels-last images are read in
            place, and so are slices of them without gaps in the fastest axis; all others are copied. All other
            tensors have the dtype and the device of `x`.
        weight: `[hidden, in / groups, kernel height, kernel width]`. Without groups, a weight in channels-last is read
            in place, and any other is copied in each call.
        bias: `[hidden]`, or None.
        pointwise_weight: `[out, hidden]` or `[out, hidden, 1, 1]`.
        pointwise_bias: `[out]`, or None.
        stride: step of the first convolution in pixels, along height and width.
        padding: rows of zeros at the top and at the bottom, and columns of zeros on the left and on the right.
        dilation: distance in pixels between two taps of the first convolution, along height and width.
        groups: 1, or `in` for a depthwise convolution, where `hidden` is `in` too.
        residual: `[batch, out, out height, out width]`, or None.
        activation: a name of an activation as in `activation_states`, except prelu, with the default parameters.
        impl: "auto" takes Triton on CUDA and the reference elsewhere. "triton" and "reference" run as named or raise.

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
    """Return a convolution with a bias for each tap inside of the image, a residual and an activation.

    The result is activation(conv(x) + bias + the sum of `tap_bias` over the taps inside of the image + residual). With
    `tap_bias`, two merged convolutions are exact at the border as well: the bias of the first one acts only through
    the taps of the second one that read its output, and not through those that read the padding around that output.
    Sums and activation are computed in float32. There is no backward pass. torch.compile (fullgraph) and torch.export
    can trace the function.

    Args:
        x: `[batch, in, height, width]`, float16, bfloat16 or float32. Contiguous and channels-last images are read in
            place, and so are slices of them without gaps in the fastest axis; all others are copied. All other
            tensors but `counts` have the dtype and the device of `x`.
        weight: `[out, in / groups, kernel height, kernel width]`. Without groups, a weight in channels-last is read in
            place, and any other is copied in each call.
        bias: `[out]`, or None.
        tap_bias: `[out, kernel height, kernel width]`, or None: what each tap adds to an output where the tap does not
            lie in the padding.
        stride: step of the convolution in pixels, along height and width.
        padding: rows of zeros at the top and at the bottom, and columns of zeros on the left and on the right.
        dilation: distance in pixels between two taps, along height and width.
        groups: 1, or `in` for a depthwise convolution, where `out` is `in` too.
        residual: `[batch, out, out height, out width]`, or None.
        activation: a name of an activation as in `activation_states`, except prelu, with the default parameters.
        counts: int64 `[out, 3]`, contiguous, on the device of `x`, or None: columns off, zero, on. The states of the
            activation's argument, rounded to the dtype of `x`, are added to it in place. These are the states that
            `activation_states` would count after the convolution.
        impl: "auto" takes Triton on CUDA and the reference elsewhere. "triton" and "reference" run as named or raise.

    Returns:
        `[batch, out, out height, out width]`, in the dtype and memory format of `x`.

    Raises:
        TypeError: a dtype or device does not fit.
        ValueError: any other argument does not fit, or a tensor requires a gradient outside of torch.no_grad(). In both
            cases `counts` is unchanged.

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
    """Return two linear layers one after the other, a residual and an activation.

    The result is activation(linear2(linear1(x)) + residual): the product with a matrix of low rank, given as its two
    factors. Sums and activation are computed in float32. Triton rounds what lies between the two layers to the dtype of
    `x`, because the matrix units multiply that dtype; the reference does not round it. There is no backward pass.
    torch.compile (fullgraph) and torch.export can trace the function.

    Args:
        x: `[..., in]`, float16, bfloat16 or float32. All other tensors have its dtype and device.
        weight1: `[hidden, in]`, as in torch.nn.Linear, with `hidden` at most `MOST_MIDDLES` (128).
        bias1: `[hidden]`, or None.
        weight2: `[out, hidden]`.
        bias2: `[out]`, or None.
        residual: `[..., out]`, or None.
        activation: a name of an activation as in `activation_states`, except prelu, with the default parameters.
        impl: "auto" takes Triton on CUDA and the reference elsewhere. "triton" and "reference" run as named or raise.

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
