"""The report says why nothing was fused, and what the model runs instead."""

import pytest
import torch
from torch import nn

from fastentropy import FusionReport, fuse
from tests._helpers.networks import Reads


def only_note(model, *inputs):
    """The only note of the report on a model that has no chain."""
    report = fuse(model.eval(), inputs, measure=False).report
    assert report.chains == ()
    (note,) = report.notes
    assert note in str(report)
    assert FusionReport.from_dict(report.to_dict()) == report
    return note


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.ReLU(), "the model runs aten.relu"),
        (nn.Sequential(nn.Softmax(-1), nn.ReLU(), nn.ReLU()), "the model runs aten.relu, aten.softmax"),
        (Reads(lambda m, x: x), "the model runs no operator"),
        (Reads(lambda m, x: x @ x.mT), "the model runs aten.mT, aten.matmul"),
    ],
)
def test_no_linear_operator(model, text):
    found = only_note(model, torch.randn(2, 4))
    assert found == f"nothing to fuse: no convolution or linear layer with constant weights; {text}"


def test_linear_operators_that_stand_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    assert only_note(model, torch.randn(2, 4)) == (
        "nothing to fuse: no chain of two linear operators: 0 is followed by aten.gelu in 1, 2 is followed by aten.relu in 3, "
        "4 is followed by aten.tanh in 5, and so on for 1 more; fe.linearize takes activations out of the way"
    )


def test_views_are_skipped():
    model = Reads(lambda m, x: (m.a(x).unflatten(-1, (2, 2)).sin(), m.b(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    text = only_note(model, torch.randn(2, 4))
    assert "a is followed by aten.sin, b is followed by the output;" in text


def test_nothing_is_said_where_a_chain_is():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    assert fuse(model, (torch.randn(2, 4),), measure=False).report.notes == ()
