"""The page and the picture of a run: complete, self-contained, escaped and reproducible."""

import copy
import functools
import re

import matplotlib
import pytest

from fastentropy.reporting.plots import PHONE_LABEL_LENGTH
from fastentropy.reporting.run_report import plot_summary, write_report
from tests._helpers.histories import HOSTILE, make_history

TIMES = "\N{MULTIPLICATION SIGN}"
SITES = [f"stage{index}.relu" for index in range(6)]
EDGE_CASES = {
    "rejected": make_history(SITES, 4, kept_step=2),
    "one step": make_history(SITES, 1),
    "first step rejected": make_history(SITES, 2, kept_step=0),
    "unfinished": make_history(SITES, 3, fusion=None),
    "unfinished, one step": make_history(SITES, 1, fusion=None),
    "all removed": make_history(SITES, 7),
    "one site": make_history(["relu"], 2),
    "two in a step": make_history(SITES, 3, per_step=2),
    "large": make_history([f"encoder.layers.{index}." + "long." * 20 + "relu" for index in range(60)], 50),
}


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """Return a function that renders a history to a page."""
    path = tmp_path_factory.mktemp("report") / "report.html"

    def write_and_read(history):
        write_report(history, path)
        return path.read_text(encoding="utf-8")

    return write_and_read


@pytest.fixture(scope="module")
def page_of(render):
    """Return a function that renders an edge case to a page, once."""
    return functools.cache(lambda case: render(EDGE_CASES[case]))


@pytest.mark.parametrize(
    "case", [name if name in ("rejected", "unfinished") else pytest.param(name, marks=pytest.mark.slow) for name in EDGE_CASES]
)
def test_page_is_self_contained(case, page_of):
    page = page_of(case)
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?://|<script|<link|\bsrc=|@import|url\((?!#)|href=\"(?!#|data:)", outside)
    assert page.count("<svg") == page.count("</svg>") == page.count("aria-label=") == 2 * 4  # for a screen and for a phone
    identifiers = re.findall(r'\bid="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert "nan" not in re.sub(r"<[^>]*>", "", page).lower().split()


@pytest.mark.parametrize(
    "case", ["rejected", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two in a step", "large"))]
)
def test_table_has_every_step_and_removed_site(case, page_of):
    history = EDGE_CASES[case]
    table = page_of(case).split("<h2>The steps</h2>")[1].split("<h2>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    for index, (step, row) in enumerate(zip(history["steps"], rows, strict=True)):
        assert f"<td>{index}" in row
        for name in step["removed"]:
            assert f"<code>{name}</code> <span>{history['steps'][index - 1]['layer_entropy'][name]:.3f}</span>" in row


def test_numbers_are_of_the_kept_step_and_the_fused_network(page_of):
    page = page_of("rejected")
    assert "2 of 6 activations are removed: 2.50 times as fast as the dense network, 0.80 points less test acc" in page
    for text in (
        "97.00 → 96.20 %",
        "4.00 → 1.60 ms",
        f"2.00{TIMES} against the pruned",
        f"1.88{TIMES} against the dense",
    ):
        assert text in page
    assert 'class="rejected"' in page
    assert "Step 3 was rejected: its validation accuracy, 96.80 %, is below 97.00 %" in page
    assert page.count('class="chosen"') == 4  # the step, the form of the network, and one form for each of two chains
    assert "28.70" in page
    assert "a reason for &lt;this&gt;" in page


def test_unfinished_run_says_so(page_of):
    assert "not finished" not in page_of("rejected")
    page = page_of("unfinished")
    assert "not finished" in page
    assert "removed so far: 1.54 times as fast" in page


@pytest.mark.filterwarnings("ignore:Glyph")  # the font that text is measured with does not have every script
def test_texts_of_the_history_are_escaped(render):
    history = copy.deepcopy(make_history(HOSTILE, 6))
    history["recipe"] = history["options"]["device"] = history["machine"]["device"] = "".join(HOSTILE)
    history["fusion"]["chains"][0] |= {"names": HOSTILE, "note": "".join(HOSTILE)}
    page = render(history)
    assert "<script" not in page
    assert "<b>" not in page
    for name in HOSTILE:
        escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        # Two plots, the table of steps, the recipe twice, the option, the machine, the chain and its note. Short names are also
        # in both plots for a phone.
        assert page.replace("&#34;", '"').count(escaped) == 9 + 2 * (len(name) <= PHONE_LABEL_LENGTH)


@pytest.mark.slow
def test_page_is_reproducible_under_any_matplotlib_settings(render, page_of):
    history = EDGE_CASES["rejected"]
    before, page = copy.deepcopy(history), page_of("rejected")
    with matplotlib.rc_context({"font.size": 20, "axes.grid": True}):
        assert render(history) == page
    assert history == before


@pytest.mark.parametrize(
    "case", ["rejected", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one step", "unfinished", "all removed"))]
)
def test_summary_is_a_png(case, tmp_path):
    plot_summary(EDGE_CASES[case], tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["summary.png"]
