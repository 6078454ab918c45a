"""The comparison of runs: its page, its picture and its table."""

import copy
import functools
import inspect
import itertools
import re
from pathlib import Path

import matplotlib
import pytest

from fastentropy.recipes.cifar10 import Cifar10
from fastentropy.reporting.compared_runs import label_runs
from fastentropy.reporting.comparison import format_comparison, plot_comparison, write_comparison
from fastentropy.reporting.comparison_plots import COLORS
from tests._helpers.histories import HOSTILE, make_run


def cifar10(model, **options):
    return make_run(recipe="cifar10", model=model, **options)


CASES = {
    "two": {"one": make_run(), "other": make_run(seed=1)},
    "models": {
        "resnet": cifar10("resnet18"),
        "swin": cifar10("swin_t", steps=6, fused=1.1),
        "mobile": cifar10("mobilenet_v2", sites=35, steps=12),
        "vgg": cifar10("vgg16_bn", finished=False),
        "elsewhere": cifar10("resnet18", machine="another processor", seed=2),
    },
    "twelve": {
        f"sweep/{criterion}/a-folder-with-a-long-name/seed{seed}": make_run(
            seed=seed,
            criterion=criterion,
            collapse="project" if seed else None,
            target_speedup=seed / 2,
            data=f"/data/of/the/project/{seed}/images",
        )
        for criterion in ("entropy", "random", "largest-first", "first")
        for seed in range(3)
    },
    "unfinished": {
        "done": make_run(),
        "begun": make_run(steps=1, finished=False),
        "waiting": make_run(steps=0, finished=False),
    },
    "nothing removed": {"one": make_run(steps=1), "other": make_run(steps=1, finished=False)},
    "alone": {"_run": make_run()},
}

MARKED_CASES = [pytest.param(name, marks=pytest.mark.slow) if name in ("twelve", "alone") else name for name in CASES]


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """Return a function that renders histories to a page."""
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"

    def write_and_read(histories):
        write_comparison(histories, path)
        return path.read_text(encoding="utf-8")

    return write_and_read


@pytest.fixture(scope="module")
def page_of(render):
    """Return a function that renders a case to a page, once."""
    return functools.cache(lambda case: render(CASES[case]))


@pytest.fixture
def draw(monkeypatch):
    """Return a function that draws histories to a figure without saving it, which takes long."""

    def without_saving(histories):
        with monkeypatch.context() as patch:
            patch.setattr("fastentropy.reporting.comparison.replace_file", lambda path, write: None)
            return plot_comparison(histories, "comparison.png")

    return without_saving


def section(page, title):
    return page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def headline(histories):
    return format_comparison(histories).split("\n\n")[0].replace("\n", " ")


@pytest.mark.parametrize("case", MARKED_CASES)
def test_page_is_self_contained_and_has_every_run(case, page_of):
    page = page_of(case)
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|\bsrc=|@import|url\((?!#)|href=\"(?!#|data:)", outside)
    assert page.count("<svg") == page.count("</svg>") == page.count("aria-label=") == 2 * 2  # for a screen and for a phone
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    for title in ("The runs", "Machines and dates"):
        assert re.findall(r'<td class="run"><code>(.*?)</code>', section(page, title)) == list(CASES[case])


def test_figures_of_a_run_are_of_its_kept_step(page_of):
    (row, _) = re.findall(r"<tr.*?</tr>", section(page_of("two"), "The runs"), re.DOTALL)[1:]
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells == ["2 of 6", "97.00 → 96.20", "4.00 → 1.60", "2.50\N{MULTIPLICATION SIGN}"]
    assert re.search(
        r"^one .* 2 of 6 +97\.00 -> 96\.20 +4\.00 -> 1\.60 +2\.50x$", format_comparison(CASES["two"]), re.MULTILINE
    )


@pytest.mark.parametrize("case", CASES)
def test_steps_are_drawn_at_their_measurements(case, draw):
    runs = {label: history for label, history in CASES[case].items() if history["steps"]}
    removed, latency = draw(CASES[case]).axes
    for index, history in enumerate(runs.values()):
        steps, kept = history["steps"], history["kept_step"]
        end = len(steps) if kept is None else kept + 1
        depths = list(itertools.accumulate(len(step["removed"]) for step in steps))
        times = [step["latency_ms"]["fused"] for step in steps]
        if kept is not None:
            times[0], times[kept] = history["latency_ms"]["dense_fused"], history["latency_ms"]["fused"]
        for axes, positions in ((removed, depths), (latency, times)):
            scores = [100 * step["test"] for step in steps]
            solid = [line for line in axes.lines if line.get_linestyle() == "-"][index]
            assert solid.get_xydata().tolist() == [list(pair) for pair in zip(positions[:end], scores[:end], strict=True)]


def test_kept_steps_stand_out_and_rejected_ones_are_hollow(draw):
    removed, latency = draw(CASES["models"] | {"begun": cifar10("resnet18", finished=False)}).axes
    finished = [history for history in CASES["models"].values() if history["kept_step"] is not None]
    for axes in (removed, latency):
        kept = [line for line in axes.lines if line.get_linestyle() == "None"]
        rejected = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert len(kept) == len(rejected) == len(finished)
        assert all(line.get_markerfacecolor() == "none" for line in rejected)
        for history, one, others in zip(finished, kept, rejected, strict=True):
            assert one.get_ydata().tolist() == [100 * history["steps"][history["kept_step"]]["test"]]
            assert others.get_ydata()[1:].tolist() == [100 * history["steps"][-1]["test"]]


RESNET18 = [(0, 92.47), (2, 92.82), (7, 92.40), (8, 92.10), (9, 90.35), (11, 86.53), (16, 77.74)]


@pytest.mark.parametrize(
    ("model", "points"),
    [
        ("resnet18", RESNET18),
        ("ResNet-18", RESNET18),
        ("swin_t", [(0, 91.66), (7, 91.41), (8, 90.83)]),
        ("mobilenet_v2", [(0, 93.65), (12, 93.16), (15, 92.77), (17, 92.05), (29, 88.43)]),
        ("vgg16_bn", [(0, 93.50), (8, 93.61), (10, 93.04), (14, 90.38)]),
        ("resnet34", []),
    ],
)
def test_published_points_match_model_and_recipe(model, points, draw):
    for recipe in ("cifar10", "digits"):
        histories = {"one": make_run(recipe=recipe, model=model), "other": make_run(recipe=recipe, model=model, seed=1)}
        removed, latency = (
            [tuple(point) for line in axes.lines if line.get_linestyle() == ":" for point in line.get_xydata().tolist()]
            for axes in draw(histories).axes
        )
        expected = points if recipe == "cifar10" else []
        assert removed == [(removed_, pytest.approx(test)) for removed_, test in expected]
        assert latency == []


def test_default_model_of_a_recipe():
    default = inspect.signature(Cifar10).parameters["model"].default
    for options in ({}, {"model": None}):
        histories = {"one": make_run(recipe="cifar10", **options), "other": cifar10(default, seed=1)}
        assert re.search(r"^run +seed +removed", format_comparison(histories), re.MULTILINE)
        assert f"model {default}" in format_comparison(histories)


def test_published_results_are_in_a_table_with_source(page_of):
    assert "EASIER" not in page_of("two")
    table = section(page_of("models"), "Published results")
    assert "Source: EASIER, arXiv 2404.18949, Table 5" in table
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)[1:]]
    assert [name for name, *_ in cells] == ["ResNet-18"] * 7 + ["Swin-T"] * 3 + ["MobileNetV2"] * 5 + ["VGG-16"] * 4
    assert cells[3] == ["ResNet-18", "8 of 17", "92.10"]
    assert cells[-1] == ["VGG-16", "14 of 15", "90.38"]


@pytest.mark.parametrize("case", MARKED_CASES)
def test_texts_neither_overlap_nor_leave_the_picture(case, draw):
    figure = draw(CASES[case])
    figure.draw_without_rendering()
    unused = [  # tick labels beyond the ends of an axis are not drawn
        label
        for axes in figure.axes
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        if not limits[0] <= place <= limits[1]
    ]
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts if text not in unused]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    explained = [text.get_text() for text in figure.legends[0].get_texts()]
    started = [history for history in CASES[case].values() if history["steps"]]
    assert len(explained) >= len(started)


def test_runs_look_different(draw):
    figure = draw({str(seed): make_run(seed=seed) for seed in range(12)})
    looks = {(line.get_color(), line.get_marker()) for line in figure.axes[0].lines if line.get_linestyle() == "-"}
    assert len(looks) == 12
    assert len({color for color, _ in looks}) == len(COLORS)


FASTER = {"fused": 1.0}


@pytest.mark.parametrize(
    ("histories", "expected"),
    [
        (
            {"a": make_run(**FASTER), "b": make_run()},
            "a is the fastest, and none is more accurate: 1.00 ms per call, 4.00 times",
        ),
        (
            {"a": make_run(), "b": make_run(**FASTER, test=-0.01)},
            r"b is the fastest within the same accuracy limit \(1\.00 points of validation accuracy\): 1\.00 ms .* 95\.20 %",
        ),
        (
            {"a": make_run(), "b": make_run(**FASTER, test=-0.01, max_drop=0.03)},
            r"b is the fastest \(1\.00 ms .*\), a is the most accurate \(1\.60 ms .*\)\.",
        ),
        (
            {"a": cifar10("resnet18"), "b": cifar10("swin_t", **FASTER, test=-0.01)},
            r"b is the fastest \(1\.00 ms .*\), a is the most accurate",
        ),
        (
            {"a": make_run(fused=1.6), "b": make_run(fused=1.61)},
            "No run is clearly the fastest: a and b are less than 2 % apart",
        ),
        ({"a": make_run(**FASTER), "b": make_run(machine="another")}, "The latencies are of different machines"),
        ({"a": make_run(), "b": make_run(finished=False)}, "Only a is finished, so there is no best run yet"),
        (
            {"a": make_run(finished=False), "b": make_run(finished=False)},
            "None of the runs is finished, so there",
        ),
        (
            {"a": make_run(), "b": make_run(**FASTER), "c": make_run(finished=False)},
            "b is the fastest of the finished runs, and none is more accurate",
        ),
    ],
)
def test_headline_names_the_best_run(histories, expected):
    assert re.match(expected, headline(histories))


def test_page_and_terminal_have_the_same_headline(page_of):
    assert all(f"<h1>{headline(histories)}</h1>" in page_of(case) for case, histories in CASES.items())


def test_warning_for_latencies_of_different_machines(page_of):
    other = make_run()
    other["machine"]["torch"] = "2.11.0"
    for runs, differ in ((CASES["two"], False), (CASES["models"], True), ({"a": make_run(), "b": other}, True)):
        assert ("of different machines or versions" in format_comparison(runs).replace("\n", " ")) == differ
    for case, differ in (("two", False), ("models", True)):
        assert ("Latencies were measured on different machines" in page_of(case)) == differ


def test_only_differing_options_are_shown_per_run(render, draw):
    newer = {"zeros_together": False, "target_speedup": None, "collapse": None, "protect": [], "model": None, "data": None}
    runs = {"old": make_run(), "new": make_run(criterion="random", epochs=3, **newer)}
    text = format_comparison(runs)
    assert re.search(r"^run +criterion +epochs +removed", text, re.MULTILINE)
    assert re.search(r"^old +entropy +10 .*\nnew +random +3 ", text, re.MULTILINE)
    assert text.endswith("The same in all runs: recipe digits, seed 0, max_drop 0.01, per_step 1,\ndevice cpu.")
    legend = [entry.get_text() for entry in draw(runs).legends[0].get_texts()]
    assert legend[:2] == ["old (criterion entropy, epochs 10)", "new (criterion random, epochs 3)"]
    rows = re.findall(r"<tr.*?</tr>", section(render(runs), "The runs"), re.DOTALL)
    assert "<code>criterion</code> random" in rows[2]
    assert "seed" not in rows[2]


@pytest.mark.parametrize("case", CASES)
def test_table_fits_80_columns_with_all_runs_and_options(case):
    lines = format_comparison(CASES[case]).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(" -> " in line or " - *" in line for line in lines) == len(CASES[case])
    unfinished = [history for history in CASES[case].values() if history["kept_step"] is None]
    assert sum(" *" in line for line in lines) == len(unfinished)
    assert any("unfinished" in line for line in lines) == bool(unfinished)
    if case == "twelve":
        assert all(
            sum(name in line.split() for line in lines) == 1 for name in ("criterion", "collapse", "target_speedup", "data")
        )


def test_labels_are_the_shortest_distinct_ends():
    paths = ["/runs/a/seed0", "/runs/b/seed0", "/runs/c", "/other/b/seed0", "/seed0", "/runs/x/c.json"]
    assert label_runs([Path(path) for path in paths]) == ["a/seed0", "runs/b/seed0", "c", "other/b/seed0", "/seed0", "c.json"]


@pytest.mark.filterwarnings("ignore:Glyph")  # the font that text is measured with does not have every script
def test_texts_of_histories_are_escaped(render):
    history = make_run(machine="".join(HOSTILE), model="".join(HOSTILE), seed=1)
    page = render({"".join(HOSTILE): history, **CASES["two"]})
    assert "<script" not in page
    assert "<b>" not in page


@pytest.mark.slow
def test_page_is_reproducible_under_any_matplotlib_settings(render, page_of):
    histories = CASES["models"]
    before, page = copy.deepcopy(histories), page_of("models")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True}):
        assert render(histories) == page
    assert histories == before
