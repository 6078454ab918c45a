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
    assert counters.total(SITES[0])[0].tolist() == [[1, 1, 1]] * 3
    assert counters.total(SITES[1])[1] == 22


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
        counts, positions = total.total(site)
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
    assert [total.total(site)[1] for site in SITES] == [11, 55, 11]


def test_clearing_keeps_addresses(layout):
    counters = Counters(layout)
    fill(counters, SITES[0], 3)
    address = counters.of(SITES[0], CPU).counts.data_ptr()
    counters.clear()
    assert counters.total(SITES[0])[1] == 0
    assert counters.of(SITES[0], CPU).counts.data_ptr() == address


def test_counts_go_beyond_32_bits(layout):
    total = Counters(layout)
    part = Counters(layout)
    fill(part, SITES[0], 2**33)
    total.add(part)
    total.add(part)
    assert total.total(SITES[0])[0].tolist() == [[2**34] * 3] * 3


def test_counters_made_in_inference_mode_can_be_added_to_outside(layout):
    with torch.inference_mode():
        counters = Counters(layout)
        fill(counters, SITES[0], 1)
    fill(counters, SITES[0], 1)
    assert counters.total(SITES[0])[0].sum() == 18


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
