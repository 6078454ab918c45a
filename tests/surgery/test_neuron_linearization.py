"""Neurons that never change their state are replaced without a change of the outputs; errors change nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy import NeuronStates, NeuronwiseActivation, SiteStatistics, Statistics, linearize_neurons
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot

ACTIVATIONS = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.GELU,
    nn.SELU,
]
LAYERS = {
    "linear": (lambda: nn.Linear(6, 6), (50, 6)),
    "tokens": (lambda: nn.Linear(6, 6), (5, 7, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 6, 3, padding=1), (8, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3, padding=1), (3, 6, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 5, 4)),
}


def draw(layer, random, depth=4):
    """Return a network in which many neurons have inputs of one sign only."""
    torch.manual_seed(random.randrange(2**16))
    layers = []
    for _ in range(depth):
        layers += [layer(), random.choice(ACTIVATIONS)()]
        with torch.no_grad():
            layers[-2].bias += 30 * torch.randint(-1, 2, (6,))
    return nn.Sequential(*layers, layer()).eval()


def collected(model, *batches):
    with torch.no_grad(), fe.collect(model) as collector:
        for x in batches:
            model(x)
    return collector.compute()


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_stay_if_no_state_changed(kind, drawn):
    layer, shape = LAYERS[kind]
    for _ in range(5):
        model, x = draw(layer, drawn), torch.randn(shape)
        before, expected = [model[index] for index in (1, 3, 5, 7)], model(x)
        statistics = collected(model, x)
        report = linearize_neurons(model, statistics, min_observations=1)
        assert torch.equal(model(x), expected)
        for name, module in zip(("1", "3", "5", "7"), before, strict=True):
            assert_states(model.get_submodule(name), module, statistics[name].counts, report[name])


def assert_states(replaced, module, counts, states):
    """Assert that each neuron of an activation has the state that its counts ask for."""
    never_off, never_on = (counts[:, 0] == 0) & (counts[:, 2] > 0), counts[:, 2] == 0
    linear = never_off & isinstance(module, nn.ReLU | nn.LeakyReLU | nn.PReLU | nn.RReLU | nn.ELU | nn.CELU)
    constant = never_on & isinstance(module, nn.ReLU | nn.ReLU6)
    numbers = [int(mask.sum()) for mask in (linear, constant)]
    assert [states.active, states.linear, states.constant] == [len(counts) - sum(numbers), *numbers]
    if not sum(numbers):
        assert replaced is module
        return
    assert isinstance(replaced, NeuronwiseActivation)
    assert replaced.activation is module
    assert (replaced.linear.tolist(), replaced.constant.tolist()) == (linear.tolist(), constant.tolist())
    assert not replaced.values.any()
    assert not replaced.training


def given(counts, activation="relu", name="1", axis=-1):
    return Statistics({name: SiteStatistics(activation, torch.tensor(counts), channel_axis=axis)})


def small(activation=None):
    return nn.Sequential(nn.Linear(2, 3), activation or nn.ReLU(), nn.Linear(3, 2))


COUNTS = [[9, 0, 1], [1, 0, 9], [5, 0, 5]]


def test_limit_of_the_entropy():
    states = {}
    for limit in (0, 0.46, 0.47, 0.99, 1):
        model = small()
        linearize_neurons(model, given(COUNTS), max_entropy=limit, min_observations=10)
        if isinstance(model[1], NeuronwiseActivation):
            states[limit] = model[1].linear.tolist(), model[1].constant.tolist()
    off_and_on = [False, True, False], [True, False, False]
    assert states == {0.47: off_and_on, 0.99: off_and_on, 1: ([False, True, False], [True, False, True])}


def test_network_without_idle_neurons_stays():
    model = small()
    before = snapshot(model)
    report = linearize_neurons(model, given(COUNTS))
    assert report == {"1": NeuronStates("relu", 3, 0, 0)}
    assert_unchanged(model, before)


def test_states_are_kept_when_more_neurons_are_replaced():
    model = small(nn.ReLU(inplace=True))
    relu = model[1]
    linearize_neurons(model, given([[10, 0, 0], [1, 0, 9], [5, 0, 5]]), min_observations=1)
    again = given([[0, 0, 10], [0, 0, 10], [5, 0, 5]], "neuronwise")
    assert linearize_neurons(model, again, min_observations=1) == {"1": NeuronStates("relu", 1, 1, 1)}
    assert model[1].activation is relu
    assert (model[1].linear.tolist(), model[1].constant.tolist()) == ([False, True, False], [True, False, False])


def test_reloaded_network_has_the_states(tmp_path):
    statistics = given([[10, 0, 0], [0, 0, 10], [5, 0, 5]])
    model, other = small(), small()
    for each in (model, other):
        linearize_neurons(each, statistics, min_observations=1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = torch.randn(4, 2)
    assert torch.equal(other(x), model(x))


def test_saved_statistics_are_enough(tmp_path):
    torch.manual_seed(0)  # of other weights a neuron may change its state
    model, x = small(), torch.rand(20, 2) + 9
    collected(model, x).save(tmp_path / "statistics.safetensors")
    expected = model(x)
    report = linearize_neurons(model, Statistics.load(tmp_path / "statistics.safetensors"), min_observations=20)
    assert report["1"].active == 0
    assert torch.equal(model(x), expected)


def test_counts_of_an_exported_program_do_not_tell_the_axis():
    model = small()
    with torch.no_grad():
        model[0].bias += 30
    program = fe.instrument(torch.export.export(model, (torch.randn(9, 2),)))
    before, (_, counts) = snapshot(model), program.module()(torch.randn(9, 2))
    with pytest.raises(ValueError, match=r"'1' lie; count with fe\.collect\(model\)"):
        linearize_neurons(model, fe.statistics_of(counts), min_observations=1)
    assert_unchanged(model, before)


def test_transformer_layer_calls_the_new_activation():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True).eval()
    model.activation = nn.ReLU()
    x = torch.randn(3, 5, 8)
    statistics = collected(model, x)
    counts = torch.tensor([[0, 0, 15]] * 16)
    idle = Statistics({"activation": SiteStatistics("relu", counts, channel_axis=statistics["activation"].channel_axis)})
    linearize_neurons(model, idle, min_observations=1)
    other = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, activation=nn.Identity()).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))


class Own(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 1


def test_subclass_stays():
    model = small(Own())
    assert linearize_neurons(model, given([[10, 0, 0]] * 3), min_observations=1) == {"1": NeuronStates("relu", 3, 0, 0)}
    assert isinstance(model[1], Own)


def test_table():
    sites = {
        "layer1.relu": NeuronStates("relu", 1, 2, 3),
        "layer2.gelu": NeuronStates("gelu", 4, 0, 0),
    }
    model = nn.ModuleDict({"layer1": nn.ModuleDict({"relu": nn.ReLU()}), "layer2": nn.ModuleDict({"gelu": nn.GELU()})})
    statistics = given([[0, 0, 9]] * 2 + [[9, 0, 0]] * 3 + [[1, 1, 1]], name="layer1.relu")
    gelu = given([[9, 0, 0]] * 4, "gelu", "layer2.gelu")
    report = linearize_neurons(model, Statistics({**statistics, **gelu}), min_observations=1)
    assert report == sites
    lines = str(report).splitlines()
    assert [line.split() for line in lines[2:4]] == [["layer1.relu", "relu", *"123"], ["layer2.gelu", "gelu", *"400"]]
    assert lines[-2:] == [
        "10 neurons: 5 active, 2 linear, 3 constant",
        "left as they are, since they are in no state exactly linear or 0: gelu",
    ]


IDLE = [[0, 0, 2000]] * 3


def functional():
    return Reads(lambda self, x: F.relu(self.layer(x)), layer=nn.Linear(2, 3))


@pytest.mark.parametrize(
    ("model", "statistics", "options", "message"),
    [
        (small, given(IDLE, name="7"), {}, r"not of this model, which has no activation '7'; the nearest are 1"),
        (small, given(IDLE, name="0"), {}, r"not of this model, which has no activation '0'"),
        (small, given(IDLE, "gelu"), {}, r"site '1' is relu, and gelu with 3 neurons in the statistics"),
        (small, given([[0, 0, 999]] * 3), {}, r"site '1' has a neuron to replace of which 999 values were counted"),
        (small, given([[0, 0, 0]] * 3), {"min_observations": 1}, r"of which 0 values were counted, expected at least 1;"),
        (
            small,
            given(IDLE, axis=None),
            {},
            r"do not tell on which axis the neurons of site '1' lie; count with fe\.collect\(model\)",
        ),
        (small, given(IDLE), {"max_entropy": 1.5}, r"max_entropy: got 1\.5, expected a number of bits from 0 to 1"),
        (small, given(IDLE), {"max_entropy": float("nan")}, r"max_entropy: got nan"),
        (small, given(IDLE), {"min_observations": 0}, r"min_observations: got 0, expected a whole number"),
        (functional, given(IDLE, name="relu"), {}, r"site 'relu' has neurons to replace, but no module of its own; .*isolate"),
        (
            lambda: nn.Sequential(nn.Linear(2, 3), relu := nn.ReLU(), nn.Linear(3, 3), relu),
            Statistics({**given(IDLE), **given(IDLE, name="1:1")}),
            {},
            r"site '1' has neurons to replace, but no module of its own; .*isolate",
        ),
        (
            lambda: nn.Sequential(nn.Linear(2, 3), relu := nn.ReLU(), nn.Linear(3, 3), relu),
            given(IDLE),
            {},
            r"holds the module '1' in several places",
        ),
    ],
)
def test_errors_change_nothing(model, statistics, options, message):
    model = model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as raised:
        linearize_neurons(model, statistics, **options)
    assert "\n" not in str(raised.value)
    assert_unchanged(model, before)


def test_an_error_at_the_last_site_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU())
    before = snapshot(model)
    with pytest.raises(ValueError, match="site '3' has a neuron"):
        linearize_neurons(model, Statistics({**given(IDLE), **given([[0, 0, 9]] * 3, name="3")}))
    assert_unchanged(model, before)


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="statistics: got a dict, expected Statistics"):
        linearize_neurons(small(), {})
    with pytest.raises(TypeError, match="model: got 3"):
        linearize_neurons(3, given(IDLE))


def test_isolated_function_is_replaced():
    model, x = functional(), torch.rand(20, 2)
    with torch.no_grad():
        model.layer.bias += 9

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model.layer

        def forward(self, x):
            return F.relu(self.layer(x))

    isolated = fe.isolate(Calls(), (x,))
    report = linearize_neurons(isolated, collected(isolated, x), min_observations=20)
    assert report == {"relu": NeuronStates("relu", 0, 3, 0)}
    assert torch.equal(isolated(x), model(x))
