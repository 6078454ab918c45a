"""The report of `fuse` in JSON and in print."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastentropy.fusion.report import Candidate, ChainReport, FusionReport

FORMS = ("keep", "merge", "split")
NUMBERS = st.floats(1e-6, 1e6)


@st.composite
def chains(draw):
    tried = draw(st.sampled_from([(), FORMS[:2], FORMS]))
    candidates = {
        name: Candidate(draw(NUMBERS), draw(st.integers(1, 99)), draw(st.integers(1, 2**40)), draw(st.floats(0, 1)))
        for name in tried
    }
    names = tuple(f"features.{index}.conv" for index in range(draw(st.integers(1, 5))))
    return ChainReport(
        names,
        candidates,
        draw(st.sampled_from(tried or FORMS[:1])),
        draw(st.sampled_from(["", "a reason", "a long reason " * 20])),
    )


@st.composite
def reports(draw):
    times = {name: draw(NUMBERS) for name in ("original", "folded", "fused")}
    choice = draw(st.sampled_from(list(times)))
    return FusionReport(tuple(draw(st.lists(chains(), max_size=3))), times, choice, draw(st.floats(0, 1e-5)))


@given(reports())
def test_a_report_goes_through_json_and_comes_back(report):
    assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@given(reports())
def test_the_speedup_is_over_the_model_as_given(report):
    assert report.speedup * report.milliseconds[report.choice] == pytest.approx(report.milliseconds["original"])
    assert report.to_dict()["speedup"] == report.speedup


@given(reports())
def test_a_printed_report_fits_the_screen_and_marks_each_choice(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    marked = [line.split()[1] for line in text.splitlines() if line.startswith("  * ")]
    assert marked == [chain.choice for chain in report.chains if chain.candidates]
    assert f"kept: {report.choice}" in text


def test_a_printed_chain_is_named_by_its_first_and_last_operator():
    assert str(ChainReport(("a", "b", "c"), {}, "keep")) == "a … c"
    assert str(ChainReport(("a",), {}, "keep", "why not")) == "a\n    why not"
