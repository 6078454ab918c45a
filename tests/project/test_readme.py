"""The code of the README runs, and every figure of the README and of the page of results is in a record."""

import re
import sys

import pytest

from tests._helpers.paths import ROOT

sys.path.append(str(ROOT / "bench"))

import benchmark_sections
import draw_figures

from fastentropy.benchmarks.records import Record
from tests.project.documented import run_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
CALIBRATIONS = re.search(r"```sh\n(fastentropy calibrate .*?)```\n", README, re.DOTALL)
#: A number with a decimal point or with a unit.
FIGURE = re.compile(r"\d+\.\d+|\d+ ?(?:%|ms\b|s\b|[kMG]?B\b|GB/s|×(?!\d)|times as)")
#: Numbers that are not measured: versions, a paper, a licence, and constants in the text.
NO_FIGURES = (
    "Python 3.10",
    "2404.18949",
    "Apache 2.0",
    "PyTorch 2.11",
    "PyTorch: 2.11",
    "PyTorch-2.11",
    "2.11 or newer",
    "2.14 on a CPU, 2.11 on a GPU",
    "Python: 3.10",
    "Python-3.10",
    "Apache_2.0",
    "Triton 3.6",
    "32 MB",
    "max_drop=0.05",
    "--max-drop 0.05",
)
#: What the first example of the README takes from its reader.
YOURS = """```python
import torch
from torch import nn
from torch.nn import functional as F

class Yours(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))

def train(model):
    pass

def evaluate(model):
    return 1.0

def calibrate(model):
    model(images)

model, images = Yours().eval(), torch.randn(20, 4)
```
"""


@pytest.mark.slow
def test_every_block_runs(tmp_path, monkeypatch):
    """Run the main command with schedules of one epoch, because the whole command takes minutes."""
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "README.md"
    shorter = README.replace("&& fastentropy prune\n", "&& fastentropy prune --epochs 1 --max-removed 1\n")
    page.write_text(f"{YOURS}{shorter.replace(CALIBRATIONS[0], '')}", encoding="utf-8")
    namespace = run_page(page, tmp_path)
    assert len(namespace["statistics"].layer_entropy()) == 17
    assert (tmp_path / "fused.pt2").exists()
    assert (tmp_path / "model.pt2").exists()


def test_calibrations_are_run_on_a_page():
    page = (ROOT / "docs" / "how-to" / "hugging-face-model.md").read_text(encoding="utf-8")
    commands = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n  ", "").splitlines()
    assert len(CALIBRATIONS[1].splitlines()) == 2
    assert set(CALIBRATIONS[1].splitlines()) <= set(commands)


def test_lines():
    """The first screen goes from a model to a file in five lines, as collecting does."""
    way, collecting, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert [len(block.replace("\n\n", "\n").splitlines()) for block in (way, collecting)] == [5, 5]
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("path", draw_figures.PAGES, ids=lambda path: path.name)
def test_page_matches_the_records(path):
    page = path.read_text(encoding="utf-8")
    assert page == draw_figures.rewrite_sections(page, draw_figures.path_to_records(path))


@pytest.mark.parametrize("path", draw_figures.PAGES, ids=lambda path: path.name)
def test_page_has_no_figures_outside_generated_parts(path):
    page = path.read_text(encoding="utf-8")
    text = re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->|```.*?```", "", page, flags=re.DOTALL)
    for known in NO_FIGURES:
        text = text.replace(known, "")
    assert FIGURE.findall(text) == []


def test_every_section_is_on_a_page():
    pages = "".join(path.read_text(encoding="utf-8") for path in draw_figures.PAGES)
    assert set(re.findall(r"<!-- /([\w-]+) -->", pages)) == draw_figures.SECTIONS.keys()


def test_changed_figure_is_noticed():
    page = README.replace("% before and", "1 % before and")
    assert page != README
    assert draw_figures.rewrite_sections(page, "bench/results") == README


def test_kernels_are_compared_with_alternatives_that_are_called_alike():
    record = Record.load(draw_figures.RESULTS / "kernels-h100.json")
    cases = [eager for *_, eager in benchmark_sections.largest_cases(record) if "PyTorch counting" in eager]
    assert not any(eager["activation_states"].facts["cuda_graph"] for eager in cases)
    for (_, ratio, speedups), eager in zip(benchmark_sections.compared_kernels(record), cases, strict=True):
        assert ratio == eager["activation_states"].ratio
        assert speedups["plain PyTorch"] == eager["PyTorch counting"].ratio.median / ratio.median
