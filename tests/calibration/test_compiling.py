"""The repeated layers of a model are compiled in place, and the others are not."""

import pytest
import torch
from torch import nn

from fastentropy.calibration.compiling import compile_layers


class Layer(nn.Module):
    """A layer with a residual."""

    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Linear(4, 4), nn.GELU()

    def forward(self, x):
        return x + self.act(self.a(x))


class Model(nn.Module):
    """An embedding, a list of layers, and a small list of others."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return [head(x) for head in self.heads]


@pytest.fixture(autouse=True)
def inference():
    """No gradients are recorded, as in a calibration."""
    with torch.inference_mode():
        yield


@pytest.fixture
def graphs():
    """A backend that keeps the graphs that it compiles, in the list `graphs`."""

    def backend(graph, inputs):
        backend.graphs.append(graph)
        return graph.forward

    backend.graphs = []
    yield backend
    torch.compiler.reset()


def test_largest_list_of_layers_is_compiled_once(graphs):
    model, x = Model().eval(), torch.randn(3, 4)
    expected, names = model(x), list(model.state_dict())
    assert compile_layers(model, backend=graphs) == 5
    for actual, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert list(model.state_dict()) == names
    assert len(graphs.graphs) == 1
    assert not any("heads" in str(graph.graph) for graph in graphs.graphs)


@pytest.mark.parametrize("model", [nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2), nn.ReLU())])
def test_model_without_repeated_layers_is_compiled_as_a_whole(graphs, model):
    assert compile_layers(model, backend=graphs) == 1
    model(torch.randn(3, 4))
    assert len(graphs.graphs) == 1
