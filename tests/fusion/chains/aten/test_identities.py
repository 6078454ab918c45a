"""Operators that do nothing in eval mode end no chain."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.networks import Reads
from tests._helpers.operators import normal
from tests._helpers.reading import read_output

NOTHING = {
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "dropout of channels": lambda x: F.dropout2d(x, 0.5, training=False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "alpha dropout in place": lambda x: F.alpha_dropout(x, 0.5, training=False, inplace=True),
    "alpha dropout of channels": lambda x: F.feature_alpha_dropout(x, 0.5, training=False),
    "cast": lambda x: x.to(torch.float32),
    "cast by name": lambda x: x.float(),
    "copying cast": lambda x: x.to(torch.float32, copy=True),
    "cast to a device": lambda x: x.to(x.device),
    "cast to the type of itself": lambda x: x.type_as(x),
    "cast to another layout": lambda x: x.to(memory_format=torch.channels_last),
    "clone": lambda x: x.clone(),
    "expand": lambda x: x.expand(-1, -1, -1, -1),
    "expand to its sizes": lambda x: x.expand_as(x),
}


@pytest.mark.parametrize("name", NOTHING)
def test_chains_continue_through_operators_that_do_nothing(name):
    torch.manual_seed(0)
    layers = {"a": nn.Conv2d(4, 16, 1), "b": nn.Conv2d(16, 4, 1)}
    model = Reads(lambda m, x: m.b(NOTHING[name](m.a(x))), **layers).eval()
    fused = fe.fuse(model, (torch.randn(2, 4, 5, 7),), measure=False)
    assert [(chain.names, chain.choice) for chain in fused.report.chains] == [(("a", "b"), "merge")]
    calls = [str(node.target) for node in fused.graph_module.graph.nodes if node.op == "call_function"]
    order = ("aten.permute.default", "aten.contiguous.default")  # give the output the strides of the model's
    assert [call for call in calls if call not in order] == ["aten.conv2d.default"]
    x = torch.randn(3, 4, 5, 7)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.dropout(x, 0.5, training=True),
        lambda m, x: F.alpha_dropout(x, 0.5, training=True),
        lambda m, x: F.feature_alpha_dropout(x, 0.5, training=True),
        lambda m, x: x.to(torch.float32),
        lambda m, x: x.half(),
        lambda m, x: x.to(torch.complex128),
    ],
)
def test_operators_that_change_values_are_not_read(function):
    assert read_output(function, normal(3, 4, 5, 7, seed=0))[0] == ()


def test_inputs_of_another_dtype_are_refused():
    """A cast at the beginning is left out of a chain, but not the check of the dtype that comes with it."""
    layers = {"a": nn.Linear(4, 16), "b": nn.Linear(16, 4)}
    model = Reads(lambda m, x: m.b(m.a(x.float())), **layers).eval()
    fused = fe.fuse(model, (torch.randn(2, 4),), measure=False)
    with pytest.raises(RuntimeError):
        fused(torch.randn(2, 4, dtype=torch.float64))
