"""The exported kernel has the layout that Hugging Face's library `kernels` loads, and depends on nothing but itself."""

import ast
import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch

import fastentropy_kernels
from tests._helpers.paths import ROOT

PACKAGE = ROOT / "kernels" / "fastentropy_kernels"

#: Loads a kernel as the library does, where the package is not to be had, and counts with it.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch

class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert not name.startswith("fastentropy"), name

sys.meta_path.insert(0, Blocked())
variant = Path(sys.argv[1])
identity = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
kernel = sys.modules[identity] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
x, counts = torch.tensor([[-1.0, 0.0], [2.0, 3.0]], requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
kernel.activation_states(x, counts, "relu", impl="reference").sum().backward()
print(counts.tolist(), x.grad.tolist(), list(kernel.available_implementations(x.device)))
"""


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """Return the folder of the exported variant."""
    folder = tmp_path_factory.mktemp("exported")
    command = [sys.executable, ROOT / "kernels" / "export_kernel.py", folder]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed == f"{folder / 'build' / 'torch-universal'}\n"
    return folder / "build" / "torch-universal"


def test_files_are_those_of_the_package_and_metadata(variant):
    sources = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    expected = {path for path in sources if not path.startswith("aot/")} | {"metadata.json"}
    assert {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()} == expected
    assert {"__init__.py", "states/kernels_triton.py"} < expected < sources | {"metadata.json"}


def test_page_names_library_and_licence(variant):
    _, front, page = (variant.parents[1] / "README.md").read_text(encoding="utf-8").split("---\n")
    assert "library_name: kernels\nlicense: apache-2.0\n" in front
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    compile(code, "README.md", "exec")


def test_metadata_has_what_the_library_requires(variant):
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    assert metadata.keys() >= {"id", "name", "version", "license", "python-depends", "backend"}
    assert metadata["id"].isidentifier()
    assert metadata["name"].replace("-", "_") == "fastentropy_kernels"
    assert isinstance(metadata["version"], int)


def test_imports_are_relative(variant):
    for path in variant.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        assert not [name for name in imported if name.startswith("fastentropy")]
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = path.parents[node.level - 1]
                module = folder.joinpath(*(node.module or "").split("."))
                assert module.with_suffix(".py").exists() or (module / "__init__.py").exists()


@pytest.mark.slow
def test_kernel_runs_without_the_package(variant):
    ran = subprocess.run([sys.executable, "-c", LOAD, variant], capture_output=True, text=True, cwd=variant, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "[[1, 0, 1], [0, 1, 1]] [[0.0, 0.0], [1.0, 1.0]] ['triton', 'numba', 'reference']\n"


def test_kernel_runs_beside_the_package(variant, monkeypatch):
    identity = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(identity, variant / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, identity, kernel)
    spec.loader.exec_module(kernel)
    x = torch.randn(5, 7, requires_grad=True)
    results = []
    for package in (fastentropy_kernels, kernel):
        counts = torch.zeros(7, 3, dtype=torch.int64)
        y = package.activation_states(x, counts, "gelu", impl="reference")
        results.append((y, counts, type(y.grad_fn).__name__))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert "fastentropy_kernels" in results[0][2]
    assert results[0][2] != results[1][2]
