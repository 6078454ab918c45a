"""Linear neurons get a path of their own, which is exact, and only where it is faster."""

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.fusion import path_choice
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.neurons.cutting import Following
from fastentropy.fusion.neurons.paths import linear_paths
from fastentropy.fusion.path_choice import split_linear_paths
from fastentropy.fusion.tracing import export, prepared_module
from tests._helpers.fusing import assert_equal
from tests._helpers.neuronwise_networks import images, neuronwise


def traced(model, x):
    """Return the trace of a model."""
    return prepared_module(export(model.eval(), Inputs((x,))))


def fused(model, x, **options):
    """Return a fused model, after comparing what it computes."""
    network = fe.fuse(model.eval(), (x,), measure=False, **options)
    assert network.report.choice == "fused"
    for batch in (1, 2, 5):
        assert_equal(network, model, torch.randn(batch, *x.shape[1:]))
    return network


@pytest.mark.parametrize(("linear", "is_split"), [(9, True), (8, False)])
def test_a_path_pays_as_one_operator_of_fewer_multiplications(linear, is_split):
    # n · (d_in + d_out) multiplications against d_in · d_out
    model = nn.Sequential(nn.Linear(33, 30), neuronwise("l" * linear + "a" * (30 - linear)), nn.Linear(30, 12))
    assert (linear * (33 + 12) > 33 * 12) == is_split
    network = fused(model, torch.randn(4, 33))
    assert network.report.neurons["1"]["split"] == linear * is_split
    assert [(chain.names, chain.choice) for chain in network.report.chains] == [(("0", "2"), "merge")] * is_split


def test_a_path_of_convolutions_is_exact_at_the_border():
    activation = images("l" * 12 + "aacc", values=[0.5] * 16)
    model = nn.Sequential(nn.Conv2d(2, 16, 1), activation, nn.Conv2d(16, 3, 3, padding=1))
    network = fused(model, torch.randn(2, 2, 7, 6))
    assert network.report.neurons["1"] == {"active": 2, "linear": 12, "constant": 2, "cut": 2, "split": 12}


def test_a_path_goes_on_through_depthwise_operators_and_further_activations():
    norm, depthwise = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    layers = nn.Conv2d(2, 8, 1), images("llllllaa", nn.ReLU6()), depthwise, norm, images("lllllala"), nn.Conv2d(8, 3, 1)
    network = traced(nn.Sequential(*layers), torch.randn(2, 2, 6, 5))
    (path,) = linear_paths(Following(network))
    assert path.count == 5
    assert [node.target for node in path.sources] == ["input"]
    x = torch.randn(3, 2, 6, 5)
    torch.testing.assert_close(split_all(network)(x), network(x), rtol=1e-5, atol=1e-5)


def split_all(network):
    """Return a graph with all of its linear paths, whether they are faster or not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_choice, "_is_promising", lambda *arguments: True)
        return split_linear_paths(network, Inputs(()), None, measure=False)[0]


class Twice(nn.Module):
    """Read the neurons of an activation in two layers, or add them to something."""

    def __init__(self, states, read):
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(3, 6), neuronwise(states), nn.Linear(6, 6)
        self.other, self.read = nn.Linear(6, 6), read

    def forward(self, x):
        y = self.activation(self.first(x))
        return self.read(y, self.last, self.other)


@pytest.mark.parametrize(
    "read",
    [
        lambda y, last, other: last(y) + other(y),
        lambda y, last, other: last(y) + y,
        lambda y, last, other: last(y.sigmoid()) + other(torch.ones_like(y)),
        lambda y, last, other: last(y * y),
        lambda y, last, other: last(other(y).relu() + y),
    ],
    ids=["two layers", "output", "sigmoid", "square", "sum"],
)
def test_neurons_that_others_need_stay(read):
    network = traced(Twice("lllaaa", read), torch.randn(4, 3))
    assert not list(linear_paths(Following(network)))


def test_a_branch_that_is_constant_in_other_neurons():
    def read(y, last, other):
        return last(neuron(other(y)) + y)

    neuron = neuronwise("lllcca")
    model = Twice("cccala", read)
    x = torch.randn(4, 3)
    network = traced(model, x)
    assert [path.count for path in linear_paths(Following(network))] == [3]
    torch.testing.assert_close(split_all(network)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("faster", [False, True])
def test_measured_times_decide(faster, monkeypatch):
    times = {0: 1.0, 1: 0.97 if faster else 0.99}
    monkeypatch.setattr(path_choice, "measure_times", lambda calls, **options: {key: times[key] for key in calls})
    model = nn.Sequential(nn.Linear(8, 30), neuronwise("l" * 20 + "a" * 10, nn.GELU()), nn.Linear(30, 8)).eval()
    fused = fe.fuse(model, (torch.randn(4, 8),))
    assert fused.report.neurons["1"]["split"] == 20 * faster
    assert_equal(fused, model, torch.randn(5, 8))


def test_hopeless_paths_are_not_measured(monkeypatch):
    monkeypatch.setattr(path_choice, "measure_times", lambda *arguments, **options: pytest.fail("measured"))
    model = nn.Sequential(nn.Linear(30, 30), neuronwise("l" * 2 + "a" * 28), nn.Linear(30, 30)).eval()
    assert fe.fuse(model, (torch.randn(4, 30),)).report.neurons["1"]["split"] == 0


class Viewed(nn.Module):
    """Read the features of an image, whose shape depends on the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.activation, self.last = nn.Conv2d(2, 8, 1), images("lllllaac"), nn.Linear(8 * 6, 3)

    def forward(self, x):
        return self.last(self.activation(self.first(x)).view(x.shape[0], -1))


def test_sizes_are_no_values_of_a_path(monkeypatch):
    monkeypatch.setattr(path_choice, "_is_promising", lambda *arguments: True)
    monkeypatch.setattr(path_choice, "measure_times", lambda calls, **options: dict.fromkeys(calls, 1.0))
    model = Viewed().eval()
    fused = fe.fuse(model, (torch.randn(4, 2, 3, 2),))
    assert fused.report.neurons["activation"] == {"active": 2, "linear": 5, "constant": 1, "cut": 1, "split": 0}
    assert_equal(fused, model, torch.randn(5, 2, 3, 2))


class Block(nn.Module):
    """A residual block in which a neuron is constant between two layers, and linear around them."""

    def __init__(self):
        super().__init__()
        self.first, self.before, self.depthwise = nn.Conv2d(2, 4, 1), images("lala"), nn.Conv2d(4, 4, 1, groups=4)
        self.between, self.second, self.last = images("caaa"), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.after = images("llaa")

    def forward(self, x):
        y = self.before(self.first(x))
        return self.last(self.after(y + self.second(self.between(self.depthwise(y)))))


def test_a_path_around_a_layer_that_does_not_need_it(monkeypatch):
    network = traced(Block(), torch.randn(2, 2, 3, 2))
    assert [path.count for path in linear_paths(Following(network))] == [1]
    x = torch.randn(3, 2, 3, 2)
    torch.testing.assert_close(split_all(network)(x), network(x), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(path_choice, "_is_promising", lambda *arguments: True)
    fused = fe.fuse(Block().eval(), (x,))
    assert sum(states["split"] for states in fused.report.neurons.values()) == 0  # the part is not one of values of full width
