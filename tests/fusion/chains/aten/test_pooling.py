"""Sums and means over positions, and pools whose `ceil_mode` changes nothing, are affine."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastentropy as fe
from fastentropy.fusion.chains import compile_chain, find_chains
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, prepared_module
from tests._helpers.networks import Reads
from tests._helpers.operators import SEEDS, close, normal
from tests._helpers.reading import read_output


@pytest.mark.parametrize(
    ("function", "shape", "flattens"),
    [
        (lambda m, x: x.sum((2, 3)), (2, 3, 4, 5), True),
        (lambda m, x: x.sum((-1, -2), keepdim=True), (2, 3, 4, 5), False),
        (lambda m, x: x.sum(3, keepdim=True), (2, 3, 4, 5), False),
        (lambda m, x: x.sum(2), (2, 3, 7), True),
        (lambda m, x: x.sum((2, 3, 4)), (2, 3, 4, 5, 2), True),
        (lambda m, x: x.mean(2, keepdim=True), (2, 3, 4, 5), False),
        (lambda m, x: x.mean((2, 4), keepdim=True), (2, 3, 4, 5, 2), False),
    ],
)
def test_sums_and_means_are_read(function, shape, flattens):
    x = normal(*shape, seed=0)
    (affine,), expected = read_output(function, x)
    assert (affine.axes, affine.flattens) == (len(shape) - 2, flattens)
    close(affine.build(affine.axes)(x).reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.sum(3),
        lambda m, x: x.sum(1),
        lambda m, x: x.sum((1, 2, 3)),
        lambda m, x: x.sum((2, 3), dtype=torch.float32),
        lambda m, x: x.mean(3),
    ],
)
def test_other_sums_are_not_read(function):
    assert read_output(function, normal(3, 4, 5, 7, seed=0))[0] == ()


@settings(max_examples=40)
@given(st.integers(1, 3), st.data())
def test_pools_are_read_where_ceil_mode_changes_nothing(axes, data):
    x = normal(2, 3, *(data.draw(st.integers(2, 7)) for _ in range(axes)), seed=data.draw(SEEDS))
    kernel, stride = ([data.draw(st.integers(1, 3)) for _ in range(axes)] for _ in range(2))
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    assume(all(n >= k for n, k in zip(x.shape[2:], kernel, strict=True)))
    assume(max(kernel) > 1 or max(stride) > 1)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    read, expected = read_output(lambda m, x: pool(x, kernel, stride, padding, ceil_mode=True), x)
    if expected.shape == pool(x, kernel, stride, padding).shape:
        close(read[0].build(axes)(x), expected)
    else:
        assert read == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.sum((2, 3)) / 35,
        lambda x: x.sum((2, 3), keepdim=True).flatten(1),
        lambda x: F.avg_pool2d(x, (5, 7), ceil_mode=True).flatten(1),
        lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True).flatten(1),
        lambda x: x.sum(2, keepdim=True).mean(3, keepdim=True).flatten(1),
    ],
)
def test_layers_behind_sums_are_merged(pool):
    torch.manual_seed(0)
    model = Reads(lambda m, x: m.b(pool(m.a(x))), a=nn.Conv2d(4, 16, 3, padding=1), b=nn.Linear(16, 3)).eval()
    fused = fe.fuse(model, (torch.randn(2, 4, 5, 7),), measure=False)
    assert [chain.names for chain in fused.report.chains] == [("a", "b")]
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 4, 5, 7)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_sums_run_as_sums():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1)).double().eval()
    summed = Reads(lambda m, x: m.body(x).sum((2, 3), keepdim=True), body=model)
    x = normal(2, 4, 5, 7, seed=0)
    (chain,) = find_chains(prepared_module(export(summed, Inputs((x,)))))
    compiled = compile_chain(chain.elements, x)
    targets = [str(node.target) for node in compiled.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv2d.default", "aten.conv2d.default", "aten.sum.dim_IntList"]
    close(compiled(x), summed(x))
