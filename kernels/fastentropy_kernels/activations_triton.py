"""GPU: all activations in one Triton function, which the kernels inline.

Every activation is computed in float32 and keeps NaN. The formulas are chosen for few instructions. A kernel reads a value,
activates it and writes it, and should be limited by memory bandwidth, not by arithmetic.
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
        parameters: tuple of float32 numbers, the parameters of the activation in the order of the table.
        weight: float32, the slopes of prelu, in a shape that broadcasts to that of `x`. Other activations ignore it.
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
    """Return the larger of `x` and `low`. NaN stays NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamp(x, low, high):
    """Return `x` limited to the interval from `low` to `high`. NaN stays NaN."""
    return tl.minimum(_at_least(x, low), high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(x):
    """Return x Phi(x), computed as max(x, 0) - z Phi(-z) with z = |x| and Phi(-z) = 2^-q(z).

    Phi is the distribution function of the normal distribution. In this form nothing cancels for x < 0, where Phi(x) is small.

    q is a polynomial, exact at 0, which is fitted to -log2 Phi(-z) over 0 <= z <= 10. The fit is by weighted least squares.
    Lawson's algorithm raises the weights where the error is largest, until the maximum error is least. The error of z Phi(-z)
    is at most 1.6e-7 or 0.16% of the value, whichever is larger. For z > 10, z Phi(-z) is below 1e-22, and q keeps rising.

    For x > 14, subtracting z Phi(-z) no longer changes x. z is therefore limited to 14 there, and infinity stays infinity.
    Minus infinity gives NaN, as in PyTorch.
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
    """Return x sigmoid(at), where the sigmoid is the square of 1 / sqrt(1 + e^-at).

    A reciprocal square root takes one instruction, but a division takes several. The square doubles the relative error of the
    root, which is 2^-22.9 (PTX ISA, rsqrt.approx). If `at` is far below 0, the error of e^-at is larger than that.
    """
    root = tl.rsqrt(1.0 + tl.exp2(at * -1.4426950408889634))
    return x * root * root


@triton.jit
def _softplus(x):
    """Return log(1 + e^x), computed as max(x, 0) + log(1 + e) with e = e^-|x|.

    The series is that of log(1 + e) = 2 artanh(s), with s = e / (2 + e) <= 1/3.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15))))))
    return _at_least(x, 0.0) + 2.0 * (s + s * z * series)


@triton.jit
def _expm1(x):
    """Return e^x - 1.

    For |x| < 0.35 it is Taylor's series, because the difference would cancel there.
    """
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return tl.where(tl.abs(x) < 0.35, x + x * x * (0.5 + x * (1 / 6 + x * series)), tl.exp(x) - 1.0)


# True if TRITON_INTERPRET=1 was set when this module was imported. The kernels then run in Triton's interpreter, on CPU
# tensors.
INTERPRETED = not isinstance(activate, triton.JITFunction)
