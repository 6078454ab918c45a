"""Normalisation by running statistics, and products with constants, scale and shift channels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastentropy as fe
from tests._helpers.networks import Reads
from tests._helpers.operators import SEEDS, close, normal
from tests._helpers.reading import read_output

NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def trained(norm, seed):
    """Give a norm random statistics and weights."""
    generator = torch.Generator().manual_seed(seed)
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(0.5, 2, generator=generator)
    if norm.affine:
        nn.init.normal_(norm.weight, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    return norm.eval()


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(1, 3), st.booleans(), SEEDS)
def test_instance_norm_with_running_statistics(axes, affine, seed):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    norm = trained(NORMS[axes - 1](6, affine=affine, track_running_stats=True), seed)
    model = nn.Sequential(convolution(4, 6, 3, padding=1), norm, convolution(6, 3, 1)).eval()
    size = [5, 7, 3][:axes]
    fused = fe.fuse(model, (torch.randn(2, 4, *size),), measure=False)
    assert [chain.names for chain in fused.report.chains] == [("0", "2")]
    calls = [str(node.target) for node in fused.graph_module.graph.nodes if node.op == "call_function"]
    assert calls == [f"aten.conv{axes}d.default"]
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, *size)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def test_instance_norm_of_the_sample_is_not_read():
    model = Reads(lambda m, x: m.norm(x), norm=nn.InstanceNorm2d(4)).double().eval()
    assert read_output(lambda _, x: model.norm(x), normal(3, 4, 5, 7, seed=0))[0] == ()


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.addcmul(m.v, x, m.w),
        lambda m, x: torch.addcmul(m.v, m.w, x, value=-2.0),
        lambda m, x: torch.addcmul(x, m.v, m.w, value=3),
        lambda m, x: torch.addcmul(m.v, x, m.one),
        lambda m, x: torch.addcmul(m.one, x, m.w),
        lambda m, x: torch.lerp(x, m.v, 0.3),
        lambda m, x: torch.lerp(m.v, x, 0.3),
        lambda m, x: x * m.v.expand(x.shape[0], -1, -1, -1),
        lambda m, x: x - m.v.expand_as(x),
    ],
)
def test_products_with_constants_are_read(function):
    x = normal(3, 4, 5, 7, seed=0)
    constants = {"v": normal(1, 4, 1, 1, seed=1), "w": normal(4, 1, 1, seed=2), "one": normal(1, seed=3)}
    (affine,), expected = read_output(function, x, **constants)
    close(affine.build(2)(x), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.addcmul(x, x, m.v),
        lambda m, x: torch.addcmul(m.v, x, x),
        lambda m, x: torch.addcmul(m.v, x, m.map),
        lambda m, x: torch.addcmul(m.map, x, m.v),
        lambda m, x: x * m.map.expand(x.shape[0], 4, -1, -1),
    ],
)
def test_other_products_are_not_read(function):
    constants = {"v": normal(1, 4, 1, 1, seed=1), "map": normal(1, 1, 5, 7, seed=2)}
    assert read_output(function, normal(3, 4, 5, 7, seed=0), **constants)[0] == ()


@pytest.mark.slow
def test_a_fused_network_is_fused_again():
    """A batch norm that is not folded becomes one operator, which the next fusion must read."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()).eval()
    model[0].running_mean.normal_()
    fused = fe.fuse(model, (torch.randn(2, 4, 5, 7),), measure=False)
    again = fe.fuse(fused, (torch.randn(2, 4, 5, 7),), measure=False)
    assert len(again.report.chains) == len(fused.report.chains) == 1
    x = torch.randn(3, 4, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
