"""With the granularity "neuron", each step replaces the neurons of lowest entropy in the whole network."""

import copy
import math

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.pruning.neurons import next_neurons
from fastentropy.pruning.options import Options
from tests._helpers.snapshots import assert_unchanged, snapshot
from tests.pruning.test_api import DATA, InterruptedRun, calibrate, evaluate, run, train

OPTIONS = {"granularity": "neuron", "per_step": 20}


def draw(activation=nn.ReLU):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        activation(),
        nn.Conv2d(6, 7, 3),
        activation(),
        nn.Flatten(),
        nn.Linear(7, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    )
    with torch.no_grad():
        for index, spread in ((0, 1), (2, 1), (5, 1)):
            model[index].bias += torch.randn(model[index].bias.shape) * spread
    return model.eval()


def options(**given):
    defaults = dict.fromkeys(("max_removed", "target_speedup", "max_latency_ms", "collapse"))
    fixed = {"max_drop": 1, "per_step": 1, "criterion": "entropy", "zeros_together": False, "protect": (), "zero": "discard"}
    return Options(**{**defaults, **fixed, "average": "dataset", "granularity": "neuron", **given})


def counted(model):
    with torch.no_grad(), fe.collect(model) as collector:
        calibrate(model)
    return collector.compute()


def masked(model, steps):
    """The network with masks in plain PyTorch: a function of its input."""
    linear, constant = {}, {}
    for step in steps:
        for name in step.removed:
            linear[name] = torch.ones_like(linear[name]) if name in linear else torch.tensor(True)
        for name, neurons in step.neurons.items():
            for masks, indices in ((linear, neurons.linear), (constant, neurons.constant)):
                masks.setdefault(name, torch.zeros(neurons.neurons, dtype=torch.bool))[list(indices)] = True

    def forward(x):
        for name, layer in model.named_children():
            if name in linear:
                shape = [-1] + [1] * (x.ndim - 2)
                on, off = (masks.get(name, torch.tensor(False)).view(shape) for masks in (linear, constant))
                x = torch.where(on, x, torch.where(off & ~on, 0, torch.relu(x)))
            else:
                x = layer(x)
        return x

    return forward


def test_lowest_entropies_of_all_sites():
    model = draw()
    statistics = counted(model)
    names, neurons = next_neurons(model, statistics, options(per_step=30))
    entropies = [(float(bits), name, index) for name, site in statistics.items() for index, bits in enumerate(site.entropy())]
    count = math.ceil(0.3 * len(entropies))
    expected = {(name, index) for _, name, index in sorted(entropies, key=lambda entry: entry[0])[:count]}
    assert names == ()
    assert {(name, i) for name, each in neurons.items() for i in each.linear + each.constant} == expected
    for name, each in neurons.items():
        off, _, on = statistics[name].counts.unbind(1)
        assert all(on[index] > off[index] for index in each.linear)
        assert all(on[index] <= off[index] for index in each.constant)


def test_each_step_evaluates_the_network_with_masks():
    model, seen = draw(), []

    def record(model):
        seen.append(copy.deepcopy(model))
        return 1.0

    result = run(model, evaluate=record, **OPTIONS)
    assert len(result.steps) == 6  # 20 % of the neurons each
    for index, trained in enumerate(seen):
        plain = draw()
        weights = {name: value for name, value in trained.state_dict().items() if name in plain.state_dict()}
        plain.load_state_dict(weights)
        torch.testing.assert_close(trained.eval()(DATA), masked(plain, result.steps[: index + 1])(DATA))
    for name, module in result.model.named_modules():
        assert not isinstance(module, nn.ReLU) or name.endswith(".activation")
        assert not isinstance(module, fe.NeuronwiseActivation) or not module.active.any()


def test_a_site_of_linear_neurons_is_a_removed_activation():
    model = draw()
    with torch.no_grad():
        model[2].bias += 100
    result = run(model, train=lambda model: None, evaluate=lambda model: 1.0, **OPTIONS)
    assert "3" in result.removed
    assert isinstance(result.model[3], nn.Identity)


def test_result_prints_how_many_neurons_were_replaced():
    result = run(draw(), **OPTIONS, evaluate=lambda model: 1.0, train=lambda model: None)
    step = result.steps[1]
    others = [site for name, site in step.neurons.items() if name not in step.removed]
    neurons = sum(len(site.linear) + len(site.constant) for site in others)
    assert f"{neurons} neurons of {len(others)} activation" in str(result)
    assert f"{len(result.removed)} of 3 activations removed" in str(result)


def test_activations_that_are_not_close_to_0_lose_only_neurons_that_are_on():
    model = draw(nn.ELU)
    names, neurons = next_neurons(model, counted(model), options(per_step=100))
    constant = {name: each.constant for name, each in neurons.items()}
    assert set(neurons) | set(names) == {"1", "3", "6"}
    assert constant.get("1", ()) == constant.get("3", ()) == ()
    assert constant["6"]


def test_protected_sites_keep_their_neurons():
    result = run(draw(), evaluate=lambda model: 1.0, protect=["3"], **OPTIONS)
    assert type(result.model[3]) is nn.ReLU
    assert {name for step in result.steps for name in step.neurons} <= {"1", "6"}


def test_random_neurons_repeat_with_the_seed():
    runs, model = [], draw()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(run(model, train=lambda model: None, evaluate=lambda model: 1.0, criterion="random", **OPTIONS))
    first, again, other = [[step.neurons for step in each.steps] for each in runs]
    assert first == again
    assert first != other


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_call", range(1, 8))
def test_resumed_after_any_interruption(tmp_path, interrupted_call):
    calls = 0

    def interrupting(function):
        def wrapped(model):
            nonlocal calls
            calls += 1
            if calls == interrupted_call:
                raise InterruptedRun
            return function(model)

        return wrapped

    torch.manual_seed(0)
    expected = run(draw(), checkpoint_dir=tmp_path / "whole", **OPTIONS)
    functions = {"train": train, "evaluate": evaluate, "calibrate": calibrate}
    with pytest.raises(InterruptedRun):
        run(draw(), checkpoint_dir=tmp_path / "parts", **OPTIONS, **{name: interrupting(f) for name, f in functions.items()})
    actual = run(draw(), checkpoint_dir=tmp_path / "parts", **OPTIONS)
    assert actual.steps == expected.steps
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in actual.model.state_dict().items())


def test_given_model_unchanged():
    model = draw()
    before = snapshot(model)
    run(model, **OPTIONS)
    assert_unchanged(model, before)


def test_layer_is_the_default():
    results = []
    for given in ({}, {"granularity": "layer"}):
        torch.manual_seed(0)
        results.append(run(draw(), **given))
    assert results[0].steps == results[1].steps
    assert all(not step.neurons for step in results[0].steps)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"granularity": "channel"}, "granularity is 'channel'; expected one of layer, neuron"),
        ({"granularity": "neuron", "criterion": "entropy-per-latency"}, "by criterion='entropy' or 'random'"),
        ({"granularity": "neuron", "max_removed": 2}, "max_removed: for whole activations only"),
        ({"granularity": "neuron", "zeros_together": True, "collapse": "project"}, "zeros_together and collapse: for whole"),
        ({"granularity": "neuron", "per_step": 101}, "per_step is 101; .* a percentage from 1 to 100"),
    ],
)
def test_errors(given, message):
    model = draw()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        run(model, **given)
    assert_unchanged(model, before)
