"""GPU: activations, as functions of Triton kernels."""

from __future__ import annotations

# mypy: disable-error-code="assignment, misc, no-untyped-def, no-untyped-call, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, parameters, weight):
    """The activation named in `reference.ACTIVATIONS`, of float32; NaN stays NaN."""
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
    """x Phi(x) = max(x, 0) - z Phi(-z) with z = |x|, and Phi(-z) = 2^-q(z): nothing cancels below 0, where Phi is small.

    q is a polynomial fitted to -log2 Phi(-z) over 0 <= z <= 10, exact at 0, by least squares with weights that were raised
    where the error was largest (Lawson's algorithm) until its maximum was least: that of z Phi(-z) is 1.6e-7, and 0.16% of the
    value, where this is the larger one. Beyond 10, where z Phi(-z) is below 1e-22, q rises without end. From 14 on the product
    is nothing to x > 0, so z stops there: infinity stays infinity. Minus infinity is NaN, as for PyTorch.
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
    """x sigmoid(at), where sigmoid is the square of 1 / sqrt(1 + e^-at): a root takes an instruction, a division several.

    The root's error, 2^-22.9 of it (PTX ISA, rsqrt.approx), counts twice. That of e^-at is larger where at is far below 0.
    """
    root = tl.rsqrt(1.0 + tl.exp2(at * -1.4426950408889634))
    return x * root * root


@triton.jit
def _softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e) with e = e^-|x|, which is 2 artanh(s) with s = e / (2 + e) up to 1/3."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    series = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15))))))
    return _at_least(x, 0.0) + 2.0 * (s + s * z * series)


@triton.jit
def _expm1(x):
    """e^x - 1. Near 0, where the difference cancels, it is Taylor's series."""
    series = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320))))
    return tl.where(tl.abs(x) < 0.35, x + x * x * (0.5 + x * (1 / 6 + x * series)), tl.exp(x) - 1.0)


INTERPRETED = not isinstance(activate, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when this module was imported."""
