"""A NeuronwiseActivation against masks in plain PyTorch, and as an activation that the rest of the package knows."""

import copy

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy import NeuronwiseActivation
from tests._helpers.counts import plain_counts
from tests._helpers.tensors import assert_same

ACTIVATIONS = {
    "relu": nn.ReLU,
    "in-place relu": lambda: nn.ReLU(inplace=True),
    "in-place relu6": lambda: nn.ReLU6(inplace=True),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "prelu": lambda: nn.PReLU(5, 0.3),
}
#: Shapes of inputs with 5 neurons, and the axis of the neurons.
SHAPES = [
    ((5,), -1),
    ((3, 5), -1),
    ((2, 3, 5), -1),
    ((2, 5, 7), -2),
    ((2, 5, 1, 4), -3),
    ((5, 3, 4), -3),
    ((1, 5, 2, 3, 2), -4),
]


def draw(activation, channel_axis=-1, neurons=5, seed=0):
    """Return a module in which every neuron has a random state."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 3, (neurons,), generator=generator)
    values = torch.randn(neurons, generator=generator)
    return NeuronwiseActivation(activation, states == 1, states == 2, values, channel_axis=channel_axis)


def plain(module, x):
    """Return the output of a module, computed neuron by neuron."""
    parts = list(module.activation(x.clone()).unbind(module.channel_axis))
    given = x.unbind(module.channel_axis)
    for neuron, (linear, constant) in enumerate(zip(module.linear, module.constant, strict=True)):
        if linear:
            parts[neuron] = given[neuron].to(parts[neuron].dtype)
        if constant:
            parts[neuron] = torch.full_like(parts[neuron], module.values.flatten()[neuron].item())
    return torch.stack(parts, module.channel_axis)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "prelu"])
def test_output_is_that_of_masks(activation, shape, axis, drawn):
    module = draw(ACTIVATIONS[activation](), axis, seed=drawn.randrange(1000))
    x = 4 * torch.randn(shape)
    assert_same(module(x.clone()), plain(module, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    module, x = draw(nn.PReLU(5, 0.3)).to(dtype), torch.randn(7, 5, dtype=dtype)
    assert module(x).dtype == dtype
    assert_same(module(x), plain(module, x))


@pytest.mark.parametrize("activation", ["relu", "in-place relu", "prelu"])
def test_output_under_autocast_has_the_dtype_of_the_activation(activation):
    module, x = draw(ACTIVATIONS[activation]()), torch.randn(7, 5)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(module(given.clone()), plain(module, given))


def test_channels_last_inputs_stay_channels_last():
    module, x = draw(nn.ReLU(), -3), torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    assert module(x).is_contiguous(memory_format=torch.channels_last)
    assert module(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_masks(activation):
    module, x = draw(ACTIVATIONS[activation]()), torch.randn(7, 5, requires_grad=True)
    (actual,) = torch.autograd.grad(module(x + 0).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(module, x + 0).square().sum(), x)
    assert_same(actual, expected)


def test_state_dict_holds_the_states():
    module, other = draw(nn.PReLU(5, 0.3), -3, seed=1), draw(nn.PReLU(5, 0.1), -3, seed=2)
    x = torch.randn(2, 5, 3, 4)
    assert not torch.equal(module(x), other(x))
    other.load_state_dict(module.state_dict())
    assert_same(other(x), module(x))
    assert_same(copy.deepcopy(module)(x), module(x))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_exported_and_compiled_modules(activation):
    model = nn.Sequential(nn.Linear(3, 5), draw(ACTIVATIONS[activation]())).eval()
    x = torch.randn(4, 3)
    expected = model(x)
    assert_same(torch.export.export(model, (x,)).module()(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), expected)


def network():
    torch.manual_seed(0)
    convolution, linear = draw(nn.ReLU6(inplace=True), -3, 6), draw(nn.ReLU(), -1, 5)
    layers = [nn.Conv2d(2, 6, 3), convolution, nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), linear]
    return nn.Sequential(*layers, nn.Linear(5, 3)).eval(), torch.randn(4, 2, 8, 8)


def test_sites():
    model, x = network()
    found = [(site.name, site.activation, site.neurons, site.channel_axis) for site in fe.find_sites(model, (x,))]
    assert found == [("1", "neuronwise", 6, 1), ("3", "relu", 4, 1), ("6", "neuronwise", 5, 1)]


def test_axis_behind_is_followed():
    module = draw(nn.ReLU(), -1)
    model = nn.Sequential(nn.Linear(3, 5), module, nn.Dropout(), nn.ReLU()).eval()
    with fe.collect(model) as collector:
        model(torch.randn(2, 5, 3))
    assert [site.axis_is_inferred for site in collector.compute().values()] == [False, False]
    assert [site.channel_axis for site in collector.compute().values()] == [-1, -1]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_input_is_counted(is_compiled):
    model, x = network()
    expected = model(x)
    counts = [plain_counts(model[:index](x), 1) for index in (1, 3, 6)]
    called = torch.compile(model, backend="aot_eager") if is_compiled else model
    with fe.collect(called) as collector, torch.no_grad():
        for _ in range(3):
            assert_same(called(x), expected)
    assert list(collector.compute()) == ["1", "3", "6"]
    assert_same([site.counts for site in collector.compute().values()], [3 * each for each in counts])


def test_input_of_an_exported_program_is_counted():
    model, x = network()
    _, counts = fe.instrument(torch.export.export(model, (x,))).module()(x)
    statistics = fe.statistics_of(counts)
    assert_same([site.counts for site in statistics.values()], [plain_counts(model[:index](x), 1) for index in (1, 3, 6)])


def test_linearize_replaces_the_whole_module():
    model, _ = network()
    with pytest.raises(ValueError, match=r"'1\.activation' is not an activation module of the model"):
        fe.linearize(model, ["1.activation"])
    fe.linearize(model, ["1"])
    assert type(model[1]) is nn.Identity


def test_fused_network_is_equal():
    model, x = network()
    fe.linearize(model, ["3"])
    fused = fe.fuse(model, (x,), measure=False)
    assert [chain.names for chain in fused.report.chains if len(chain.names) > 1] == [("2", "5")]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("linear", "constant", "options", "message"),
    [
        ([True, False], [True, False], {}, "both linear and constant"),
        ([1, 0], [0, 0], {}, r"got torch\.int64 \[2\]"),
        ([True, False], [True], {}, r"got torch\.bool \[2\] and torch\.bool \[1\]"),
        ([True, False], [False, False], {"values": torch.zeros(3)}, r"values: got torch\.float32 \[3\]"),
        ([True, False], [False, False], {"values": torch.zeros(2, dtype=torch.int64)}, "values: got torch.int64"),
        ([True, False], [False, False], {"channel_axis": 1}, "channel_axis: got 1"),
    ],
)
def test_wrong_states_are_refused(linear, constant, options, message):
    with pytest.raises(ValueError, match=message):
        NeuronwiseActivation(nn.ReLU(), torch.tensor(linear), torch.tensor(constant), **{"channel_axis": -1, **options})


@pytest.mark.parametrize("shape", [(5,), (2, 4, 3), (2, 1, 3, 3)])
def test_input_with_other_neurons_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected 5 neurons on axis -3"):
        draw(nn.ReLU(), -3)(torch.zeros(shape))
