"""The packages import each other only as the contracts of pyproject.toml allow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests._helpers.paths import ROOT

#: What import-linter cannot forbid: a part of another package, and a root package without its modules.
FORBIDDEN = {
    "kernels": {"torch.nn", "torch.nn.modules"},
    "fastentropy": {"fastentropy"},
}


def imported(path):
    """Return the full names of the modules from which a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_imports_go_down_by_layers():
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_forbidden_imports(folder):
    found = {str(path.relative_to(ROOT)): imported(path) & FORBIDDEN[folder] for path in (ROOT / folder).rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_source_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("*/**/*.py")}
    sources = [path for path in lengths if path.relative_to(ROOT).parts[0] in ("fastentropy", "kernels", "bench")]
    assert [path.name for path in sources if lengths[path] > 350] == ["conv_triton.py"]
