"""Means and sums over axes are read in the dtype of their operand, and as chains they compute the same."""

import pytest
import torch
from torch import nn

from fastentropy.fusion.chains.aten import read_reduction
from tests._helpers.networks import Holder, Reads
from tests.fusion.chains.test_finding import assert_computes, traced


@pytest.mark.parametrize(
    ("function", "axes", "is_mean"),
    [
        (lambda x: x.mean((2, 3)), (2, 3), True),
        (lambda x: x.mean((-1, -3), keepdim=True), (1, 3), True),
        (lambda x: x.mean(1), (1,), True),
        (lambda x: x.sum((3, 2)), (2, 3), False),
        (lambda x: x.sum(-1, keepdim=True), (3,), False),
    ],
)
def test_a_reduction_has_the_axes_of_its_operator(function, axes, is_mean):
    graph = torch.export.export(Holder(lambda m, x: function(x)), (torch.randn(2, 3, 4, 5),)).graph
    (reduction,) = filter(None, map(read_reduction, graph.nodes))
    assert (reduction.operand.op, reduction.axes, reduction.is_mean) == ("placeholder", axes, is_mean)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(),
        lambda x: x.sum(),
        lambda x: x.mean((2, 3), dtype=torch.float64),
        lambda x: x.sum(1, dtype=torch.float64),
        lambda x: x.amax((2, 3)),
        lambda x: x.median(3).values,
        lambda x: x.std((2, 3)),
    ],
)
def test_other_reductions_are_not_read(function):
    graph = torch.export.export(Holder(lambda m, x: function(x)), (torch.randn(2, 3, 4, 5),)).graph
    assert not any(map(read_reduction, graph.nodes))


@pytest.mark.parametrize("convolution", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("name", ["mean", "sum"])
def test_reductions_of_all_positions(convolution, name):
    model = Reads(lambda m, x: m.l(getattr(m.a(x), name)(tuple(range(2, x.ndim)))), a=convolution(4, 5, 3), l=nn.Linear(5, 3))
    x = torch.randn(2, 4, *range(5, 5 + model.a.weight.ndim - 2))
    (chain,) = assert_computes(traced(model, x), x)
    assert chain.names == ("a", "l")
