import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy import Site
from fastentropy.collector.counters import Counters, Layout

CPU = torch.device("cpu")
SITES = [Site("a", "relu", 3, 1), Site("b", "gelu", 5, 1), Site("c", "relu", 1, 1)]


def fill(counters, site, value):
    view = counters.of(site, CPU)
    view.counts.add_(value)
    view.positions.add_(value)
    counters.add_positions(site, 10 * value)


def total_of(counters, site):
    """The counts and the positions of one site."""
    return counters.totals([site])[site.name]


@pytest.fixture
def layout():
    return Layout()


def test_the_views_of_a_layout_that_is_known_share_one_buffer(layout):
    for site in SITES:
        layout.slot(site)
    counters = Counters(layout)
    storages = {counters.of(site, CPU).counts.untyped_storage().data_ptr() for site in SITES}
    assert len(storages) == 1
    assert sum(buffer.numel() for buffer in counters.buffers[CPU].values()) == 3 * 9 + 3


def test_sites_that_come_later_do_not_move_the_others(layout):
    counters = Counters(layout)
    before = counters.of(SITES[0], CPU).counts
    address = before.data_ptr()
    fill(counters, SITES[1], 2)
    before += 1
    assert counters.of(SITES[0], CPU).counts.data_ptr() == address
    assert total_of(counters, SITES[0])[0].tolist() == [[1, 1, 1]] * 3
    assert total_of(counters, SITES[1])[1] == 22


@pytest.mark.parametrize("known_before", [0, 1, 2, 3])
def test_sums_are_right_however_the_sites_were_met(layout, known_before):
    total = Counters(layout)
    for site in SITES[:known_before]:
        total.of(site, CPU)
    for _ in range(3):
        part = Counters(layout)
        for value, site in enumerate(SITES, 1):
            fill(part, site, value)
        total.add(part)
    for value, site in enumerate(SITES, 1):
        counts, positions = total_of(total, site)
        assert counts.tolist() == [[3 * value] * 3] * site.neurons
        assert positions == 3 * 11 * value


def test_sites_that_were_not_met_since_clearing_add_nothing(layout):
    total, part = Counters(layout), Counters(layout)
    for site in SITES:
        fill(part, site, 1)
    total.add(part)
    part.clear()
    fill(part, SITES[1], 4)
    total.add(part)
    assert [total_of(total, site)[1] for site in SITES] == [11, 55, 11]


def test_clearing_keeps_addresses(layout):
    counters = Counters(layout)
    fill(counters, SITES[0], 3)
    address = counters.of(SITES[0], CPU).counts.data_ptr()
    counters.clear()
    assert total_of(counters, SITES[0])[1] == 0
    assert counters.of(SITES[0], CPU).counts.data_ptr() == address


def test_counts_go_beyond_32_bits(layout):
    total = Counters(layout)
    part = Counters(layout)
    fill(part, SITES[0], 2**33)
    total.add(part)
    total.add(part)
    assert total_of(total, SITES[0])[0].tolist() == [[2**34] * 3] * 3


def test_counters_made_in_inference_mode_can_be_added_to_outside(layout):
    with torch.inference_mode():
        counters = Counters(layout)
        fill(counters, SITES[0], 1)
    fill(counters, SITES[0], 1)
    assert total_of(counters, SITES[0])[0].sum() == 18


@pytest.mark.slow
def test_counters_of_a_7b_decoder_take_24_bytes_per_neuron():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):  # 32 layers of 11,008 neurons: the shape of Llama 7B
        config = transformers.LlamaConfig(use_cache=False, attn_implementation="eager")
        model = transformers.LlamaForCausalLM(config)
        inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    assert sum(parameter.numel() for parameter in model.parameters()) > 6.7e9
    counters = Counters(Layout())
    sites = fe.find_sites(model, inputs)
    for site in sites:
        counters.of(site, CPU)
    held = sum(buffer.nbytes for buffer in counters.buffers[CPU].values())
    assert [site.neurons for site in sites] == [11_008] * 32
    assert held == 24 * 32 * 11_008 + 8 * 32  # 8.5 MB; and one number of positions for each site


@pytest.mark.parametrize("before", [2**31 - 5, 2**32 - 5, 2**62])
def test_counts_go_on_beyond_32_bits(before, tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with fe.collect(model) as collector:
        model(torch.randn(7, 2))
        once = collector.compute()["1"]
        state = collector.state_dict()
        state["1/counts"] = state["1/counts"] + before
        collector.load_state_dict(state)
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.fill_(1.0)
        model(torch.randn(11, 2))
    collector.compute().save(tmp_path / "statistics.safetensors")
    counts = fe.Statistics.load(tmp_path / "statistics.safetensors")["1"].counts
    assert torch.equal(counts, once.counts + before + torch.tensor([0, 0, 11]))


def operators(call):
    """How many operators of PyTorch run in a call, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key: event.count for event in profiler.key_averages()}


def test_buffers_are_few_when_sites_come_one_by_one(layout):
    counters, addresses = Counters(layout), {}
    sites = [Site(str(index), "relu", 1 + index % 5, 1) for index in range(3000)]
    for value, site in enumerate(sites):
        fill(counters, site, value)
        addresses[site.name] = counters.of(site, CPU).counts.data_ptr()
    assert len(counters.buffers[CPU]) < 100
    assert sum(buffer.numel() for buffer in counters.buffers[CPU].values()) <= 1.1 * layout.size
    assert addresses == {site.name: counters.of(site, CPU).counts.data_ptr() for site in sites}
    for value, (counts, positions) in enumerate(counters.totals(sites).values()):
        assert (counts.unique().tolist(), positions) == ([value], 11 * value)


@pytest.mark.parametrize("order", ["as met", "last first"])
def test_slots_that_straddle_the_end_of_a_buffer(layout, order):
    """A buffer may end inside of a slot. Such a slot lies in the next buffer, whichever site is asked for first."""
    sites = [Site(str(index), "relu", (index * 7) % 11 + 1, 1) for index in range(200)]
    counters, expected = Counters(layout), {}
    for first in range(0, len(sites), 3):
        new = sites[first : first + 3]
        for site in new:
            layout.slot(site)
        for site in new if order == "as met" else reversed(new):
            view = counters.of(site, CPU)
            values = torch.randint(100, view.slot.shape)
            view.slot.add_(values)
            expected[site.name] = values
    for name, (counts, positions) in counters.totals(sites).items():
        assert counts.flatten().tolist() == expected[name][:-1].tolist()
        assert positions == expected[name][-1]
    total = counters.empty_like()
    assert counters.same_layout(total)
    for site in sites:
        counters.of(site, CPU)
        counters.add_positions(site, 0)
    for _ in range(2):
        total.add(counters)
    for name, (counts, positions) in total.totals(sites).items():
        assert counts.flatten().tolist() == (2 * expected[name][:-1]).tolist()
        assert positions == 2 * expected[name][-1]


@pytest.mark.parametrize("sites", [50, 200])
def test_adding_a_first_pass_takes_an_operation_for_each_buffer(sites, layout):
    total, part = Counters(layout), Counters(layout)
    for index in range(sites):
        fill(part, Site(str(index), "relu", 3, 1), 1)
    ran = operators(lambda: total.add(part))
    assert ran["aten::zeros"] == 1
    assert ran["aten::add_"] == len(part.buffers[CPU]) < sites / 2
    assert operators(lambda: total.totals(part.sites.values()))["aten::add_"] == 1


@pytest.mark.parametrize("calls", [100, 400])
def test_operations_of_a_pass_grow_with_its_calls(calls):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.GELU()

        def forward(self, x):
            for _ in range(calls):
                x = self.act(x)
            return x

    model, x = nn.Sequential(nn.Linear(3, 4), Cell()).eval(), torch.randn(2, 3)
    with torch.no_grad(), fe.collect(model) as collector:
        first = operators(lambda: model(x))
        later = operators(lambda: model(x))
    compute = operators(collector.compute)
    assert sum(first.values()) < 40 * calls
    assert sum(later.values()) < 20 * calls
    assert sum(compute.values()) < 20 * calls
    assert len(collector.compute()) == calls
    assert collector.compute()["1.act:7"].observations == 16
