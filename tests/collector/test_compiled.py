"""Models that are compiled by torch.compile or TorchScript before or while they are counted."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import collect
from tests._helpers.networks import make_part
from tests._helpers.snapshots import assert_unchanged, snapshot
from tests._helpers.statistics import counted

pytestmark = pytest.mark.slow  # the first compilation of a process imports for seconds


@pytest.mark.parametrize("which", ["the compiled module", "the model inside", "module.compile()"])
def test_a_model_compiled_before_is_counted(which):
    model = make_part()
    x = torch.randn(7, 3)
    if which == "module.compile()":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    with collect(model if which == "the model inside" else compiled) as collector:
        assert torch.equal(compiled(x), expected)
        compiled(x)
    assert counted(collector) == {"1": 2 * 28, "2.1": 2 * 35}
    compiled(x)
    assert counted(collector) == {"1": 2 * 28, "2.1": 2 * 35}


def test_a_model_compiled_meanwhile_is_not_counted_afterwards():
    model, x = make_part(), torch.randn(7, 3)
    with collect(model) as collector:
        compiled = torch.compile(model, backend="eager")
        compiled(x)
    before = counted(collector)
    assert before == {"1": 28, "2.1": 35}
    assert torch.equal(compiled(x), model(x))
    assert counted(collector) == before


class Root(nn.Module):
    """Everything that a pass of the root decides: functional calls, repeated calls, padding."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x, attention_mask=None):
        return F.relu(self.b(self.act(self.a(self.act(x)))))


@pytest.mark.filterwarnings("ignore:.*fe.isolate")
@pytest.mark.parametrize("given", ["outside", "inside"])
def test_the_root_of_a_compiled_model_makes_the_same_pass(given):
    model, x = Root(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager")
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    compiled(x, attention_mask=mask)
    with collect(compiled if given == "outside" else model) as collector:
        compiled(x, attention_mask=mask)
    assert counted(collector) == {"act": 48, "act:1": 48, "relu": 48}


@pytest.mark.filterwarnings("ignore:.*fe.isolate")
def test_a_forward_that_is_called_without_the_module_is_a_pass():
    model = Root()
    with collect(model) as collector:
        model.forward(torch.randn(2, 8))
    assert counted(collector) == {"act": 16, "act:1": 16, "relu": 16}


def test_attaching_warns_of_nothing_and_changes_nothing():
    model = torch.compile(make_part(), backend="eager")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collect(model):
            pass
    assert_unchanged(model, before)


def test_compiled_code_runs_again_after_two_collectors():
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    function = torch.compile(lambda x: F.relu(x) + 1, backend=backend)
    first, second = collect(make_part()), collect(make_part())
    first.attach()
    second.attach()
    first.detach()
    function(torch.ones(2))
    assert not runs
    second.detach()
    function(torch.ones(2))
    assert runs


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_activations_in_torchscript_are_refused():
    with pytest.raises(ValueError, match="'0' is compiled by TorchScript"):
        collect(nn.Sequential(torch.jit.script(make_part()))).attach()
