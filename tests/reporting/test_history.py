"""The check of histories: what it accepts can be rendered, and everything else is refused."""

import copy
import json

import pytest
from matplotlib.figure import Figure

from fastentropy.reporting.comparison import write_comparison
from fastentropy.reporting.history import check_history
from fastentropy.reporting.run_report import write_report
from tests._helpers.histories import CANDIDATES, FUSION, make_history
from tests._helpers.paths import ROOT

CHAIN = {"names": ["conv"], "candidates": {"keep": CANDIDATES["keep"]}, "choice": "keep", "note": ""}
FINISHED = make_history(["first.relu", "second.relu"], 3, kept_step=1, fusion={**FUSION, "chains": [CHAIN]})
FINISHED["options"] = {"max_drop": 0.01, "epochs": 3}


def places(value, path=()):
    """Yield the path to every value in a history."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def changed(history, path, change):
    history = copy.deepcopy(history)
    value = history
    for key in path[:-1]:
        value = value[key]
    change(value, path[-1])
    return history


CHANGES = {
    "left out": lambda value, key: value.pop(key),
    "null": lambda value, key: value.__setitem__(key, None),
    "a text": lambda value, key: value.__setitem__(key, "x"),
    "zero": lambda value, key: value.__setitem__(key, 0),
    "not a number": lambda value, key: value.__setitem__(key, float("nan")),
}


SLOW_CHANGES = ("left out", "a text", "zero", "null")


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CHANGES else name for name in CHANGES]
)
def test_changed_history_is_refused_or_rendered(change, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: file.write("<svg></svg>"))  # the real one takes long
    refused = []
    for path in places(FINISHED):
        history = changed(FINISHED, path, CHANGES[change])
        try:
            check_history(history)
        except ValueError as error:
            refused.append(str(error))
        else:
            write_report(history, tmp_path / "report.html")
            write_comparison({"run": history}, tmp_path / "comparison.html")
    assert len(refused) > 20
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_valid_histories_pass(steps):
    check_history(make_history(["a.relu", "b.relu"], steps, fusion=None))
    check_history(FINISHED)
    check_history(json.loads((ROOT / "bench" / "results" / "digits.json").read_text()))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kept_step",), 3, "kept_step is 3; the history has only 3 steps"),
        (("steps", 2, "removed"), ["other"], "step 2 removed other, for which the steps before have no entropy"),
        (("steps", 1, "latency_ms", "fused"), 0, "a latency is 0 or less; expected milliseconds"),
        (("steps", 1, "test"), "high", r"steps\[1\]\.test is 'high'; expected a number"),
        (("latency_ms",), None, "latency_ms is None; expected an object"),
    ],
)
def test_message_names_the_place(path, value, message):
    with pytest.raises(ValueError, match=message):
        check_history(changed(FINISHED, path, lambda part, key: part.__setitem__(key, value)))
