"""Inputs of activations: their dtypes, shapes and neuron axes."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import collect
from tests._helpers.networks import Reads
from tests._helpers.statistics import counted


def test_nan_is_counted_apart():
    model = nn.Sequential(nn.ReLU())
    with collect(model) as collector:
        model(torch.tensor([[float("nan"), -1.0], [2.0, float("nan")], [0.0, float("nan")]]))
    site = collector.compute()["0"]
    assert site.counts.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert site.nan == 3


def test_an_input_of_another_shape_names_the_site():
    model = nn.Sequential(nn.ReLU())
    with collect(model):
        model(torch.zeros(2, 3))
        with pytest.raises(RuntimeError, match="site '0' had 3 neurons on axis 1"):
            model(torch.zeros(2, 4))


def test_a_second_site_of_a_kind_that_is_known_needs_no_axis():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(2, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x).transpose(0, 1)).transpose(0, 1)

    model = Reads(lambda m, x, deep: m.second(x) if deep else m.first(x), first=Block(), second=Block())
    with collect(model) as collector:
        model(torch.zeros(7, 2), False)
        model(torch.zeros(7, 2), True)
    assert collector.compute()["second.act"].neurons == 3


def test_a_site_that_appears_later_has_a_default_axis_that_is_warned_of():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.always, self.later = nn.Linear(2, 3), nn.ReLU(), nn.ReLU()

        def forward(self, x, deep):
            y = self.always(self.fc(x))
            return self.later(y.T) if deep else y

    model = Sometimes()
    with collect(model) as collector:
        model(torch.zeros(1, 2), deep=False)
        with pytest.warns(UserWarning, match=r"1 site lie \(later\), .* channel_axis=\{'later': 1\}"):
            model(torch.zeros(1, 2), deep=True)
    site = collector.compute()["later"]
    assert (site.axis_is_inferred, site.observations) == (True, 3)
    with collect(model, channel_axis={"later": 0}) as collector:
        model(torch.zeros(1, 2), deep=False)
        model(torch.zeros(1, 2), deep=True)
    assert collector.compute()["later"].neurons == 3


def test_channel_axis_can_be_named_and_is_checked():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with collect(model, channel_axis={"1": -2}) as collector:
        model(torch.zeros(5, 2))
    assert collector.compute()["1"].neurons == 5
    with pytest.raises(TypeError, match=r"channel_axis: got 1, expected axes by site: channel_axis=\{'name': 1\}"):
        collect(model, channel_axis=1)
    with collect(model, channel_axis={"1": 2}), pytest.raises(ValueError, match="channel_axis of site '1' is 2"):
        model(torch.zeros(5, 2))


def test_activations_of_numbers_and_of_parameters_are_no_sites():
    model = Reads(
        lambda m, x: m.relu(m.fc(x)) * F.softplus(m.scale) + F.relu(torch.tensor(1.0)), fc=nn.Linear(2, 2), relu=nn.ReLU()
    )
    model.scale = nn.Parameter(torch.ones(2))
    with collect(model) as collector:
        model(torch.zeros(1, 2))
    assert list(collector.compute()) == ["relu"]


def test_inputs_without_strides_pass():
    model = Reads(lambda m, a, x: m.relu(torch.sparse.mm(a, m.fc(x))), fc=nn.Linear(2, 3), relu=nn.ReLU())
    with torch.no_grad(), collect(model) as collector:
        model(torch.eye(5).to_sparse(), torch.randn(5, 2))
    assert counted(collector) == {"relu": 15}


def test_a_lazy_model_is_counted_from_its_first_pass_on():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with collect(model) as collector:
        model(torch.randn(5, 2))
    assert counted(collector) == {"1": 15}


def test_another_number_of_axes_is_no_guess():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    with collect(model) as collector:
        model(torch.randn(2, 3, 9, 9))
        model(torch.randn(3, 9, 9))
        with pytest.raises(RuntimeError, match="channel_axis"):
            model(torch.randn(3, 8, 8))
    assert counted(collector) == {"1": 3 * 6 * 49}


def test_keyword_arguments_and_autocast():
    model = nn.Sequential(OrderedDict(fc=nn.Linear(2, 3), relu=nn.ReLU()))
    with collect(model) as collector, torch.autocast("cpu", dtype=torch.bfloat16):
        model(input=torch.randn(4, 2))
        model.relu(input=torch.randn(4, 3))
    assert counted(collector) == {"relu": 24}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_floating_dtype_is_counted(dtype):
    model = Reads(lambda m, x: m.act(x), act=nn.Identity() if dtype == torch.float8_e4m3fn else nn.ReLU())
    if dtype == torch.float8_e4m3fn:
        model.act = ReadsOnly()
    x = torch.tensor([[-1.0, 2.0], [0.0, 3.0]]).to(dtype)
    with collect(model) as collector:
        model(x)
    assert collector.compute()["act"].counts.tolist() == [[1, 1, 0], [0, 0, 2]]


class ReadsOnly(nn.ReLU):
    def forward(self, x):
        return x


def test_prelu_counts_and_learns():
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(3))
    x = torch.randn(5, 2)
    expected = model(x)
    with collect(model) as collector:
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
    assert counted(collector) == {"1": 30}
    assert model[1].weight.grad is not None
