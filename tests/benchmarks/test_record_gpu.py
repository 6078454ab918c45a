"""`bench/record_gpu.py` gives each step its share of the time, and keeps what was recorded when a step is cut off."""

import dataclasses
import json
import sys
import time

import pytest

from fastentropy.cli import app
from tests._helpers.paths import ROOT

sys.path.append(str(ROOT / "bench"))

import record_gpu
from record_gpu import Step, run_steps


def python(name, code, share=1.0, missing=""):
    return Step(name, share, [sys.executable, "-c", code], missing)


def test_steps_end_with_their_share_of_the_time_and_later_ones_run(tmp_path):
    kept = "import pathlib, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: pathlib.Path({!r}).write_text('kept')"
    planned = [
        python("long", kept.format(str(tmp_path / "a")), share=0.2),
        python("short", "print('several'); print('lines')", share=1),
        python("broken", "raise SystemExit(3)"),
        python("unknown", "", missing="--data"),
    ]
    start = time.monotonic()
    steps = run_steps(planned, 60, tmp_path, "cpu")["steps"]
    assert time.monotonic() - start < 60
    assert {name: step["ended"] for name, step in steps.items()} == {
        "long": "cut off",
        "short": "finished",
        "broken": "failed with exit status 3",
        "unknown": "left out: it needs --data",
    }
    assert steps["short"]["last line"] == "lines"
    assert (tmp_path / "a").read_text() == "kept"
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == steps


def test_finished_steps_are_not_run_again(tmp_path):
    planned = [python("one", f"open({str(tmp_path / 'a')!r}, 'a').write('x')"), python("two", "raise SystemExit(1)")]
    for _ in range(2):
        run_steps(planned, 20, tmp_path, "cpu")
    assert (tmp_path / "a").read_text() == "x"
    assert (tmp_path / "steps.log").read_text().count("SystemExit") == 2


def test_processes_that_a_step_has_started_end_with_it(tmp_path):
    written = tmp_path / "a"
    child = f"import time\nwhile True: open({str(written)!r}, 'a').write('x'); time.sleep(0.01)"
    parent = f"""
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}])
while not pathlib.Path({str(written)!r}).exists():
    time.sleep(0.01)
"""
    run_steps([python("parent", parent)], 20, tmp_path, "cpu")
    size = written.stat().st_size
    time.sleep(0.2)
    assert written.stat().st_size == size


def test_records_are_copied_and_pruning_goes_on(tmp_path):
    run_steps([dataclasses.replace(python("digits", ""), record=tmp_path / "none.json")], 20, tmp_path, "cpu")
    assert not (tmp_path / "digits.json").exists()
    (step,) = (each for each in record_gpu.steps(tmp_path, "cpu", None, []) if each.name == "digits")
    assert "--resume" not in step.command
    step.record.parent.mkdir(parents=True)
    step.record.write_text("{}")
    (step,) = (each for each in record_gpu.steps(tmp_path, "cpu", None, []) if each.name == "digits")
    assert step.command[-2:] == ["--resume", str(step.record.parent)]
    (tmp_path / "summary.json").unlink()
    run_steps([dataclasses.replace(python("digits", ""), record=step.record)], 20, tmp_path, "cpu")
    assert (tmp_path / "digits.json").read_text() == "{}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_commands_have_options_that_exist(tmp_path, device):
    for step in record_gpu.steps(tmp_path, device, "data", ["model", "texts"]):
        assert step.missing in ("", "a GPU")
        if step.command[1:3] == ["-m", "fastentropy"]:
            options = {each for each in step.command if each.startswith("--")}
            name = step.command[3]
            (command,) = (each for each in app.registered_commands if (each.name or each.callback.__name__) == name)
            known = {f"--{parameter.replace('_', '-')}" for parameter in command.callback.__annotations__}
            assert options <= known
