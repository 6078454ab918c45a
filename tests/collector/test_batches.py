"""Entropies per batch: a neuron's mean is over the batches in which it had a value."""

import math

import pytest
import torch
from torch import nn

import fastentropy as fe
from tests._helpers.networks import Reads

NAN = float("nan")


def entropy(values, zero):
    """The entropy of a neuron with these values, written plainly. None if it had no value."""
    values = [value for value in values if not math.isnan(value)]
    on = sum(value > 0 or (value == 0 and zero == "on") for value in values)
    off = sum(value < 0 for value in values)
    shares = [count / (on + off) for count in (on, off) if count]
    return -sum(share * math.log2(share) for share in shares) if values else None


def mean_entropies(batches, zero):
    """The entropy of each neuron: the mean over the batches in which it had a value; 0 if there is none."""
    means = []
    for neuron in range(batches[0].shape[1]):
        entropies = [entropy(batch[:, neuron].tolist(), zero) for batch in batches]
        entropies = [each for each in entropies if each is not None]
        means.append(sum(entropies) / max(len(entropies), 1))
    return torch.tensor(means, dtype=torch.float64)


def collected(batches, act=None, **options):
    model = nn.Sequential(act or nn.ReLU())
    with torch.no_grad(), fe.collect(model, average="batch", channel_axis={"0": 1}, **options) as collector:
        for batch in batches:
            model(batch)
    return collector.compute()


def batches_with_gaps(neurons=5):
    """Random batches: some empty, some all NaN, some with neurons that are NaN or 0 throughout."""
    full = [torch.randn(size, neurons).round(decimals=0) for size in (3, 7, 1, 37)]
    full[1][:, 2] = NAN
    full[1][:, 0] = 0
    full[3][:, 2:4] = NAN
    return [torch.zeros(0, neurons), full[0], full[1], torch.full((2, neurons), NAN), full[2], torch.zeros(0, neurons), full[3]]


@pytest.mark.parametrize("zero", ["discard", "on"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()], ids=lambda act: type(act).__name__)
def test_mean_is_over_batches_with_values(act, zero):
    batches = batches_with_gaps()
    site = collected(batches, act)["0"]
    torch.testing.assert_close(site.entropy(zero, "batch"), mean_entropies(batches, zero))
    assert site.batches == 4
    assert site.neuron_batches.tolist() == [4, 4, 2, 3, 4]


def test_empty_batches_change_nothing():
    x = torch.randn(64, 3)
    expected = collected([x])["0"]
    for batches in ([x, x[:0]], [x[:0], x], [x[:0], x[:0], x, x[:0]]):
        site = collected(batches)["0"]
        assert torch.equal(site.entropy(average="batch"), expected.entropy(average="batch"))
        assert (site.batches, site.neuron_batches) == (1, None)


def test_batches_of_padding_count_as_none():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(3, 4), nn.GELU()

        def forward(self, x, attention_mask=None):
            return self.act(self.fc(x))

    model, x = Tokens(), torch.randn(2, 5, 3)
    padding, tokens = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
    with torch.no_grad(), fe.collect(model, average="batch") as collector:
        for mask in (tokens, padding, tokens):
            model(x, attention_mask=mask)
    with torch.no_grad(), fe.collect(model, average="batch") as expected:
        model(x)
    site = collector.compute()["act"]
    assert site.batches == 2
    torch.testing.assert_close(site.entropy(average="batch"), expected.compute()["act"].entropy(average="batch"))


def test_a_site_that_is_left_out_of_a_batch():
    model = Reads(lambda m, x, both: m.second(m.first(x)) if both else m.first(x), first=nn.ReLU(), second=nn.SiLU())
    x = torch.randn(8, 3)
    with torch.no_grad(), fe.collect(model, average="batch", channel_axis={"second": 1}) as collector:
        for both in (True, False, True, False, False):
            model(x, both)
    assert {name: site.batches for name, site in collector.compute().items()} == {"first": 5, "second": 2}


def test_sites_without_any_value_have_entropy_0():
    site = collected([torch.full((2, 3), NAN)])["0"]
    assert site.entropy(average="batch").tolist() == [0, 0, 0]
    assert (site.batches, site.nan) == (0, 6)


def test_sums_and_files_keep_the_batches_of_neurons(tmp_path):
    batches = batches_with_gaps()
    whole, first, second = collected(batches), collected(batches[:3]), collected(batches[3:])
    both = first + second
    assert both["0"].batches == whole["0"].batches
    assert torch.equal(both["0"].neuron_batches, whole["0"].neuron_batches)
    both.save(tmp_path / "s")
    for other in (both, fe.Statistics.load(tmp_path / "s"), fe.Statistics.from_state_dict(whole.state_dict())):
        torch.testing.assert_close(other["0"].entropy("on", "batch"), mean_entropies(batches, "on"))


def test_states_go_on_with_the_batches_of_neurons():
    batches = batches_with_gaps()
    model = nn.Sequential(nn.ReLU())
    first, second = (fe.collect(model, average="batch", channel_axis={"0": 1}) for _ in range(2))
    for batch in batches[:3]:
        first.update(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.update(batch)
    torch.testing.assert_close(second.compute()["0"].entropy("discard", "batch"), mean_entropies(batches, "discard"))


def test_statistics_with_as_many_batches_for_all_neurons_are_stored_as_before():
    statistics = collected([torch.randn(4, 3), torch.randn(5, 3)])
    assert statistics["0"].neuron_batches is None
    assert sorted(statistics.state_dict()) == ["0/batch_entropies", "0/counts", "sites"]
