"""Every activation is counted, whenever and however it is first called, and under the same name in every pass."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.counts import plain_counts
from tests._helpers.networks import Reads
from tests._helpers.statistics import counted

pytestmark = pytest.mark.filterwarnings("ignore:.*fe.isolate", "ignore:.*torch.jit")


class Net(nn.Module):
    """An activation module and a function; the function is called in a method, and in some passes only."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)

    def encode(self, x):
        return F.relu(self.b(self.act(self.a(x))))

    def forward(self, x, deep=True):
        return self.encode(x) if deep else self.act(self.a(x))


def test_function_that_is_first_called_in_a_later_pass():
    model, x = Net(), torch.randn(8, 4)
    with warnings.catch_warnings(), fe.collect(model) as collector:
        warnings.filterwarnings("error", ".*default axis")
        model(x, deep=False)
        model(x)
        model(x)
    assert counted(collector) == {"act": 144, "relu": 80}
    assert torch.equal(collector.compute()["relu"].counts, 2 * plain_counts(model.b(model.act(model.a(x))), 1))


def test_method_that_is_called_from_outside():
    model, x = Net(), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model(x)
        model.encode(x)
        model.encode(x)
    assert counted(collector) == {"act": 144, "relu": 120}


def test_method_that_is_called_before_any_pass():
    model, x = Net(), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model.encode(x)
        model(x)
    assert counted(collector) == {"act": 96, "relu": 80}


def test_method_of_a_part_names_its_functions_after_the_part():
    model, x = nn.Sequential(Net()), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model(x)
        model[0].encode(x)
    assert counted(collector) == {"0.act": 96, "0.relu": 80}


def test_functions_of_others_are_not_counted():
    model, other, x = Net(), nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model(x)
        F.relu(x)
        F.gelu(other(x))
        x.relu()
    assert counted(collector) == {"act": 48, "relu": 40}


def test_modules_that_are_put_in():
    model, x = Net(), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model(x, deep=False)
        model.b, model.act = nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.GELU()
        model(x, deep=False)
        model(x)
    assert counted(collector) == {"act": 144, "b.1": 40, "relu": 40}


PUT_IN = {
    "append": lambda modules, new: modules.append(new),
    "insert": lambda modules, new: modules.insert(0, new),
    "extend": lambda modules, new: modules.extend([new]),
    "add_module": lambda modules, new: modules.add_module("new", new),
}


@pytest.mark.parametrize("put", PUT_IN)
def test_modules_that_are_put_into_a_list(put):
    model = Reads(lambda m, x: torch.cat([layer(x) for layer in m.layers], 1), layers=nn.ModuleList([nn.ReLU()]))
    x, new = torch.randn(8, 4), nn.Sequential(nn.Linear(4, 3), nn.SiLU())
    with fe.collect(model) as collector:
        model(x)
        PUT_IN[put](model.layers, new)
        model(x)
    assert sum(counted(collector).values()) == 2 * 32 + 24


def test_function_that_torchscript_has_compiled():
    scripted = torch.jit.script(two_functions)
    model, x = Reads(lambda m, x: scripted(m.fc(x)), fc=nn.Linear(4, 6)), torch.randn(8, 4)
    with fe.collect(model) as collector:
        for _ in range(4):
            model(x)
    assert counted(collector) == {"relu": 4 * 48, "gelu": 4 * 48}


def two_functions(x):
    return torch.nn.functional.gelu(torch.relu(x))


def test_forward_of_an_activation_that_is_called_without_the_module():
    model, x = Reads(lambda m, x: m.act.forward(m.fc(x)), fc=nn.Linear(4, 6), act=nn.ReLU()), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model(x)
        model.act.forward(model.fc(x))
        model.act(model.fc(x))
    assert counted(collector) == {"act": 3 * 48}


def test_functions_in_another_thread():
    model, x = Net(), torch.randn(8, 4)
    with fe.collect(model) as collector:
        model(x)
        thread = threading.Thread(target=model, args=(x,))
        thread.start()
        thread.join()
        F.relu(x)
    assert counted(collector) == {"act": 96, "relu": 80}


def test_parts_that_are_called_one_by_one():
    parts, x = (
        nn.ModuleList([nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 5, 1), nn.GELU()]),
        torch.randn(2, 3, 12),
    )
    with torch.no_grad(), fe.collect(parts) as collector:
        for _ in range(2):
            h = x
            for part in parts:
                h = part(h)
    statistics = collector.compute()
    assert {name: (site.neurons, site.axis_is_inferred) for name, site in statistics.items()} == {
        "2": (6, False),
        "4": (5, False),
    }


def test_parts_with_code_of_the_user_between_them():
    parts, x = nn.ModuleList([nn.Conv1d(3, 6, 3), nn.ReLU()]), torch.randn(2, 3, 12)
    with fe.collect(parts) as collector, pytest.warns(UserWarning, match=r"1 site lie \(1\).*channel_axis=\{'1': 2\}"):
        parts[1](parts[0](x) * 2)
    assert collector.compute()["1"].axis_is_inferred


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [
        (nn.Linear(3, 4), (2, 3), -1),
        (nn.Linear(3, 4), (2, 5, 3), -1),
        (nn.Conv1d(3, 4, 1), (2, 3, 5), -2),
        (nn.Conv2d(3, 4, 1), (2, 3, 5, 6), -3),
    ],
)
def test_channel_axis_is_counted_from_the_end(layer, shape, axis):
    model = nn.Sequential(layer, nn.ReLU())
    collector = fe.collect(model)
    collector.update(torch.randn(shape))
    assert collector.compute()["1"].channel_axis == axis


class Shared(nn.Module):
    """One activation that several layers share, of which a pass may leave some out."""

    def __init__(self, *widths):
        super().__init__()
        self.act, self.up = nn.ReLU(), nn.ModuleList(nn.Linear(8, width) for width in widths)

    def forward(self, x, kept):
        return [self.act(self.up[i](x)) for i in kept]


@pytest.mark.parametrize("passes", [[[0, 1], [1]], [[1], [0, 1]], [[0], [1], [1, 0]]])
def test_shared_activation_of_layers_that_are_left_out(passes):
    model, x = Shared(6, 6), torch.ones(5, 8)
    with torch.no_grad():
        model.up[0].bias.fill_(99.0)
        model.up[1].bias.fill_(-99.0)
        with fe.collect(model) as collector:
            for kept in passes:
                model(x, kept)
    calls = [sum(i in kept for kept in passes) for i in range(2)]
    totals = sorted(site.counts.sum(0).tolist() for site in collector.compute().values())
    assert totals == sorted([[0, 0, 30 * calls[0]], [30 * calls[1], 0, 0]])


def test_shared_activation_of_layers_of_other_widths():
    model, x = Shared(6, 9), torch.ones(5, 8)
    with fe.collect(model) as collector:
        model(x, [0, 1])
        model(x, [1])
    assert counted(collector) == {"act": 30, "act:1": 90}


def test_dropout_between_layer_and_activation_makes_no_other_call():
    model = Reads(
        lambda m, x: m.act(m.drop(m.fc(x)) if m.training else m.fc(x)), fc=nn.Linear(4, 6), drop=nn.Dropout(), act=nn.ReLU()
    )
    with fe.collect(model) as collector:
        model.train()(torch.randn(8, 4))
        model.eval()(torch.randn(8, 4))
    assert counted(collector) == {"act": 96}


class Attention(nn.Module):
    """Attention logits of a graph, of which no axis has a size of its own."""

    def __init__(self):
        super().__init__()
        self.w, self.l, self.r, self.act = nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(6, 1), nn.LeakyReLU(0.2)
        self.out = nn.ReLU()

    def forward(self, x):
        h = self.w(x)
        return self.out(self.w(x) + self.act(self.l(h) + self.r(h).T).softmax(1) @ h)


@pytest.mark.filterwarnings("ignore:.*default axis")
def test_site_of_which_no_axis_fits_names_the_ways_out():
    model = Attention()
    with fe.collect(model):
        model(torch.randn(7, 3))
        message = r"site 'act' had 7 neurons on axis 1 .* \[9, 9\], of which no axis would fit; .* exclude=\['act'\]"
        with pytest.raises(RuntimeError, match=message):
            model(torch.randn(9, 3))


@pytest.mark.filterwarnings("ignore:.*default axis")
def test_site_with_another_axis_that_fits_names_it():
    model = nn.Sequential(nn.ReLU())
    with fe.collect(model):
        model(torch.randn(7, 3))
        with pytest.raises(RuntimeError, match=r"of which axis 0 would fit; .*channel_axis=\{'0': 0\}"):
            model(torch.randn(3, 7))


@pytest.mark.parametrize("exclude", [["act"], ["a*"], ("nothing", "act")])
def test_excluded_sites_run_uncounted(exclude):
    model, x = Attention(), torch.randn(9, 3)
    expected = model(x)
    with fe.collect(model, exclude=exclude) as collector:
        model(torch.randn(7, 3))
        assert torch.equal(model(x), expected)
    assert counted(collector) == {"out": 16 * 6}


def test_exclude_takes_names_not_a_name():
    with pytest.raises(TypeError, match=r"exclude: got 'act', expected a list of names or patterns: exclude=\['name'\]"):
        fe.collect(Attention(), exclude="act")


@pytest.mark.filterwarnings("ignore:.*default axis")
def test_misfits_are_skipped_with_a_note():
    model = Attention()
    with fe.collect(model, misfits="skip") as collector:
        model(torch.randn(7, 3))
        with pytest.warns(UserWarning, match="site 'act' had 7 neurons .* it is left out"):
            model(torch.randn(9, 3))
        model(torch.randn(7, 3))
    statistics = collector.compute()
    assert {name: site.observations for name, site in statistics.items()} == {"out": 23 * 6}
    assert any("'act'" in note for note in statistics.notes)


def test_unknown_way_with_misfits_is_refused():
    with pytest.raises(ValueError, match="misfits='drop': expected 'raise' or 'skip'"):
        fe.collect(Attention(), misfits="drop")


@pytest.mark.parametrize("option", [{"exclude": ["acts"]}, {"channel_axis": {"acts": 1}}])
def test_names_that_no_site_has_are_noted(option):
    model = Net()
    with fe.collect(model, **option) as collector:
        model(torch.randn(8, 4))
    (name,) = option
    with pytest.warns(UserWarning, match=f"{name} names 'acts', but no site has this name; the sites are act, relu"):
        statistics = collector.compute()
    assert len(statistics.notes) == 1


def test_values_are_not_kept_alive_by_frames():
    """A functional activation is named by the code that calls it, whose variables must be freed as without a collector."""
    alive = []

    def forward(m, x):
        h = m.fc(x)
        seen = weakref.ref(h)
        h = F.relu(h) + 1
        gc.collect()
        alive.append(seen() is not None)
        return F.relu(h)

    model = Reads(forward, fc=nn.Linear(4, 6))
    with torch.no_grad(), fe.collect(model):
        for _ in range(3):
            model(torch.randn(8, 4))
    assert alive[1:] == [False, False]
