"""The oracle of test_architectures: what it sees, and that a comparison with it notices what it should."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN, gelu

from fastentropy import SiteStatistics, Statistics
from tests._helpers.counts import plain_counts
from tests._helpers.networks import Reads
from tests._helpers.oracle import PATCHED, neuron_axis, recorded_calls
from tests._helpers.statistics import assert_same_counts


@pytest.fixture
def recorded(network, images):
    """The calls of the small network of conftest: relu1, relu2, gelu."""
    return recorded_calls(network.eval(), lambda: network(images))


def statistics_of(calls):
    return Statistics({call.name: SiteStatistics("relu", call.counts.clone()) for call in calls})


def test_the_calls_themselves_pass(recorded):
    assert [call.name for call in recorded] == ["relu1", "relu2", "gelu"]
    assert [call.axis for call in recorded] == [1, 1, 1]
    assert_same_counts(statistics_of(recorded), recorded)


@pytest.mark.parametrize("missed", [0, 1, 2])
def test_a_missed_call_is_noticed(recorded, missed):
    with pytest.raises(AssertionError):
        assert_same_counts(statistics_of(recorded[:missed] + recorded[missed + 1 :]), recorded)


def test_a_call_too_many_is_noticed(recorded):
    with pytest.raises(AssertionError):
        assert_same_counts(statistics_of(recorded), recorded[:-1])


def test_another_order_is_noticed(recorded):
    with pytest.raises(AssertionError):
        assert_same_counts(statistics_of(recorded[::-1]), recorded)


def test_one_value_counted_otherwise_is_noticed(recorded):
    statistics = statistics_of(recorded)
    statistics["relu2"].counts[0] += torch.tensor([1, 0, -1])
    with pytest.raises(AssertionError, match="relu2"):
        assert_same_counts(statistics, recorded)


def test_a_wrong_axis_of_the_same_size_is_noticed(recorded, network, images):
    x = network.bn1(network.conv1(torch.cat([images, images[:, :, :1]], dim=2)))  # 6 channels, 6 rows
    calls = [replace(recorded[0], counts=plain_counts(x, 1))]
    assert_same_counts(statistics_of(calls), calls)
    with pytest.raises(AssertionError):
        assert_same_counts(statistics_of([replace(recorded[0], counts=plain_counts(x, 2))]), calls)


def test_an_axis_that_cannot_be_told_is_an_error():
    with pytest.raises(AssertionError, match="several axes"):
        neuron_axis(torch.zeros(2, 6, 6), 6)
    with pytest.raises(AssertionError, match="no axis"):
        neuron_axis(torch.zeros(2, 6, 6), 5)
    assert neuron_axis(torch.zeros(6, 7, 6), 6) == 2  # as many examples as channels
    assert neuron_axis(torch.zeros(2, 7, 6), 12) == 2  # half of a gate


def test_inputs_are_counted_before_they_are_overwritten():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = torch.randn(50, 3)
    (call,) = recorded_calls(model, lambda: model(x))
    assert torch.equal(call.counts, plain_counts(model[0](x), 1))
    assert call.counts[:, 0].sum() > 0


def names_of_calls(forward, **modules):
    """The names of the calls in a network's forward, which is given the output of a linear layer."""
    model = Reads(lambda self, x: forward(self, self.fc(x)), fc=nn.Linear(3, 4), **modules)
    return [call.name for call in recorded_calls(model, lambda: model(torch.randn(5, 3)))]


def test_repeated_calls_are_numbered():
    assert names_of_calls(lambda self, x: self.act(self.act(x)), act=nn.ReLU()) == ["act", "act:1"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: F.relu(x), "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: torch.relu(x), "relu"),
        (lambda x: torch.relu_(x), "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.relu_(), "relu"),
        (lambda x: F.hardtanh_(x), "hardtanh"),
        (lambda x: F.relu6(input=x), "relu6"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu"),
        (lambda x: F.leaky_relu(x, 0.1, inplace=True), "leaky_relu"),
    ],
)
def test_functions_are_named_after_the_module_that_calls_them(function, name):
    inner = Reads(lambda self, x: function(x))
    assert names_of_calls(lambda self, x: function(self.inner(x)), inner=inner) == [f"inner.{name}", name]


def test_a_function_called_like_a_module_has_no_name():
    assert names_of_calls(lambda self, x: F.relu(self.relu(x)), relu=nn.ReLU()) == ["relu", None]


def test_what_an_activation_calls_is_not_counted_again():
    modules = {name: ACT2FN[name] for name in ("gelu_10", "relu2", "mish", "gelu_new", "quick_gelu", "silu")}
    assert names_of_calls(lambda self, x: [m(x) for m in self.children() if m is not self.fc], **modules) == list(modules)


def test_a_module_that_the_model_does_not_own_is_seen():
    assert names_of_calls(lambda self, x: gelu(x)) == [None]


@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softmax, nn.Identity])
def test_others_are_no_rectifiers(kind):
    assert names_of_calls(lambda self, x: self.act(x), act=kind()) == []


def test_everything_is_put_back_after_an_exception():
    before = [nn.Module.__call__, *(getattr(owner, name) for owner, name in PATCHED)]

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded_calls(nn.ReLU(), fail)
    assert [nn.Module.__call__, *(getattr(owner, name) for owner, name in PATCHED)] == before
    assert "relu" not in vars(torch.Tensor)
