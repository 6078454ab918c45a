"""Arguments that do not fit are refused in one line before anything runs, and a named implementation runs or raises."""

import pytest
import torch

from fastentropy_kernels import activations_triton, conv_bordered, conv_pointwise, linear_pair
from fastentropy_kernels.chains import dispatch
from fastentropy_kernels.chains.validation import MOST_MIDDLES

X, WEIGHT, BIAS = torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 3, 3), torch.zeros(4)
FACTORS = torch.zeros(6, 4)
ROWS, FIRST = torch.zeros(7, 3), torch.zeros(4, 3)
COUNTS = torch.zeros(4, 3, dtype=torch.int64)


def bordered(x=X, weight=WEIGHT, bias=BIAS, tap_bias=None, **options):
    return conv_bordered(x, weight, bias, tap_bias, **options)


def pointwise(x=X, weight=WEIGHT, bias=BIAS, factors=FACTORS, pointwise_bias=None, **options):
    return conv_pointwise(x, weight, bias, factors, pointwise_bias, **options)


def pair(x=ROWS, weight1=FIRST, bias1=BIAS, weight2=FACTORS, bias2=None, **options):
    return linear_pair(x, weight1, bias1, weight2, bias2, **options)


REFUSED = [
    (bordered, {"x": X.double()}, TypeError, "x: got torch.float64, expected one of torch.float16"),
    (bordered, {"x": X[0]}, ValueError, r"x: got shape \[3, 5, 5\], expected \[batch, in, height, width\] \(or x\[None\]"),
    (bordered, {"weight": WEIGHT.half()}, TypeError, "weight: got torch.float16 on cpu, expected torch.float32 on cpu, as x"),
    (bordered, {"weight": WEIGHT[0]}, ValueError, r"weight: got shape \[3, 3, 3\], expected \[out, in / groups"),
    (bordered, {"weight": WEIGHT[:, :2]}, ValueError, "weight: got 2 inputs, expected 3: 3 channels / 1"),
    (bordered, {"bias": BIAS[:3]}, ValueError, r"bias: got shape \[3\], expected \[4\]"),
    (bordered, {"bias": BIAS.to("meta")}, TypeError, "bias: got torch.float32 on meta, expected torch.float32 on cpu"),
    (bordered, {"tap_bias": FACTORS}, ValueError, r"tap_bias: got shape \[6, 4\], expected \[4, 3, 3\]"),
    (bordered, {"residual": X}, ValueError, r"residual: got shape \[2, 3, 5, 5\], expected \[2, 4, 3, 3\]"),
    (
        bordered,
        {"groups": 3},
        ValueError,
        r"groups: got 3 for 3 channels to 4, expected 1 or as many as both \(or use F.conv2d",
    ),
    (bordered, {"stride": 2}, TypeError, r"stride: got 2, expected two integers, such as stride=\(1, 1\)"),
    (bordered, {"stride": (0, 1)}, ValueError, r"stride: got \(0, 1\), expected 1 or more"),
    (bordered, {"padding": (-1, 1)}, ValueError, r"padding: got \(-1, 1\), expected 0 or more"),
    (bordered, {"dilation": (3, 1)}, ValueError, r"x: got images of \[5, 5\], smaller than the kernel of \[3, 3\]; give more"),
    (bordered, {"counts": COUNTS.int()}, TypeError, "counts: got torch.int32 on cpu, expected torch.int64 on cpu"),
    (bordered, {"counts": COUNTS[:2]}, ValueError, r"counts: got shape \[2, 3\], expected \[4, 3\]"),
    (bordered, {"counts": COUNTS.repeat(1, 2)[:, ::2]}, ValueError, "counts: got strides .* expected contiguous memory"),
    (bordered, {"activation": "prelu"}, ValueError, "activation: got 'prelu', expected one of identity, relu, "),
    (bordered, {"impl": "numba"}, ValueError, "impl: got 'numba', expected auto, triton, reference"),
    (pointwise, {"factors": FACTORS[:, :3]}, ValueError, r"pointwise_weight: got shape \[6, 3\], expected \[out, 4\] or"),
    (pointwise, {"pointwise_bias": BIAS}, ValueError, r"pointwise_bias: got shape \[4\], expected \[6\]"),
    (pointwise, {"residual": X}, ValueError, r"residual: got shape \[2, 3, 5, 5\], expected \[2, 6, 3, 3\]"),
    (pair, {"x": torch.tensor(1.0)}, ValueError, r"x: got shape \[\], expected \[..., in\]"),
    (pair, {"weight1": FACTORS}, ValueError, r"weight1: got shape \[6, 4\], expected \[hidden, 3\], as in torch.nn.Linear"),
    (pair, {"weight2": FACTORS.T}, ValueError, r"weight2: got shape \[4, 6\], expected \[out, 4\], as in torch.nn.Linear"),
    (
        pair,
        {"weight1": torch.zeros(129, 3)},
        ValueError,
        r"weight1: got 129 rows, expected at most 128 \(or use two calls of F",
    ),
    (pair, {"residual": torch.zeros(6)}, ValueError, r"residual: got shape \[6\], expected \[7, 6\]"),
    (
        pair,
        {"weight2": FACTORS.clone().requires_grad_()},
        ValueError,
        r"weight2: requires a gradient, but .* use torch.no_grad\(\)",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "error", "line"), REFUSED)
def test_refused_in_one_line(function, arguments, error, line):
    with pytest.raises(error, match=f"^{line}") as raised:
        function(**arguments)
    assert "\n" not in str(raised.value)


def test_parameters_run_without_gradients():
    with torch.no_grad():
        assert not pair(weight2=FACTORS.clone().requires_grad_()).requires_grad


def test_pointwise_weight_may_have_four_axes():
    x, weight, factors = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(6, 4)
    expected = pointwise(x, weight, factors=factors)
    assert torch.equal(pointwise(x, weight, factors=factors[..., None, None]), expected)


def test_most_hidden_values_run():
    assert pair(weight1=torch.zeros(MOST_MIDDLES, 3), bias1=None, weight2=torch.zeros(6, MOST_MIDDLES)).shape == (7, 6)


@pytest.mark.skipif(activations_triton.INTERPRETED, reason="the interpreter runs on a CPU")
@pytest.mark.parametrize("function", [bordered, pointwise, pair])
def test_named_implementation_runs_or_raises(function):
    with pytest.raises(ValueError, match="impl: 'triton' runs on CUDA tensors, not on cpu"):
        function(impl="triton")
    assert torch.equal(function(impl="reference"), function())


def test_auto_is_triton_on_a_gpu_only():
    assert dispatch.chain_kernels("auto", "cpu").__name__ == "fastentropy_kernels.chains.reference"
    name = "launch_triton" if torch.cuda.is_available() else "reference"
    assert dispatch.chain_kernels("auto", "cuda").__name__ == f"fastentropy_kernels.chains.{name}"
