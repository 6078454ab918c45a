"""GPU: the activations, as one function that the Triton kernels inline.

Each branch computes in float32 and keeps NaN. Its form is chosen for few instructions: memory, not arithmetic, is to be the
bound of a kernel that reads a value, activates it and writes it.
"""

# Kernels have no types, and Triton's decorator has none either.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, parameters, weight):
    """Return the activation of a tile.

    Args:
        x: float32 tile. NaN stays NaN.
        ACTIVATION: a key of `activations.ACTIVATIONS`.
        parameters: tuple of float32 numbers, those of the activation in the order of the table.
        weight: float32, the slopes of prelu; it broadcasts to the shape of `x`.
    """
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return _at_least(x, 0.0)
    elif ACTIVATION == "relu6":
        return _clamp(x, 0.0, 6.0)
    elif ACTIVATION == "hardtanh":
        return _clamp(x, parameters[0], parameters[1])
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0, x, x * parameters[0])
    elif ACTIVATION == "prelu":
        return tl.where(x > 0, x, x * weight)
    elif ACTIVATION == "relu2":
        return _at_least(x, 0.0) * _at_least(x, 0.0)
    elif ACTIVATION == "hardswish":
        return x * _clamp(x + 3.0, 0.0, 6.0) / 6.0
    elif ACTIVATION == "elu":
        return tl.where(x > 0, x, parameters[0] * _expm1(x))
    elif ACTIVATION == "celu":
        return tl.where(x > 0, x, parameters[0] * _expm1(x / parameters[0]))
    elif ACTIVATION == "selu":
        return 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * _expm1(x))
    elif ACTIVATION == "gelu":
        return _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid 2u
        return _times_sigmoid(x, 1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        return _times_sigmoid(x, 1.702 * x)
    elif ACTIVATION == "silu":
        return _times_sigmoid(x, x)
    elif ACTIVATION == "mish":
        # tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); from 20 on it is 1 in float32
        e = tl.exp(tl.where(x > 20.0, 20.0, x))
        n = e * (e + 2.0)
        return x * (n / (n + 2.0))
    else:
        tl.static_assert(ACTIVATION == "softplus", "unknown activation")
        scaled = x * parameters[0]
        return tl.where(scaled > parameters[1], x, _softplus(scaled) / parameters[0])


@triton.jit
def _at_least(x, low):
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(_at_least(x, low), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(x):
    """Return x Phi(x) = max(x, 0) - z Phi(-z) with z = |x| and Phi(-z) = 2^-q(z).

    In this form nothing cancels below 0, where Phi is small. q is a polynomial, exact at 0, fitted to -log2 Phi(-z) over
    0 <= z <= 10. The fit is by least squares with weights that are raised where the error is largest, until the maximum is
    least (Lawson's algorithm). The error of z Phi(-z) is at most 1.6e-7 or 0.16% of the value, whichever is larger. Beyond 10
    z Phi(-z) is below 1e-22, and q keeps rising. From 14 on the product no longer changes x > 0, so z stops there and infinity
    stays infinity. Minus infinity gives NaN, as in PyTorch.
    """
    z = tl.abs(tl.minimum(x, 14.0, propagate_nan=tl.PropagateNan.ALL))
    q = 1.2594321106007555e-06 * z - 4.9938669690163806e-05
    q = q * z + 0.0008448295993730426
    q = q * z - 0.00822521187365055
    q = q * z + 0.05352005735039711
    q = q * z + 0.4587700068950653
    q = q * z + 1.1511732339859009
    q = q * z + 1.0
    return _at_least(x, 0.0) - z * tl.exp2(-q)


@triton.jit
def _times_sigmoid(x, at):
    """Return x sigmoid(at), with sigmoid as the square of 1 / sqrt(1 + e^-at).

    A reciprocal root takes one instruction and a division takes several. The relative error of the root, 2^-22.9 (PTX ISA,
    rsqrt.approx), counts twice. Where `at` is far below 0, the error of e^-at is larger.
    """
    root = tl.rsqrt(1.0 + tl.exp2(at * -1.4426950408889634))
    return x * root * root


@triton.jit
def _softplus(x):
    """Return log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|. log(1 + e) is 2 artanh(s), s = e / (2 + e) <= 1/3."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15))))))
    return _at_least(x, 0.0) + 2.0 * (s + s * z * series)


@triton.jit
def _expm1(x):
    """Return e^x - 1: Taylor's series near 0, where the difference would cancel."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return tl.where(tl.abs(x) < 0.35, x + x * x * (0.5 + x * (1 / 6 + x * series)), tl.exp(x) - 1.0)


# Whether the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when this module was imported.
INTERPRETED = not isinstance(activate, triton.JITFunction)
