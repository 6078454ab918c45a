import functools

import pytest
import torch
import torch.nn.functional as F
import transformers.activations
from torch import nn

import fastentropy as fe
from fastentropy.sites.activations import activation_modules, activation_name, function_name, fused_activation, kernel_of
from fastentropy_kernels import activation_states

RECTIFIERS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.Hardswish: "hardswish",
    nn.Hardtanh: "hardtanh",
}
NOT_RECTIFIERS = {"linear", "laplace", "sigmoid", "tanh", "sqrtsoftplus"}


@pytest.mark.parametrize(("kind", "name"), RECTIFIERS.items())
def test_every_rectifier_of_torch_is_known_by_its_own_name(kind, name):
    assert activation_name(kind()) == name


@pytest.mark.parametrize("name", transformers.activations.ACT2CLS)
def test_every_rectifier_of_transformers_is_known(name):
    assert (activation_name(transformers.activations.ACT2FN[name]) is None) == (name in NOT_RECTIFIERS)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "gelu", "silu", "hard_swish", "hard_mish", "mish", "prelu"])
def test_rectifiers_of_timm_are_known(name):
    layers = pytest.importorskip("timm.layers")
    assert activation_name(layers.create_act_layer(name))


def test_subclass_counts_as_its_nearest_ancestor():
    class Clipped(nn.ReLU6):  # a Hardtanh too
        pass

    assert activation_name(Clipped()) == "relu6"


@pytest.mark.parametrize("module", [nn.Identity(), nn.Sigmoid(), nn.Tanh(), nn.GLU(), nn.Linear(2, 2)])
def test_other_modules_are_not_activations(module):
    assert activation_name(module) is None


@pytest.mark.parametrize(
    "function", [F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, torch.ops.aten.relu]
)
def test_a_function_is_known_under_each_of_its_names(function):
    assert function_name(function) == (None if function is torch.ops.aten.relu else "relu")


@pytest.mark.parametrize("name", sorted(set(RECTIFIERS.values())))
def test_every_rectifier_has_its_function(name):
    assert function_name(getattr(F, name)) == name


@pytest.mark.parametrize("kind", [kind for kind in RECTIFIERS if kind not in (nn.PReLU, nn.RReLU)])
def test_the_fused_form_of_a_module_is_the_module(kind):
    options = {nn.LeakyReLU: {"negative_slope": 0.3}, nn.ELU: {"alpha": 0.7}, nn.CELU: {"alpha": 0.7}}
    options |= {nn.GELU: {"approximate": "tanh"}, nn.Softplus: {"beta": 2, "threshold": 3}}
    module = kind(**options.get(kind, {}))
    fused = fused_activation(module)
    x, counts = torch.linspace(-9, 9, 111)[:, None], torch.zeros(1, 3, dtype=torch.int64)
    y = activation_states(x, counts, fused.activation, inplace=fused.inplace, impl="reference", **fused.parameters)
    torch.testing.assert_close(y, module(x))


@pytest.mark.parametrize(
    "kind", [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.Softplus, transformers.activations.SiLUActivation]
)
def test_no_fused_form_once_the_forward_is_replaced(kind, monkeypatch):
    module = kind()
    fused = fused_activation(module)
    assert fused.is_of(module)
    monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(lambda self, x: 2 * x))
    assert not fused.is_of(module)
    assert fused_activation(module) is None
    monkeypatch.undo()
    assert fused.is_of(module)
    module.forward = kind.forward.__get__(module)
    assert not fused.is_of(module)
    assert fused_activation(module) is None


@pytest.mark.parametrize(
    ("module", "name", "values"),
    [
        (nn.LeakyReLU(), "negative_slope", (torch.tensor(0.1), True, None, 0.1j)),
        (nn.Softplus(), "beta", (0, torch.ones(1))),
        (nn.CELU(), "alpha", (0.0,)),
        (nn.Hardtanh(), "max_val", (-1.0, -2.0, float("nan"))),
        (nn.GELU(), "approximate", ("erf", None)),
        (nn.ReLU(), "inplace", (1, None)),
        (nn.LeakyReLU(), "inplace", (torch.tensor(True),)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_no_fused_form_for_unusual_attributes(module, name, values):
    fused = fused_activation(module)
    original = getattr(module, name)
    for value in values:
        setattr(module, name, value)
        assert not fused.is_of(module)
        assert fused_activation(module) is None
    setattr(module, name, original)
    assert fused.is_of(module)
    delattr(module, name)
    assert not fused.is_of(module)
    assert fused_activation(module) is None


def test_subclass_has_no_fused_form():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x - 1)

    assert fused_activation(Shifted()) is None
    assert kernel_of(Shifted) is None


def test_fused_form_of_relu6_is_that_of_its_limits():
    module = nn.ReLU6()
    assert fused_activation(module)[:3] == ("relu6", {}, False)
    module.max_val = 5.0
    assert fused_activation(module)[:3] == ("hardtanh", {"min_val": 0.0, "max_val": 5.0}, False)
    assert fused_activation(nn.Hardtanh(0, 6))[0] == "relu6"


def test_modules_come_by_their_first_path():
    shared = nn.ReLU()
    model = nn.Sequential(shared, nn.Linear(2, 2), nn.Sequential(shared, nn.GELU()))
    assert list(activation_modules(model)) == ["0", "2.1"]


def test_modules_inside_of_an_activation_are_a_part_of_it():
    class Own(nn.Sequential):
        pass

    fe.register_activation(Own, "own")
    own = Own(nn.Sequential(nn.ReLU(), nn.Identity()), nn.GELU())
    assert list(activation_modules(nn.Sequential(own, nn.ReLU(), nn.Sequential(nn.SiLU())))) == ["0", "1", "2.0"]
    assert list(activation_modules(own)) == [""]


def test_a_module_that_the_user_registers_is_a_site():
    class Squared(nn.Module):
        def forward(self, x):
            return x.clamp_min(0).square()

    fe.register_activation(Squared, "relu2")
    model = nn.Sequential(nn.Linear(2, 3), Squared())
    assert fe.find_sites(model, (torch.zeros(1, 2),)) == [fe.Site("1", "relu2", 3, 1)]
    with fe.collect(model) as collector:
        model(torch.ones(4, 2))
    assert collector.compute()["1"].counts.sum() == 12


def test_a_function_that_the_user_registers_is_a_site():
    class Model(nn.Module):
        def forward(self, x):
            return F.threshold(x, 0.0, 0.0)

    fe.register_activation(F.threshold, "relu")
    assert fe.find_sites(Model(), (torch.zeros(1, 2),)) == [fe.Site("threshold", "relu", 2, 1)]


@pytest.mark.parametrize(
    ("activation", "name", "error", "message"),
    [
        (nn.Identity, "not a name", ValueError, "'not a name', expected an identifier"),
        ("mine", nn.Identity, ValueError, "got <class '.*Identity'>, expected an identifier"),
        (nn.Identity(), "mine", TypeError, "an object of Identity, expected a subclass"),
        (int, "mine", TypeError, "the class int, expected a subclass"),
        (3, "mine", TypeError, "an object of int"),
    ],
)
def test_what_cannot_be_registered_is_named(activation, name, error, message):
    with pytest.raises(error, match=message):
        fe.register_activation(activation, name)
