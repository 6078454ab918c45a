"""The report of `fuse` in JSON and in print."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy.fusion.report import Candidate, ChainReport, FusionReport

FORMS = ("keep", "merge", "split", "reorder", "kernel", "masked")
NUMBERS = st.floats(1e-6, 1e6)
FORMATS = st.sampled_from(["contiguous", "channels_last"])


@st.composite
def chains(draw, is_measured):
    tried = draw(st.sampled_from([(), *(FORMS[:count] for count in range(2, len(FORMS) + 1))]))
    candidates = {
        name: Candidate(
            draw(NUMBERS) if is_measured else None,
            draw(st.integers(1, 99)),
            draw(st.integers(1, 2**40)),
            draw(st.integers(1, 2**40)),
            draw(st.floats(0, 1)),
        )
        for name in tried
    }
    names = tuple(f"features.{index}.conv" for index in range(draw(st.integers(1, 5))))
    return ChainReport(
        names,
        candidates,
        draw(st.sampled_from(tried or FORMS[:1])),
        draw(st.sampled_from(["", "a reason", "a long reason " * 20])),
        draw(st.sampled_from(["", "aten.relu in features.0.2", "aten.relu in features.0.2, " * 9])),
    )


@st.composite
def reports(draw, is_measured=None):
    is_measured = draw(st.booleans()) if is_measured is None else is_measured
    names = ("original", "folded", "fused")
    return FusionReport(
        tuple(draw(st.lists(chains(is_measured), max_size=3))),
        {name: draw(NUMBERS) for name in names} if is_measured else {},
        {name: draw(FORMATS) for name in names},
        draw(st.sampled_from(names)),
        draw(st.floats(0, 1e-5)),
    )


@settings(max_examples=40)
@given(reports())
def test_report_through_json(report):
    assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@settings(max_examples=25)
@given(reports(is_measured=True))
def test_speedup_over_the_model_as_given(report):
    assert report.speedup * report.milliseconds[report.choice] == pytest.approx(report.milliseconds["original"])
    assert report.to_dict()["speedup"] == report.speedup


@settings(max_examples=25)
@given(reports(is_measured=False))
def test_report_without_times(report):
    assert report.speedup is None
    assert report.to_dict()["speedup"] is None
    assert "not measured" in str(report)
    assert " ms" not in str(report)
    assert "as fast as" not in str(report)


@settings(max_examples=60)
@given(reports())
def test_printed_report_fits_and_marks_each_choice(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 128
    assert all(len(line) <= 104 for chain in report.chains for line in str(chain).splitlines())
    marked = [line.split()[1] for line in text.splitlines() if line.startswith("  * ")]
    assert marked == [chain.choice for chain in report.chains if chain.candidates]
    assert f"kept: {report.choice}" in text


@settings(max_examples=25)
@given(reports(is_measured=True))
def test_printed_times_name_the_memory_format(report):
    (line,) = (line for line in str(report).splitlines() if line.startswith("model: "))
    for name, milliseconds in report.milliseconds.items():
        assert f"{name} {milliseconds:.3f} ms ({report.memory_formats[name]})" in line


@settings(max_examples=25)
@given(reports())
def test_printed_report_says_that_fused_is_not_used(report):
    has_another = any(chain.choice != "keep" for chain in report.chains)
    assert ("is not used" in str(report)) == (has_another and report.choice != "fused")


def test_printed_chain_names_its_ends():
    assert str(ChainReport(("a", "b", "c"), {}, "keep")) == "a … c"
    assert str(ChainReport(("a",), {}, "keep", "why not")) == "a\n    why not"


def test_printed_candidate():
    candidates = {"keep": Candidate(1.5, 3, 2_500_000, 4_000_000, 1e-7), "merge": Candidate(None, 1, 100_000, 50_000, 0.0)}
    _, keep, merge = str(ChainReport(("a", "b"), candidates, "merge")).splitlines()
    assert " ".join(keep.split()) == "keep 1.500 ms 3 operators 2.50 M multiplications 4.00 MB error 1e-07"
    assert " ".join(merge.split()) == "* merge - 1 operator 0.10 M multiplications 0.05 MB error 0e+00"


def test_a_report_names_the_operator_that_ended_a_chain():
    ended = ChainReport(("a", "b"), {}, "keep", "", "aten.relu in features.0.2")
    assert "    ended by aten.relu in features.0.2" in str(ended).splitlines()
    assert "ended by" not in str(ChainReport(("a", "b"), {}, "keep"))
