"""`fastentropy doctor`: what it shows, and its exit status."""

import json
import sys

from typer.testing import CliRunner

from fastentropy.cli import app


def test_doctor_lists_what_runs():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("python", "torch", "triton", "numba", "executing", "cpu", "reference"):
        assert word in result.output


def test_json_is_a_list_of_findings():
    findings = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert {"name", "text", "ok"} == set(findings[0])
    assert {"torch", "cpu kernels: reference"} <= {finding["name"] for finding in findings if finding["ok"]}


def test_doctor_fails_if_the_main_job_cannot_run(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(sys.modules["fastentropy.cli.doctor"], "count_states", broken)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "failed: no compiler" in result.output
