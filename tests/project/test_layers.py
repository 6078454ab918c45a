"""The packages import each other only as the contracts of pyproject.toml allow."""

import subprocess
import sys
from pathlib import Path

from tests._helpers.paths import ROOT


def test_imports_go_down_by_layers():
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter, "--no-cache", "pyproject.toml"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
