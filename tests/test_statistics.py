import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastentropy import SiteStatistics, Statistics
from fastentropy.statistics import state_entropy

COUNTS = st.lists(st.tuples(*[st.integers(0, 2**40)] * 3), min_size=1, max_size=8)


def entropy(off, on):
    """The formula of the paper, written plainly for one neuron."""
    total = off + on
    parts = [count / total for count in (off, on) if count] if total else []
    return -sum(p * math.log2(p) for p in parts)


def make(seed=0, batches=0):
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name, neurons in (("features.relu", 4), ("head/relu:1", 2)):
        counts = torch.randint(0, 1000, (neurons, 3), generator=generator)
        batch_entropies = torch.rand(neurons, 2, generator=generator, dtype=torch.float64) if batches else None
        sites[name] = SiteStatistics("relu", counts, seed, batch_entropies, batches)
    return Statistics(sites)


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        a, b = left[name], right[name]
        assert (a.activation, a.nan, a.batches) == (b.activation, b.nan, b.batches)
        assert torch.equal(a.counts, b.counts)
        assert (a.batch_entropies is None) == (b.batch_entropies is None)
        assert a.batch_entropies is None or torch.equal(a.batch_entropies, b.batch_entropies)


@given(COUNTS)
def test_entropy_discards_zero_or_counts_it_as_on(rows):
    counts = torch.tensor(rows)
    discard = torch.tensor([entropy(off, on) for off, _, on in rows], dtype=torch.float64)
    as_on = torch.tensor([entropy(off, zero + on) for off, zero, on in rows], dtype=torch.float64)
    torch.testing.assert_close(state_entropy(counts, "discard"), discard, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state_entropy(counts, "on"), as_on, rtol=1e-9, atol=1e-9)


def test_a_neuron_that_was_never_counted_has_entropy_zero():
    assert state_entropy(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [0, 0]


def test_layer_entropy_is_the_mean_over_neurons():
    statistics = Statistics({"relu": SiteStatistics("relu", torch.tensor([[1, 0, 1], [5, 9, 0]]))})
    assert statistics.layer_entropy() == {"relu": 0.5}
    assert statistics["relu"].entropy().dtype == torch.float64


@given(st.integers(0, 5), st.integers(0, 3))
def test_saved_statistics_load_as_they_were(tmp_path_factory, seed, batches):
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    statistics = make(seed, batches)
    statistics.save(path)
    assert_same(Statistics.load(path), statistics)


def test_sites_stay_in_call_order(tmp_path):
    names = [f"layer{index}.relu" for index in (10, 2, 1, 0)]
    counts = torch.ones(1, 3, dtype=torch.int64)
    Statistics({name: SiteStatistics("relu", counts) for name in names}).save(tmp_path / "s")
    assert list(Statistics.load(tmp_path / "s")) == names


def test_sum_is_that_of_both_data_sets():
    left, right = make(1), make(2)
    both = left + right
    assert all(torch.equal(both[name].counts, left[name].counts + right[name].counts) for name in left)
    assert both["features.relu"].nan == 3


def test_sum_weights_batches_equally():
    left, right = make(1, batches=2), make(2, batches=3)
    both = (left + right)["features.relu"]
    expected = (left["features.relu"].batch_entropies + right["features.relu"].batch_entropies)[:, 1] / 5
    torch.testing.assert_close(both.entropy("on", "batch"), expected)


def test_sum_of_different_sites_is_refused_by_name():
    other = Statistics({"other.relu": make()["features.relu"]})
    with pytest.raises(ValueError, match=r"other\.relu"):
        make() + other
    with pytest.raises(ValueError, match="4 neurons"):
        make()["features.relu"] + make()["head/relu:1"]


def test_batch_average_of_statistics_without_batches_says_how_to_get_it():
    with pytest.raises(ValueError, match=r"fe\.collect\(model, average='batch'\)"):
        make().layer_entropy(average="batch")


@pytest.mark.parametrize("options", [{"zero": "off"}, {"average": "epoch"}])
def test_unknown_option_is_refused(options):
    with pytest.raises(ValueError, match="expected"):
        make().layer_entropy(**options)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04N.", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.safetensors is damaged or not a statistics file"):
        Statistics.load(path)


def test_truncated_file_is_named(tmp_path):
    path = tmp_path / "s.safetensors"
    make().save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        Statistics.load(path)


def test_counts_of_another_shape_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    Statistics({"relu": SiteStatistics("relu", torch.zeros(3, 4, dtype=torch.int64))}).save(path)
    with pytest.raises(ValueError, match=r"expected torch\.int64 \[neurons, 3\]"):
        Statistics.load(path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none")
