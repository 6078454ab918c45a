"""Statistics from before `isolate` are understood after it."""

import copy

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.surgery.site_names import named_as_now, names_since_isolation


class Twice(nn.Module):
    """Calls one module twice, and a function once."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.relu(self.second(self.relu(self.first(x)))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(Twice(), nn.Linear(3, 3), nn.GELU())


@pytest.fixture
def x():
    return torch.randn(50, 3, generator=torch.Generator().manual_seed(1))


def counted(model, x):
    with fe.collect(model) as collector, torch.no_grad():
        model(x)
    return collector.compute()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:.*calls 1 of its activations as functions")
def test_statistics_get_the_names_of_the_isolated_model(model, x, copied, wrapped):
    isolated = fe.isolate(model, (x,))
    if wrapped:
        model, isolated = nn.Sequential(model), nn.Sequential(isolated)
    if copied:
        isolated = copy.deepcopy(isolated)
    before, after = counted(model, x), counted(isolated, x)
    assert set(before) != set(after)
    renamed = named_as_now(before, isolated)
    assert list(renamed) == list(after)
    assert all(torch.equal(renamed[name].counts, after[name].counts) for name in after)
    assert named_as_now(after, isolated) is after
    assert named_as_now(before, model) is before


@pytest.mark.filterwarnings("ignore:.*calls 1 of its activations as functions")
def test_a_model_that_is_isolated_twice_knows_the_first_names(model, x):
    isolated = fe.isolate(fe.isolate(model, (x,)), (x,))
    assert list(named_as_now(counted(model, x), isolated)) == list(counted(isolated, x))
    assert names_since_isolation(model) is None


@pytest.mark.filterwarnings("ignore:.*calls 1 of its activations as functions")
def test_neurons_are_replaced_by_statistics_from_before(model, x):
    nn.init.constant_(model[0].first.bias, 100.0)
    statistics, isolated = counted(model, x), fe.isolate(model, (x,))
    expected = model(x)
    states = fe.linearize_neurons(isolated, statistics, min_observations=1)
    assert states["0.relu"].active == 0
    torch.testing.assert_close(isolated(x), expected)
