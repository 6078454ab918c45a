"""The shape of the house: what is public, and which floor may import which."""

import ast
from pathlib import Path

import pytest

import fastentropy
import fastentropy_kernels

FLOORS = [
    {"__main__"},
    {"cli"},
    {"console", "doctor", "runs"},
    {"benchmarks", "calibration", "comparison", "recipes", "report"},
    {"pruning"},
    {"loop"},
    {"criteria", "linearization", "steps"},
    {"fusion"},
    {"collector"},
    {"isolation", "counters"},
    {"sites", "distributed"},
    {"pages", "statistics"},
    {"plots"},
    {"activations", "axes", "files", "histories", "interception", "machines", "padding", "rewriting", "tables", "timing"},
    {"sharding"},
]
CALIBRATION = [
    "runs",
    "engine",
    "ranks",
    "report",
    "overhead",
    "checkpoints",
    "batching",
    "pretrained",
    "corpora",
    "streams",
    "parquet_files",
    "text_files",
    "image_files",
    "columns",
    "cursors",
    "documents",
    "extras",
]
FUSION = [
    "profiling",
    "runtime",
    "archive",
    "guards",
    "projection",
    "tracing",
    "plan",
    "lowering",
    "proof",
    "inputs",
    "chains",
    "reading",
    "merging",
    "elements",
    "affine",
    "latency",
]


def imported(path):
    """The modules that a file imports, by full name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def floor_of(module):
    return next(index for index, floor in enumerate(FLOORS) if module in floor)


def test_imports_go_down_by_floors():
    root = Path(fastentropy.__file__).parent
    for path in root.rglob("*.py"):
        module = path.relative_to(root).parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "fastentropy" and len(parts) > 1 and parts[1] != module:
                assert floor_of(module) < floor_of(parts[1]), f"{path.name} imports {name}"


@pytest.mark.parametrize(("package", "modules"), [("calibration", CALIBRATION), ("fusion", FUSION)])
def test_modules_of_a_package_import_one_way(package, modules):
    root = Path(fastentropy.__file__).parent / package
    assert set(modules) <= {path.stem for path in root.glob("*.py")}
    for index, module in enumerate(modules):
        above = {f"fastentropy.{package}.{name}" for name in modules[:index]}
        assert not imported(root / f"{module}.py") & above


def test_kernels_know_tensors_only():
    for path in Path(fastentropy_kernels.__file__).parent.glob("*.py"):
        names = imported(path) - {"torch.nn.functional"}
        assert not any(name.split(".")[0] == "fastentropy" or name.startswith("torch.nn") for name in names)


def test_public_names_are_those_of_the_documentation():
    names = """collect EntropyCollector Statistics SiteStatistics find_sites isolate register_activation Site prune
    PruningResult Step linearize fuse FusedModel FusionReport load"""
    assert set(fastentropy.__all__) == set(names.split())
    assert all(hasattr(fastentropy, name) for name in fastentropy.__all__)
    assert {"activation_states", "count_states"} <= set(fastentropy_kernels.__all__)
