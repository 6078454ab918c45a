"""The message for a model in which no activation was found names what the model has instead, and what to do."""

import re

import pytest
import torch
import torch.ao.quantization
from torch import nn

import fastentropy as fe
from fastentropy.sites.finding import no_sites

X = torch.randn(5, 4)


class SquaredReLU(nn.Module):
    def forward(self, x):
        return x.clamp(min=0).square()


class Cubic(nn.Module):
    def forward(self, x):
        return x**3


class OwnTanh(nn.Tanh):
    pass


class OwnDropout(nn.Dropout):
    pass


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(4, 3)

    def forward(self, x):
        return self.cell(x)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        return x


class Gate(nn.Module):
    def forward(self, x):
        return torch.tanh(x) * torch.sigmoid(x)


def taken_apart():
    """Return an exported graph in which SiLU is a product with a sigmoid."""
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4), nn.SiLU()).eval(), (X,))
    return program.run_decompositions({torch.ops.aten.silu.default: lambda x: x * torch.sigmoid(x)}).module()


def quantised():
    scheme = dict.fromkeys([nn.Linear], torch.ao.quantization.default_dynamic_qconfig)
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)).eval(), scheme)


def unflattened():
    return torch.export.unflatten(torch.export.export(nn.Sequential(nn.Tanh()), (X,)))


MODELS = {
    "exported": (taken_apart, "it is a graph of operators, where activations may be taken apart; use the model"),
    "unflattened": (unflattened, "it is a graph of operators"),
    "scripted": (
        lambda: torch.jit.script(nn.Sequential(nn.Tanh())),
        "it is compiled by TorchScript, where calls cannot be seen",
    ),
    "quantised": (quantised, "it is quantised (Linear), and only floating-point values are counted"),
    "unused": (Unused, "its activation modules (relu) were not called, or not with floating-point values"),
    "lstm": (lambda: Recurrent(nn.LSTM), "it has LSTM, whose nonlinearity is inside of one operator"),
    "gru": (lambda: nn.GRU(4, 3), "it has GRU, whose nonlinearity is inside of one operator"),
    "rnn": (lambda: Recurrent(nn.RNN), "it has RNN, whose nonlinearity is inside of one operator"),
    "cell": (lambda: Recurrent(nn.LSTMCell), "it has LSTMCell, whose nonlinearity is inside of one operator"),
    "own": (
        lambda: nn.Sequential(nn.Linear(4, 4), Cubic(), nn.Flatten()),
        "if Cubic is one, make it known with fe.register_activation(Cubic, 'cubic')",
    ),
    "own, by name": (
        lambda: nn.Sequential(Cubic(), SquaredReLU()),
        "if SquaredReLU is one, make it known with fe.register_activation(SquaredReLU, 'squared_relu')",
    ),
    "own Tanh": (lambda: nn.Sequential(OwnTanh()), "if OwnTanh is one, make it known with"),
    "own Dropout": (lambda: nn.Sequential(OwnDropout(), nn.Sigmoid()), "it has Sigmoid, for which off, zero and on say little"),
    "itself": (SquaredReLU, "if SquaredReLU is one, make it known"),
    "others": (
        lambda: nn.Sequential(nn.Tanh(), nn.Softmax(-1), nn.Hardsigmoid(), nn.Softsign()),
        "it has Tanh, Softmax, Hardsigmoid, …, for which off, zero and on say little; if they do here, make it known with "
        "fe.register_activation(torch.nn.Tanh, 'tanh')",
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        "none of its modules is one; make yours known with fe.register_activation(YourModule, 'name')",
    ),
}


@pytest.mark.parametrize(("build", "text"), MODELS.values(), ids=MODELS)
def test_message_names_what_the_model_has(build, text):
    model = build()
    message = no_sites(model)
    assert message.startswith(f"{type(model).__name__} calls no known activation: {text}")
    assert "\n" not in message
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fe.find_sites(model, (X,))
    with fe.collect(model) as collector:
        model(X)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        collector.compute()


def test_two_kinds_are_named_together():
    message = no_sites(nn.Sequential(nn.LSTM(4, 4), nn.Tanh(), SquaredReLU()))
    assert "if SquaredReLU is one" in message
    assert "it has LSTM" in message
    assert "Tanh" not in message
    assert "OwnDropout" not in no_sites(nn.Sequential(OwnDropout()))
    assert no_sites(nn.Sequential(OwnTanh())).count("OwnTanh") == 2


def test_registering_as_the_message_says():
    model = nn.Sequential(nn.Linear(4, 4), Cubic())
    call = no_sites(model).partition("make it known with ")[2]
    assert call == "fe.register_activation(Cubic, 'cubic')"
    eval(call, {"fe": fe, "Cubic": Cubic})
    assert [site.activation for site in fe.find_sites(model, (X,))] == ["cubic"]


def test_compiled_models_are_named_by_their_class():
    model = torch.compile(nn.Sequential(nn.Tanh()), backend="eager")
    assert no_sites(model).startswith("Sequential calls no known activation: it has Tanh")


def test_linearize_says_that_functions_are_no_modules():
    with pytest.raises(ValueError, match=r"has no module of a known activation: .*; functions that it calls .* fe\.isolate"):
        fe.linearize(Gate(), ["relu"])
