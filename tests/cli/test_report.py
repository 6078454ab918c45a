"""`fastentropy report`: which files it writes, and one line for bad input."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastentropy.cli import app
from tests._helpers.histories import make_run


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Make run folders in the current folder: two finished runs and an unfinished one."""
    monkeypatch.chdir(tmp_path)
    runs = {"a/run": make_run(), "b/run": make_run(seed=1, fused=1.0), "begun": make_run(finished=False)}
    for name, history in runs.items():
        Path(name).mkdir(parents=True)
        Path(name, "history.json").write_text(json.dumps(history))
    return tmp_path


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != "history.json")


@pytest.mark.slow
def test_report_of_one_run_is_rewritten(folders):
    result = invoke("a/run")
    assert (result.exit_code, result.output) == (0, "report   a/run/report.html\n")
    assert "2 of 6 activations are removed" in (folders / "a/run/report.html").read_text(encoding="utf-8")
    assert invoke("b/run/history.json", "--output", "page.html", "--png", "plot.png").exit_code == 0
    assert written(folders) == ["a/run/report.html", "page.html", "plot.png"]


@pytest.mark.slow
def test_several_runs_are_compared(folders):
    result = invoke("a/run", "b/run/history.json", "begun", "--png", "plot.png")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("b/run is the fastest of the finished runs, and none is more accurate")
    assert result.output.endswith("\nreport   comparison.html\n")
    assert "unfinished" in result.output
    assert written(folders) == ["comparison.html", "plot.png"]
    assert (folders / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = (folders / "comparison.html").read_text(encoding="utf-8")
    assert all(f"<code>{label}</code>" in page for label in ("a/run", "b/run", "begun"))


@pytest.mark.slow
def test_json_is_the_history_or_the_histories_by_name(folders):
    histories = [json.loads(Path(name, "history.json").read_text()) for name in ("a/run", "b/run")]
    assert json.loads(invoke("a/run", "--json").output) == histories[0]
    assert json.loads(invoke("a/run", "b/run", "--json").output) == dict(zip(("a/run", "b/run"), histories, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/run", "none"], r"none/history\.json is missing, damaged or not the history of a run: No such file or directory$"),
        (["a/run", "torn"], r"torn/history\.json is missing, damaged or not"),
        (["torn"], r"torn/history\.json is missing, damaged or not"),
        (["a/run", "lacking"], r"lacking/history\.json is damaged: steps\[1\] lacks test"),
        (["lacking"], r"lacking/history\.json is damaged: steps\[1\] lacks test"),
        (["a/run", "begun", "b/../a/run/history.json"], r"b/\.\./a/run/history\.json is named twice"),
        (["a/run", "letters"], "run is a run of the recipe 'digits' and letters of 'letters'; accuracies on different data"),
        (["waiting"], "no step is finished yet"),
        (["waiting", "waiting/copy.json"], "no step is finished yet"),
        (["a/run", "begun", "--output", "no/page.html"], r"no/page\.html cannot be written"),
        (["a/run", "begun", "--output", "a/run/history.json"], r"name a file that ends in \.html"),
        (["a/run", "begun", "--png", "plot.svg"], r"name a file that ends in \.png"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, folders, monkeypatch):
    monkeypatch.setitem(__import__("fastentropy.recipes").recipes.RECIPES, "letters", "fastentropy.recipes.digits:Digits")
    lacking = make_run()
    del lacking["steps"][1]["test"]
    waiting = json.dumps(make_run(steps=0, finished=False))
    histories = {
        "torn": "{", "lacking": json.dumps(lacking), "letters": json.dumps(make_run(recipe="letters")), "waiting": waiting
    }  # fmt: skip
    for name, content in histories.items():
        (folders / name).mkdir()
        (folders / name / "history.json").write_text(content)
    (folders / "waiting" / "copy.json").write_text(waiting)
    histories_before = {path: path.read_bytes() for path in folders.rglob("*.json")}
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.splitlines()
    assert re.match(f"Error: .*{message}", line), line
    assert histories_before == {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
