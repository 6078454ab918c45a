"""The fused chains in Triton against the reference in float64: in the interpreter, and on a GPU where there is one.

The interpreter has to be chosen before Triton is imported. `test_in_the_interpreter` therefore runs this file again, in a
process of its own.
"""

import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from fastentropy_kernels import activations, activations_triton, conv_bordered
from fastentropy_kernels.activations import ACTIVATIONS
from fastentropy_kernels.chains import launch_triton, reference
from fastentropy_kernels.chains.launch_triton import Launch
from fastentropy_kernels.chains.operators import Convolution, LinearPair
from tests.kernels.chains.cases import DTYPES, convolutions, output_size, random_tensor, small_integers

INTERPRETED = activations_triton.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"

pytestmark = [
    # The interpreter computes both sides of a tl.where.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no GPU: test_in_the_interpreter runs it"
)

# Tolerances, relative to the sum of the absolute values of all terms. float32: the error of float32 arithmetic. 16 bits: a
# step of the format for the values between the operators and one for y (the interpreter truncates).
RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
# The same for the activation of a value without error, as in tests/kernels/states/test_triton.py.
ACTIVATION_RTOL = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Several blocks along every axis.
SMALL = Launch(positions=16, outputs=16, hidden=16, inputs=16, num_warps=4, num_stages=2)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d+ passed", run.stdout), run.stdout


@contextmanager
def poisoned():
    """Fill new memory with NaN, so that a value that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(function, operator, others, change, **options):
    """Run an implementation on tensors that are changed first."""

    def changed(argument):
        return change(argument) if isinstance(argument, torch.Tensor) else argument

    return function(
        operator._make(map(changed, operator)), **{name: changed(other) for name, other in others.items()}, **options
    )


def check(name, operator, launch=None, **others):
    """Compare at every position. The arguments are those of both implementations."""
    with poisoned():
        y = run(getattr(launch_triton, name), operator, others, lambda tensor: tensor.to(DEVICE), launch=launch)
    oracle = getattr(reference, name)
    expected = run(oracle, operator, others, torch.Tensor.double)
    magnitude = run(oracle, operator, {**others, "activation": "identity"}, lambda tensor: tensor.double().abs())
    assert y.shape == expected.shape
    assert y.stride() == expected.stride()
    assert y.dtype == operator.x.dtype
    error = (y.cpu().double() - expected).abs()
    assert (error <= RTOL[y.dtype] * magnitude).all(), f"{(error / magnitude).max():.2g} of the magnitude"


def is_small(layer):
    """Return whether the interpreter, which takes milliseconds for each tap of a tile, runs the layer. A GPU runs them all."""
    positions = layer["x"][0] * math.prod(output_size(layer))
    return not INTERPRETED or positions * math.prod(layer["weight"]) <= 150_000


CASES = {
    "layer": convolutions().filter(is_small),
    "dtype": st.sampled_from(DTYPES),
    "channels_last": st.booleans(),
    "with_residual": st.booleans(),
    "activation": st.sampled_from(["identity", "relu"]),
    "launch": st.sampled_from([None, SMALL]),
    "seed": st.integers(0, 2**31),
}


def geometry(layer):
    return {name: layer[name] for name in ("stride", "padding", "dilation", "groups")}


def random_convolution(layer, dtype, channels_last, with_bias):
    return Convolution(
        x=random_tensor(layer["x"], dtype, channels_last),
        weight=random_tensor(layer["weight"], dtype),
        bias=random_tensor(layer["weight"][:1], dtype) if with_bias else None,
        **geometry(layer),
    )


@runs_kernels
@settings(max_examples=20)
@given(outputs=st.sampled_from([1, 5, 37]), with_biases=st.booleans(), **CASES)
def test_conv_pointwise(layer, outputs, with_biases, dtype, channels_last, with_residual, activation, launch, seed):
    torch.manual_seed(seed)
    check(
        "conv_pointwise",
        random_convolution(layer, dtype, channels_last, with_biases),
        launch,
        pointwise_weight=random_tensor((outputs, layer["weight"][0]), dtype),
        pointwise_bias=random_tensor((outputs,), dtype) if with_biases else None,
        residual=random_tensor((layer["x"][0], outputs, *output_size(layer)), dtype) if with_residual else None,
        activation=activation,
    )


@runs_kernels
@settings(max_examples=20)
@given(with_bias=st.booleans(), with_tap_bias=st.booleans(), **CASES)
def test_conv_bordered(layer, with_bias, with_tap_bias, dtype, channels_last, with_residual, activation, launch, seed):
    torch.manual_seed(seed)
    outputs, _, *kernel = layer["weight"]
    check(
        "conv_bordered",
        random_convolution(layer, dtype, channels_last, with_bias),
        launch,
        tap_bias=random_tensor((outputs, *kernel), dtype) if with_tap_bias else None,
        residual=random_tensor((layer["x"][0], outputs, *output_size(layer)), dtype) if with_residual else None,
        activation=activation,
        counts=None,
    )


@runs_kernels
@settings(max_examples=12)
@given(
    shape=st.lists(st.sampled_from([1, 3, 7]), max_size=3),
    inputs=st.sampled_from([1, 20, 37]),
    hidden=st.sampled_from([1, 5, 37, 128]),
    outputs=st.sampled_from([1, 16, 37, 130]),
    with_biases=st.booleans(),
    **{name: CASES[name] for name in ("dtype", "with_residual", "activation", "seed")},
)
def test_linear_pair(shape, inputs, hidden, outputs, with_biases, dtype, with_residual, activation, seed):
    torch.manual_seed(seed)
    pair = LinearPair(
        x=random_tensor((*shape, inputs), dtype),
        weight1=random_tensor((hidden, inputs), dtype),
        bias1=random_tensor((hidden,), dtype) if with_biases else None,
        weight2=random_tensor((outputs, hidden), dtype),
        bias2=random_tensor((outputs,), dtype) if with_biases else None,
    )
    residual = random_tensor((*shape, outputs), dtype) if with_residual else None
    check("linear_pair", pair, residual=residual, activation=activation)


@runs_kernels
@settings(max_examples=10)
@given(**{name: CASES[name] for name in ("layer", "dtype", "channels_last", "with_residual", "launch", "seed")})
def test_counts_are_exact_and_added(layer, dtype, channels_last, with_residual, launch, seed):
    torch.manual_seed(seed)
    outputs, _, *kernel = layer["weight"]
    convolution = Convolution(
        x=small_integers(layer["x"], dtype, channels_last),
        weight=small_integers(layer["weight"], dtype),
        bias=small_integers((outputs,), dtype),
        **geometry(layer),
    )
    residual = small_integers((layer["x"][0], outputs, *output_size(layer)), dtype) if with_residual else None
    others = {"tap_bias": small_integers((outputs, *kernel), dtype), "residual": residual, "activation": "relu"}
    start = torch.randint(-(2**40), 2**40, (outputs, 3))
    counts, expected = start.to(DEVICE, copy=True), start.clone()
    run(launch_triton.conv_bordered, convolution, others, lambda tensor: tensor.to(DEVICE), counts=counts, launch=launch)
    reference.conv_bordered(convolution, **others, counts=expected)
    assert torch.equal(counts.cpu(), expected)


@runs_kernels
def test_nan_is_in_no_state():
    x = torch.tensor([-1.0, 0.0, 1.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 2.0]).view(2, 1, 2, 2).to(DEVICE)
    counts = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    y = conv_bordered(x, torch.ones(1, 1, 1, 1, device=DEVICE), None, activation="relu", counts=counts, impl="triton")
    assert counts.tolist() == [[2, 1, 3]]
    torch.testing.assert_close(y, x.relu(), rtol=0, atol=0, equal_nan=True)


ACTIVATIONS_WITHOUT_WEIGHT = [name for name in ACTIVATIONS if name != "prelu"]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS_WITHOUT_WEIGHT)
def test_activation_of_values_without_error(activation, dtype):
    x, ones = torch.arange(-60, 60).view(15, 8).to(dtype), torch.eye(8, dtype=dtype)
    parameters = tuple(ACTIVATIONS[activation].parameters.values())
    exact = activations.activate(x.double(), activation, parameters).to(dtype)
    placed, ones = x.to(DEVICE), ones.to(DEVICE)
    y = launch_triton.linear_pair(LinearPair(placed, ones, None, ones, None), None, activation)
    convolution = Convolution(placed[..., None, None], ones[..., None, None], None, (1, 1), (0, 0), (1, 1), 1)
    bordered = launch_triton.conv_bordered(convolution, None, None, activation, None)
    pointwise = launch_triton.conv_pointwise(convolution, ones, None, None, activation)
    for made in (y, bordered[..., 0, 0], pointwise[..., 0, 0]):
        torch.testing.assert_close(made.cpu(), exact, rtol=ACTIVATION_RTOL[dtype], atol=4e-7)


def views(dtype):
    """Images in memory layouts that the kernels read with strides or copy, by name."""
    images = random_tensor((3, 2 * 5, 7, 10), dtype)
    last = random_tensor((3, 10, 7, 10), dtype, channels_last=True)
    return {
        "channels of contiguous images": images[:, 3:8],
        "channels of channels-last images": last[:, 3:8],
        "a window": images[:, :5, 2:7, 3:9],
        "a window of channels-last images": last[:, :5, 2:7, 3:9],
        "every second column": images[:, :5, :, ::2],
        "every second image and channel": images[::2, ::2],
        "transposed": images[:, :5].mT,
        "expanded": images[:1, :5].expand(4, -1, -1, -1),
    }


@runs_kernels
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("view", views(torch.float32))
def test_views(view, depthwise):
    x = views(torch.float16)[view]
    weight = random_tensor((5, 1 if depthwise else 5, 2, 3), torch.float16, channels_last=True, gap=2)
    bias = random_tensor((5, 2), torch.float16)[:, 0]
    residual = random_tensor((x.shape[0], 5, x.shape[2] + 1, x.shape[3]), torch.float16, channels_last=True, gap=1)
    convolution = Convolution(x, weight, bias, (1, 1), (1, 1), (1, 1), 5 if depthwise else 1)
    others = {"residual": residual, "activation": "identity"}
    tap_bias, factors = random_tensor((5, 3, 2), torch.float16).mT, random_tensor((5, 5), torch.float16).T
    check("conv_bordered", convolution, tap_bias=tap_bias, **others, counts=None)
    check("conv_pointwise", convolution, pointwise_weight=factors, pointwise_bias=bias, **others)


@runs_kernels
def test_rows_with_gaps_and_a_slice_that_is_copied():
    memory = random_tensor((37, 50), torch.float32)
    weights = {
        "weight1": random_tensor((20, 40), torch.float32).T,
        "bias1": None,
        "weight2": random_tensor((9, 60), torch.float32)[:, 5:45],
        "bias2": None,
    }
    for x in (memory[:, 4:24], memory[:, 4:44:2]):
        check("linear_pair", LinearPair(x, **weights), residual=memory[:, 3:12], activation="identity")


@runs_kernels
@pytest.mark.parametrize("channels", [20, 21], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", ["dense", "depthwise"])
def test_every_line_of_launches(channels, dtype, groups):
    groups = 1 if groups == "dense" else channels
    x, weight = random_tensor((2, channels, 2, 5), dtype, True), random_tensor((channels, channels // groups, 1, 2), dtype)
    factors = random_tensor((channels, channels), dtype)
    convolution = Convolution(x, weight, None, (1, 1), (0, 1), (1, 1), groups)
    plain = {"residual": None, "activation": "identity"}
    check("conv_bordered", convolution, tap_bias=None, **plain, counts=None)
    check("conv_pointwise", convolution, pointwise_weight=factors, pointwise_bias=None, **plain)
    check("linear_pair", LinearPair(x[:, :, 0, 0], factors, None, factors, None), **plain)


@runs_kernels
def test_image_offsets_beyond_32_bits():
    memory = torch.empty(2**31 + 400, dtype=torch.bfloat16, device=DEVICE)  # a CPU has no memory for it until it is touched
    x = memory.as_strided((3, 4, 5, 5), (2**30 + 8, 25, 5, 1))
    x.copy_(small_integers(x.shape, torch.bfloat16))
    weight = small_integers((4, 4, 3, 3), torch.bfloat16).to(DEVICE)
    convolution = Convolution(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    y = launch_triton.conv_bordered(convolution, None, None, "identity", None)
    assert torch.equal(y, reference.conv_bordered(convolution._replace(x=x.clone()), None, None, "identity", None))


@runs_kernels
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_batch(channels_last):
    x = random_tensor((0, 3, 5, 5), torch.float32, channels_last).to(DEVICE)
    weight, factors = torch.randn(4, 3, 3, 3, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    convolution = Convolution(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
    pair = LinearPair(x[:, 0, 0, :4], factors.T @ factors, None, factors, None)
    assert launch_triton.conv_pointwise(convolution, factors, None, None, "relu").shape == (0, 2, 3, 3)
    assert launch_triton.conv_bordered(convolution, None, None, "relu", None).shape == (0, 4, 3, 3)
    assert launch_triton.linear_pair(pair, None, "relu").shape == (0, 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_other_than_the_current_one():
    x, ones = torch.randn(37, 5, device="cuda:1"), torch.eye(5, device="cuda:1")
    torch.testing.assert_close(launch_triton.linear_pair(LinearPair(x, ones, None, ones, None), None, "identity"), x)
