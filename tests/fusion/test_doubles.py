"""A model in float64 without a copy of its weights gives what a converted copy gives, and stays as it is."""

import copy

import pytest
import torch
from torch import nn

from fastentropy.fusion.chains import blocks
from fastentropy.fusion.doubles import InDouble
from tests._helpers.networks import Reads


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


MODELS = {
    "layers": (nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4, bias=False)), (3, 5, 6)),
    "convolution and batch norm": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 7, 5)),
    "attention": (Attention(8, 2, batch_first=True), (2, 5, 8)),
    "recurrent": (nn.LSTM(6, 5, 2), (4, 2, 6)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), (3, 6)),
    "asks for the dtype of a weight": (Reads(lambda m, x: m.a(x.to(m.a.weight.dtype) + 1e-9), a=nn.Linear(6, 4)), (3, 6)),
    "named weight": (Reads(lambda m, x: nn.functional.linear(x, weight=m.a.weight, bias=m.a.bias), a=nn.Linear(6, 4)), (3, 6)),
    "weight in the place of an input": (Reads(lambda m, x: m.a(m.a.weight + x.sum()), a=nn.Linear(6, 4)), (3, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_equals_a_converted_copy(name, dtype, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 13)
    model, shape = MODELS[name]
    model = copy.deepcopy(model).to(dtype).eval()
    x = torch.randn(shape, dtype=torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    actual, expected = InDouble(model)(x), copy.deepcopy(model).double()(x)
    first, other = (outputs if isinstance(outputs, torch.Tensor) else outputs[0] for outputs in (actual, expected))
    assert first.dtype == torch.float64
    torch.testing.assert_close(first, other, rtol=1e-13, atol=1e-13)
    assert {key: value.dtype for key, value in model.state_dict().items()} == dict.fromkeys(before, dtype) | {
        key: value.dtype for key, value in before.items() if not value.is_floating_point()
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_state_of_a_call_stays_in_the_copy():
    def remember(m, x):
        m.seen = m.a(x)
        return m.seen

    model = Reads(remember, a=nn.Linear(3, 2)).eval()
    InDouble(model)(torch.randn(1, 3, dtype=torch.float64))
    assert not hasattr(model, "seen")


def test_tensors_that_are_no_weights_keep_their_dtype():
    """As in a copy that `nn.Module.double` converted."""
    model = Reads(lambda m, x: x + torch.ones(3, dtype=torch.float32).mul(1 / 3), a=nn.Linear(3, 3))
    x = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(InDouble(model)(x), model(x))
