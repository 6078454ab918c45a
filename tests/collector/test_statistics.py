import dataclasses
import json
import math
import sys

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastentropy import SiteStatistics, Statistics
from fastentropy._utils.optional import install_command
from fastentropy.collector.site_statistics import state_entropy
from fastentropy.collector.statistics import file_content

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


def test_batch_average_without_batches_tells_how_to_get_it():
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


HARD = {
    "long names": [(f"model.language_model.layers.{index}.block_sparse_moe.experts.act_fn", 3, 0) for index in range(12)],
    "long names with NaN": [(f"{'encoder.' * 20}{index}.relu", 3, 10**12 + index) for index in range(101)],
    "one letter": [("r", 1, 0)],
    "many neurons": [("relu", 100_000, 1)],
}


def make_hard(case, activation="an_activation_that_somebody_registered"):
    sites = {}
    for name, neurons, nan in HARD[case]:
        counts = torch.randint(0, 2**60 // neurons, (neurons, 3))
        sites[name] = SiteStatistics(activation, counts, nan)
    return Statistics(sites)


@pytest.mark.parametrize("case", HARD)
def test_table_fits_80_columns_and_keeps_the_names_apart(case):
    statistics = make_hard(case)
    lines = str(statistics).splitlines()
    assert max(map(len, lines)) <= 80
    rows = lines[2:-2]
    assert len({row.split()[0] for row in rows}) == len(statistics)


def test_table_has_the_figures_of_each_site():
    statistics = make()
    _, _, *rows, empty, summary = str(statistics).splitlines()
    for row, (name, site) in zip(rows, statistics.items(), strict=True):
        counts = site.counts.tolist()
        bits = sum(entropy(off, on) for off, _, on in counts) / len(counts)
        values = sum(map(sum, counts)) / 1000
        assert 1 < values < 9.9
        assert row.split() == [name, "relu", str(len(counts)), f"{values:.1f}", "k", f"{bits:.3f}", "0%", "0%"]
    mean = sum(statistics.layer_entropy().values()) / 2
    assert (empty, summary) == ("", f"2 sites, 6 neurons, mean layer entropy {mean:.3f} bits")


@pytest.mark.parametrize("nan", [0, 7])
def test_table_shows_nan_where_some_site_has_it(nan):
    counts = torch.ones(2, 3, dtype=torch.int64)
    statistics = Statistics({"a": SiteStatistics("relu", counts), "b": SiteStatistics("relu", counts, nan)})
    lines = str(statistics).splitlines()
    assert lines[0].split()[-1] == ("NaN" if nan else "on")
    assert [line.split()[-1] for line in lines[2:4]] == (["0", "7"] if nan else ["0%", "0%"])


def test_no_sites_are_one_line():
    assert str(Statistics({})) == "no sites: nothing was counted"
    assert repr(Statistics({})) == "<Statistics: 0 sites, 0 neurons>"


def test_repr_is_short():
    counts = torch.zeros(4800, 3, dtype=torch.int64)
    assert repr(Statistics({"relu": SiteStatistics("relu", counts)})) == "<Statistics: 1 site, 4 800 neurons>"


@given(COUNTS)
def test_dead_is_never_on_and_always_on_is_never_off_nor_zero(rows):
    site = SiteStatistics("relu", torch.tensor(rows))
    assert site.observed.tolist() == [sum(row) > 0 for row in rows]
    assert site.dead.tolist() == [on == 0 and off + zero > 0 for off, zero, on in rows]
    assert site.always_on.tolist() == [off == zero == 0 and on > 0 for off, zero, on in rows]
    assert site.observations == sum(map(sum, rows))


def test_shares_are_of_the_neurons_that_were_observed():
    site = SiteStatistics("relu", torch.tensor([[0, 0, 0], [5, 0, 0], [0, 3, 0], [0, 0, 4], [1, 0, 3]]))
    unobserved = SiteStatistics("relu", torch.zeros(3, 3, dtype=torch.int64))
    row, nothing = Statistics({"site": site, "unobserved": unobserved}).to_dict().values()
    assert (row["dead"], row["always_on"]) == (2 / 4, 1 / 4)
    assert (row["off"], row["zero"], row["on"]) == (6 / 16, 3 / 16, 7 / 16)
    assert [nothing[key] for key in ("neurons", "observations", "dead", "always_on", "on")] == [3, 0, 0, 0, 0]


def test_dictionary_goes_through_json():
    rows = make(3).to_dict()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert list(rows) == list(make())
    assert rows["head/relu:1"]["nan"] == 3


@pytest.mark.parametrize("options", [{}, {"zero": "on"}, {"average": "batch"}])
def test_tables_have_the_entropy_that_is_asked_for(options):
    statistics = make(batches=2)
    expected = statistics.layer_entropy(**options)
    assert {name: row["entropy"] for name, row in statistics.to_dict(**options).items()} == expected
    assert statistics.to_pandas(**options)["entropy"].to_dict() == expected


def test_data_frame_has_the_rows_and_columns_of_the_dictionary():
    statistics = make(2)
    frame = statistics.to_pandas()
    assert frame.index.name == "site"
    assert frame.to_dict("index") == statistics.to_dict()
    assert pandas.api.types.is_integer_dtype(frame["observations"])
    assert list(Statistics({}).to_pandas().columns) == list(frame.columns)


@pytest.mark.slow
def test_plot_draws_the_layer_entropies():
    statistics = make(batches=2)
    layers = statistics.plot(zero="on", average="batch").axes[0]
    expected = statistics.layer_entropy("on", "batch")
    assert [bar.get_width() for bar in layers.patches] == pytest.approx(list(expected.values()))


@pytest.mark.parametrize(
    ("missing", "method", "message"),
    [
        ("pandas", "to_pandas", "stats.to_pandas() needs pandas: pip install pandas"),
        ("matplotlib", "plot", f"stats.plot() needs matplotlib: {install_command('cli')}"),
    ],
)
def test_a_missing_library_is_named_with_its_installation(monkeypatch, missing, method, message):
    monkeypatch.delitem(sys.modules, "fastentropy.reporting.plots", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError) as raised:
        getattr(make(), method)()
    assert str(raised.value) == message


def test_loaded_statistics_look_as_they_did(tmp_path):
    statistics = make(1, batches=3)
    statistics.save(tmp_path / "s")
    assert str(Statistics.load(tmp_path / "s")) == str(statistics)


NOTES = ("conv.relu: COO tensors were not counted", f"{'encoder.' * 30}relu was not counted", "a note of two\nlines")


def with_notes(case="long names", notes=NOTES):
    sites = dict(make_hard(case))
    marked = {
        name: dataclasses.replace(site, axis_is_inferred=not index % 2, channel_axis=-1 - index)
        for index, (name, site) in enumerate(sites.items())
    }
    return Statistics(marked, notes)


@pytest.mark.parametrize("case", HARD)
def test_table_marks_inferred_axes_and_shows_notes(case):
    statistics = with_notes(case)
    lines = str(statistics).splitlines()
    assert max(map(len, lines)) <= 80
    rows = lines[2 : 2 + len(statistics)]
    assert [row.split()[0].endswith("*") for row in rows] == [site.axis_is_inferred for site in statistics.values()]
    assert len({row.split()[0] for row in rows}) == len(statistics)
    assert sum(line.startswith("* ") for line in lines) == 1
    shown = "".join("".join(lines[3 + len(statistics) :]).split())
    assert all("".join(note.split()) in shown for note in NOTES)


def test_table_without_inferred_axes_has_no_asterisk():
    assert "*" not in str(make())
    assert str(Statistics({}, ["nothing could be counted"])).splitlines()[1:] == ["nothing could be counted"]


def test_notes_and_marks_are_saved(tmp_path):
    statistics = with_notes()
    statistics.save(tmp_path / "s")
    for loaded in (Statistics.load(tmp_path / "s"), Statistics.from_state_dict(statistics.state_dict())):
        assert loaded.notes == NOTES
        assert [site.axis_is_inferred for site in loaded.values()] == [site.axis_is_inferred for site in statistics.values()]
        assert [site.channel_axis for site in loaded.values()] == [-1 - index for index in range(len(statistics))]


def test_files_without_notes_and_marks_load(tmp_path):
    statistics = make(1, batches=2)
    tensors, metadata = file_content(statistics)
    sites = [
        {key: value for key, value in site.items() if key not in ("axis_is_inferred", "channel_axis")}
        for site in statistics.state_dict()["sites"]
    ]
    save_file(tensors, tmp_path / "s", {"fastentropy_sites": json.dumps(sites)})
    assert set(metadata) == {"fastentropy_sites"}
    loaded = Statistics.load(tmp_path / "s")
    assert_same(loaded, statistics)
    assert loaded.notes == ()
    assert not any(site.axis_is_inferred for site in loaded.values())
    assert [site.channel_axis for site in loaded.values()] == [None, None]


def test_sum_keeps_each_note_once_and_every_mark():
    left, right = with_notes(notes=["a", "b"]), Statistics(make_hard("long names"), ["b", "c"])
    for both in (left + right, right + left):
        assert sorted(both.notes) == ["a", "b", "c"]
        assert [site.axis_is_inferred for site in both.values()] == [site.axis_is_inferred for site in left.values()]


@pytest.mark.parametrize(("left", "right", "both"), [(-1, -1, -1), (-3, -1, None), (-1, None, None), (None, None, None)])
def test_sum_keeps_a_channel_axis_that_both_have(left, right, both):
    counts = torch.ones(2, 3, dtype=torch.int64)
    sites = [SiteStatistics("relu", counts, channel_axis=axis) for axis in (left, right)]
    assert (sites[0] + sites[1]).channel_axis == both
