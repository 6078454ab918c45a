"""The state of a collector: its counters, their memory, and what is saved."""

import pytest
import torch
from torch import nn

from fastentropy import collect
from tests._helpers.statistics import counted


def test_reset_forgets_but_stays_attached(network, images):
    network.eval()
    with collect(network, average="batch") as collector:
        network(images)
        collector.reset()
        network(images[:1])
    site = collector.compute()["gelu"]
    assert (int(site.counts.sum()), site.batches) == (8, 1)


def test_statistics_do_not_change_when_more_is_counted(network, images):
    network.eval()
    with collect(network) as collector:
        network(images)
        early = collector.compute()
        before = early["gelu"].counts.clone()
        network(images)
    assert torch.equal(early["gelu"].counts, before)


def test_memory_is_the_counters():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    with collect(model) as collector:
        model(torch.randn(4, 8))
        model(torch.randn(4, 8))
        buffers = collector._counting._total.buffers[torch.device("cpu")]
    assert [buffer.numel() for buffer in buffers.values()] == [3 * 96 + 2]


def test_a_state_can_be_taken_up_by_a_new_collector(network, images, tmp_path):
    network.eval()
    with collect(network, average="batch") as whole:
        for batch in (images, images[:1], images[1:]):
            network(batch)
    with collect(network, average="batch") as first:
        network(images)
        network(images[:1])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = collect(network, average="batch")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    with second:
        network(images[1:])
    for name, site in whole.compute().items():
        other = second.compute()[name]
        assert torch.equal(site.counts, other.counts)
        torch.testing.assert_close(site.entropy(average="batch"), other.entropy(average="batch"))
    second.load_state_dict(first.state_dict())
    assert counted(second) == counted(first)


def test_a_state_of_another_model_changes_nothing(network, images):
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with collect(other) as foreign:
        other(torch.zeros(1, 2))
    with collect(network.eval()) as collector:
        network(images)
        before = counted(collector)
        for state, lack in (
            ({}, "'sites' is missing"),
            ({"sites": [{"name": "relu1"}]}, "'relu1/counts' is missing"),
            ({"sites": 3}, "'int' object is not iterable"),
            ({**foreign.state_dict(), "1/counts": torch.zeros(3)}, r"counts are torch.float32 \[3\]"),
        ):
            with pytest.raises(ValueError, match=rf"not the state of statistics .*: {lack}"):
                collector.load_state_dict(state)
        state = foreign.state_dict()
        state = {"sites": [{**state["sites"][0], "name": "relu1"}], "relu1/counts": state["1/counts"]}
        with pytest.raises(ValueError, match="'relu1' is relu with 6 neurons in this model and relu with 3 in the state"):
            collector.load_state_dict(state)
    assert counted(collector) == before


def test_a_pass_of_many_sites_is_added_in_one_operation():
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.ReLU()))).eval()
    x = torch.randn(2, 4)
    with torch.inference_mode(), collect(model) as collector:
        for _ in range(4):
            model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(x)
    operators = {event.key: event.count for event in profiler.key_averages()}
    assert operators["aten::add_"] == operators["aten::zero_"] == 1
    assert counted(collector) == {f"{2 * index + 1}": 5 * 8 for index in range(20)}


def test_a_site_that_is_met_late_is_added_with_the_others():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.layer = nn.ReLU(), nn.GELU(), nn.Linear(4, 4)

        def forward(self, x, both):
            x = self.first(self.layer(x))
            return self.second(self.layer(x)) if both else x

    model = Sometimes().eval()
    x = torch.randn(2, 4)
    with torch.inference_mode(), collect(model, channel_axis={"second": 1}) as collector:
        model(x, False)
        for _ in range(4):
            model(x, True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(x, True)
    operators = {event.key: event.count for event in profiler.key_averages()}
    assert operators["aten::zero_"] == 2  # a buffer for each time that sites were met
    assert counted(collector) == {"first": 6 * 8, "second": 5 * 8}


def test_reset_keeps_the_addresses_of_the_counters(network, images):
    with collect(network.eval()) as collector:
        network(images)
        network(images)

        def addresses():
            return [buffer.data_ptr() for buffers in collector._counting._total.buffers.values() for buffer in buffers.values()]

        before = addresses()
        collector.reset()
        with pytest.raises(RuntimeError, match="nothing was counted"):
            collector.compute()
        network(images)
        assert addresses() == before
    assert counted(collector)["gelu"] == 32
