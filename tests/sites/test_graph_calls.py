"""The calls of activations in graphs of Dynamo."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import _compat
from fastentropy.sites.graph_calls import GraphTracer
from fastentropy.sites.modules import WatchedModules

pytestmark = pytest.mark.slow


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Linear(4, 4), nn.PReLU()

    def forward(self, x):
        return self.act(F.relu(self.act(self.a(x))))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(Part(), nn.Dropout(), Part())

    def forward(self, x):
        return F.gelu(self.parts(x)).relu_()


def traced(model, x, others=()):
    """The tracer of the graph of a model."""
    torch._dynamo.reset()
    tracer = GraphTracer(WatchedModules(model, None), "", others)

    def backend(graph, inputs):
        tracer.follow(graph.graph)
        tracer.finish()
        return graph.forward

    torch.compile(model, backend=backend, fullgraph=True)(x)
    return tracer


def test_calls_and_what_ran_before_them():
    tracer = traced(Whole().eval(), torch.randn(2, 4))
    assert [(call.path, call.function, call.activation, call.producer) for call in tracer.calls] == [
        ("parts.0.act", "", "prelu", "parts.0.a"),
        ("parts.0", "relu", "relu", "parts.0.act"),
        ("parts.0.act", "", "prelu", "parts.0.act"),
        ("parts.2.act", "", "prelu", "parts.2.a"),
        ("parts.2", "relu", "relu", "parts.2.act"),
        ("parts.2.act", "", "prelu", "parts.2.act"),
        ("", "gelu", "gelu", "parts"),
        ("", "relu", "relu", "parts"),
    ]
    assert tracer.producer == "parts"
    assert all(call.x.meta["example_value"].shape == (2, 4) for call in tracer.calls)


def test_modules_of_another_watcher_are_refused():
    model = Whole().eval()
    with pytest.raises(Exception, match="another collector is attached"):
        traced(model, torch.randn(2, 4), {id(model.parts[0])})


def test_a_refusal_says_why():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.RNNCell(4, 4, nonlinearity="relu")

        def forward(self, x):
            return self.cell(x)

    with pytest.raises(Exception, match="rnn_relu_cell hides the activations") as caught:
        traced(Cell(), torch.randn(2, 4))
    assert isinstance(caught.value.inner_exception, _compat.UncountableGraphError)
