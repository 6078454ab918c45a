"""Records of `fastentropy bench`, and their tables, plots and comparisons."""

import dataclasses
import json
import pickle
from xml.etree import ElementTree

import pytest

from fastentropy.benchmarks import plots
from fastentropy.benchmarks.changes import compare, format_changes
from fastentropy.benchmarks.kernels import BASELINES, OPERATIONS
from fastentropy.benchmarks.measurements import Measurement, Quartiles
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.runner import BENCHMARKS, files_to_write, parse_sizes
from fastentropy.benchmarks.tables import format_case


def around(median, spread=0.01):
    return Quartiles(median * (1 - spread), median, median * (1 + spread))


def record(*measurements, benchmark="kernels", machine="A machine, 2 threads", **fields):
    return Record(
        benchmark, machine, "2026-02-03", {"torch": "2.11.0"}, "0123456789ab", "fastentropy bench", measurements, **fields
    )


def timed(case="a case", operation="ours", milliseconds=1.0, spread=0.01, **fields):
    return Measurement(case, operation, around(milliseconds, spread), around(1.0, spread), **fields)


def kernels(slow=1.0, layouts=("rows", "planes"), dtypes=("float32", "bfloat16"), sizes=(2**20, 2**24), skipped=()):
    """Yield made-up measurements of all operations, with the baselines at the largest size."""
    for dtype in dtypes:
        for layout in layouts:
            for size in sizes:
                facts = {"layout": layout, "dtype": dtype, "activation": "relu", "values": size, "cuda_graph": False}
                for index, operation in enumerate(OPERATIONS, 1):
                    name = f"relu on {layout}, {size}, {dtype}"
                    if operation in BASELINES and (dtype, operation) in skipped:
                        yield Measurement(name, operation, facts=facts, skipped="no")
                    elif operation not in BASELINES or size == max(sizes):
                        yield Measurement(
                            name, operation, around(index * slow), around(index), 8 * size, size / index, 100 / index, facts
                        )


# Records ----------------------------------------------------------------------------------------------------------------


def test_record_survives_saving(tmp_path):
    written = record(*kernels(), Measurement("a case", "baseline", skipped="no compiler"), complete=True)
    written.save(tmp_path / "record.json")
    assert Record.load(tmp_path / "record.json") == written


def test_new_record_describes_the_machine():
    begun = Record.begin("fuse", "cpu", "fastentropy bench fuse")
    assert (begun.benchmark, begun.command, begun.measurements, begun.complete) == ("fuse", "fastentropy bench fuse", (), False)
    assert "thread" in begun.machine
    assert {"torch"} <= begun.versions.keys() <= {"torch", "triton"}


def damaged(change):
    values = json.loads(json.dumps(WHOLE))
    change(values)
    return json.dumps(values).encode()


WHOLE = {
    **dict.fromkeys(("benchmark", "machine", "date", "commit", "command"), "x"),
    "versions": {"torch": "2.11.0"},
    "measurements": [{"case": "a", "operation": "b", "milliseconds": {"lower": 1, "median": 2, "upper": 3}}],
    "complete": True,
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"3",
        b"\xff\xfe",
        pickle.dumps(WHOLE),
        json.dumps(WHOLE).encode()[:-9],
        b'{"recipe": "digits", "steps": []}',
        damaged(lambda values: values.pop("machine")),
        damaged(lambda values: values.update(machine=3)),
        damaged(lambda values: values.update(seed=1)),
        damaged(lambda values: values.update(versions={})),
        damaged(lambda values: values.update(versions=None)),
        damaged(lambda values: values.update(measurements=None)),
        damaged(lambda values: values.update(measurements=[1])),
        damaged(lambda values: values["measurements"][0].pop("case")),
        damaged(lambda values: values["measurements"][0].update(operation=1)),
        damaged(lambda values: values["measurements"][0].update(ratio=1)),
        damaged(lambda values: values["measurements"][0].update(ratio={"lower": 1})),
        damaged(lambda values: values["measurements"][0]["milliseconds"].update(lower=0)),
        damaged(lambda values: values["measurements"][0]["milliseconds"].update(median="2")),
        damaged(lambda values: values["measurements"][0]["milliseconds"].update(median=float("nan"))),
        damaged(lambda values: values["measurements"][0]["milliseconds"].update(upper=float("inf"))),
    ],
)
def test_damaged_or_foreign_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "whole.json").write_text(json.dumps(WHOLE))
    assert Record.load(tmp_path / "whole.json").measurements[0].milliseconds == (1, 2, 3)
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json is damaged or no record of `fastentropy bench`; name a file") as error:
        Record.load(path)
    assert "\n" not in str(error.value)


def test_cases_group_measurements_in_order():
    cases = record(timed("two", "a"), timed("one", "a"), timed("two", "b")).cases()
    assert {name: [each.operation for each in case] for name, case in cases.items()} == {"two": ["a", "b"], "one": ["a"]}
    assert list(cases) == ["two", "one"]


# Tables -----------------------------------------------------------------------------------------------------------------


def test_table_rows():
    facts = [{"peak_bytes": 3_000_000}, {"peak_bytes": 3_500_000}]
    table = format_case(
        [
            Measurement("a case", "plain", around(2.0), around(1.0), 8, 100.4, 100.0, facts[0]),
            Measurement("a case", "ours", around(3.0), Quartiles(1.4, 1.5, 1.61), 8, 66.9, 66.7, facts[1]),
            Measurement("a case", "baseline", skipped="no compiler"),
        ]
    )
    title, head, _, _, ours, skipped = table.splitlines()
    assert title == "a case"
    assert head.split() == ["ms", "times", "baseline", "quartiles", "GB/s", "of", "copy", "added", "MB"]
    assert ours.split() == ["ours", "3.00", "1.50", "1.40", "to", "1.61", "66.9", "67", "%", "0.50"]
    assert skipped == "baseline was skipped: no compiler"


LONG = {
    "kernels": [
        timed("relu on planes, 1338 × 64 × 56 × 56, bfloat16, CUDA graphs", name, 1234.5, bytes=2**30, **figures)
        for name in OPERATIONS
        for figures in [{"gigabytes_per_second": 3012.4, "percent_of_roof": 100.2}]
    ],
    "collect": [
        timed("llama, 8 × 1024, bfloat16, CUDA graphs", name, 12345.6, facts={"peak_bytes": size})
        for name, size in [("plain", 60 * 10**9), ("published procedure", 78 * 10**9), ("compiled hooks", 61 * 10**9)]
    ],
    "fuse": [
        timed("efficientnet_b0 half, 4 × 3 × 224 × 224, bfloat16, CUDA graphs", name, 1234.5)
        for name in ("folded", "torch.compile, frozen")
    ],
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("slow", [1, 1000], ids=["usual", "slow baselines"])
def test_tables_fit_80_columns(name, slow):
    why = "Failed: a reason of many words, such as that of a compiler which is not there, or is, and does not like the code"
    measurements = [dataclasses.replace(each, ratio=around(12.34 * slow, 0.4)) for each in LONG[name]]
    table = format_case([*measurements, Measurement("a case", "histogram observer", skipped=why)])
    assert max(map(len, table.splitlines())) <= 80
    assert all(each.operation[:9] in table for each in measurements)
    before = record(*measurements, benchmark=name, machine="A processor with a very long name @ 2.60 GHz, 64 threads")
    after = record(*measurements, benchmark=name, machine="NVIDIA H100 80GB HBM3")
    assert max(map(len, format_changes(before, after).splitlines())) <= 80


# Comparisons ------------------------------------------------------------------------------------------------------------


def test_changes_and_noise_are_shares_of_medians():
    (change,) = compare(record(timed(milliseconds=2.0, spread=0.02)), record(timed(milliseconds=3.0, spread=0.04)))
    assert (change.case, change.operation) == ("a case", "ours")
    assert change.change == pytest.approx(0.5)
    assert change.noise == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("milliseconds", "spread", "mark"),
    [(1.1, 0.01, "slower"), (0.9, 0.01, "faster"), (1.1, 0.1, ""), (0.9, 0.1, ""), (1.0, 0.01, "")],
)
def test_changes_beyond_noise_are_marked(milliseconds, spread, mark):
    text = format_changes(record(timed(spread=spread)), record(timed(milliseconds=milliseconds, spread=spread)))
    (row,) = (line for line in text.splitlines() if line.startswith("ours"))
    assert row.split()[5:] == ([mark] if mark else [])
    assert f"{int(bool(mark))} of 1 changed by more than the noise within the two runs" in text


def test_only_common_measurements_are_compared():
    old = record(timed("a case"), timed("gone"), timed("a case", "baseline"))
    new = record(timed("new"), timed("a case"), Measurement("a case", "baseline", skipped="no compiler"))
    assert [(change.case, change.operation) for change in compare(old, new)] == [("a case", "ours")]
    assert "Nothing was measured in both records" in format_changes(record(timed("gone")), new)


@pytest.mark.parametrize(("machine", "said"), [("A machine, 2 threads", False), ("A machine, 4 threads", True)])
def test_other_machine_is_mentioned(machine, said):
    text = format_changes(record(timed()), record(timed(), machine=machine))
    assert ("of two machines" in text) is said
    assert "A machine, 2 threads, 2026-02-03, commit 0123456789ab, torch 2.11.0" in text


# Pictures ---------------------------------------------------------------------------------------------------------------


#: Two layouts whose tensors have nearly the same number of values, as in the records.
SIZES_OF_LAYOUTS = (("rows", 2**24), ("planes", 2**24 + 2**16))


def figure_of(monkeypatch, drawn, path):
    """Return the figure that is drawn for a record."""
    figures = []
    for name in ("_roofline", "_ratios"):
        original = getattr(plots, name)
        monkeypatch.setattr(plots, name, lambda *args, _draw=original: figures.append(_draw(*args)) or figures[-1])
    plots.plot_record(drawn, path)
    return figures[0]


def test_roofline_has_a_panel_per_layout_and_dtype(monkeypatch, tmp_path):
    figure = figure_of(monkeypatch, record(*kernels()), tmp_path / "plot.png")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["rows, float32", "planes, float32", "rows, bfloat16", "planes, bfloat16"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_roofline_shows_all_bandwidths(monkeypatch, tmp_path):
    faster = [*kernels(layouts=["rows"]), *kernels(layouts=["planes"], sizes=(2**20, 2**26))]
    figure = figure_of(monkeypatch, record(*faster), tmp_path / "plot.png")
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert len(lines) == len(OPERATIONS)
        assert list(lines["fastest copy (the roof)"].get_ydata()) == list(lines["fastest copy (the roof)"].get_xdata())
        assert axes.get_ylim()[0] == 0
        assert axes.get_ylim()[1] >= max(max(line.get_ydata()) for line in lines.values())


def test_roofline_marks_every_baseline_that_ran(monkeypatch, tmp_path):
    gone = [("float32", "torch.compile"), ("bfloat16", "PyTorch counting")]
    figure = figure_of(monkeypatch, record(*kernels(skipped=gone)), tmp_path / "plot.png")
    marks = {(line.get_label(), line.get_marker()) for axes in figure.axes for line in axes.get_lines()}
    assert len(marks) == len(OPERATIONS)
    assert len({mark for _, mark in marks}) == len(OPERATIONS)
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {name for name, _ in marks}


def test_sizes_are_labelled_in_units_of_1024(tmp_path):
    plots.plot_record(record(*kernels()), tmp_path / "plot.svg")
    texts = [element.text for element in ElementTree.parse(tmp_path / "plot.svg").iter() if element.text]
    assert {"1 M", "16 M"} <= set(texts)
    assert "A machine, 2 threads, 2026-02-03, torch 2.11.0" in texts


def test_roofline_of_a_gpu_prefers_cuda_graphs(monkeypatch, tmp_path):
    eager = list(kernels(sizes=[2**24], layouts=["rows"], dtypes=["float32"]))
    graphs = [
        dataclasses.replace(
            each, gigabytes_per_second=2.0 * each.gigabytes_per_second, facts={**each.facts, "cuda_graph": True}
        )
        for each in eager
        if each.operation not in BASELINES
    ]
    (axes,) = figure_of(monkeypatch, record(*graphs, *eager), tmp_path / "plot.png").axes
    shown = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert shown["fastest copy (the roof)"] == [2.0 * 2**24]
    assert shown["PyTorch counting"] == [eager[4].gigabytes_per_second]


def test_roof_is_the_fastest_copy_of_a_size(monkeypatch, tmp_path):
    slow, fast = (list(kernels(sizes=[size], layouts=[layout], dtypes=["float32"])) for layout, size in SIZES_OF_LAYOUTS)
    faster = [dataclasses.replace(each, gigabytes_per_second=3.0 * each.gigabytes_per_second) for each in fast]
    far = list(kernels(sizes=[2**26], layouts=["planes"], dtypes=["float32"]))
    figure = figure_of(monkeypatch, record(*slow, *faster, *far), tmp_path / "plot.png")
    roofs = [
        list(line.get_ydata())
        for axes in figure.axes
        for line in axes.get_lines()
        if line.get_label() == "fastest copy (the roof)"
    ]
    assert roofs == [[3.0 * SIZES_OF_LAYOUTS[1][1]], [3.0 * SIZES_OF_LAYOUTS[1][1], 2**26]]


@pytest.mark.parametrize("name", ["collect", "fuse"])
def test_ratio_plot_has_one_axis_and_a_row_per_case(monkeypatch, tmp_path, name):
    measurements = [
        timed("one", "plain"),
        timed("one", "ours", 2),
        timed("two", "plain"),
        Measurement("two", "baseline", skipped="no"),
    ]
    figure = figure_of(monkeypatch, record(*measurements, benchmark=name), tmp_path / "plot.pdf")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    points = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_marker() not in (None, "None")]
    assert points == [[[each.ratio.median, row]] for each, row in zip(measurements[:3], (0, 0, 1), strict=True)]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "ours"]


# Sizes and files --------------------------------------------------------------------------------------------------------


def test_parse_sizes_in_units_of_1024():
    assert parse_sizes("16M, 64k,1M,7,64k") == [7, 64 * 2**10, 2**20, 16 * 2**20]


@pytest.mark.parametrize("text", ["0", "-1", "1.5M", "1T", "64K", "1M,,2M", ",", " ", "many"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is no size; give numbers such as 16 or 64k,1M,16M"):
        parse_sizes(text)


def test_default_paths_of_record_and_plot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, picture = files_to_write("fuse", None, None)
    assert path.match("runs/bench-fuse-????????-??????.json")
    assert picture == path.with_suffix(".png")
    assert path.parent.is_dir()


def test_named_paths_of_record_and_plot(tmp_path):
    assert files_to_write("fuse", tmp_path / "a.json", None) == (tmp_path / "a.json", tmp_path / "a.png")
    assert files_to_write("fuse", tmp_path / "a.json", tmp_path / "b.svg") == (tmp_path / "a.json", tmp_path / "b.svg")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_have_dtypes_and_rounds_for_each_device(name):
    assert BENCHMARKS[name].dtypes.keys() == {"cpu", "cuda"}
    assert BENCHMARKS[name].rounds >= 5
