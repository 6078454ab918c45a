"""The code of the documentation runs and prints what the pages show, and the website builds without a warning.

`mkdocs build --strict` itself checks the links, and that each page is in the navigation.
"""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests._helpers.paths import ROOT
from tests.project.documented import LANGUAGES, blocks, commands, prepare, run_page

DOCS = ROOT / "docs"
#: All pages except the page of results, which is generated from the records.
PAGES = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md")) if path.name != "results.md"}
RUNNING = [name for name, path in PAGES.items() if {"python", "sh"} & {block.language for block in blocks(path.read_text())}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_page_runs_and_prints_as_shown(name, folder):
    if name == "how-to/hugging-face-model.md":
        prepare(folder)
    run_page(PAGES[name], folder)
    if name == "how-to/hugging-face-model.md":
        assert (folder / "runs" / "packed" / "summary.json").exists()


@pytest.mark.parametrize("name", PAGES)
def test_page_blocks_are_code_or_output(name):
    page = PAGES[name].read_text(encoding="utf-8")
    found = blocks(page)
    assert {block.language for block in found} <= set(LANGUAGES)
    assert len(re.findall("```", page)) == 2 * len(found)


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ('pip install -e ".[cli]" && fastentropy prune', "fastentropy prune"),
        ("pip install a\nfastentropy doctor", "\nfastentropy doctor"),
        ("pytest -n auto", ""),
        ("A=1 && B=2", "A=1 && B=2"),
    ],
)
def test_installing_commands_are_left_out(script, left):
    assert commands(script) == left


def test_other_output_fails_the_page(folder):
    page = folder / "page.md"
    page.write_text('```python\nprint(1)\n```\n\n```text title="prints"\n2\n```\n')
    with pytest.raises(AssertionError, match=r"page\.md, line 6"):
        run_page(page, folder)


def test_failing_command_fails_the_page(folder):
    page = folder / "page.md"
    page.write_text("```sh\nfalse\ntrue\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md, line 2: exit status 1"):
        run_page(page, folder)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("mkdocs") or not find_spec("mkdocstrings"), reason="the extra docs is not installed")
def test_website_builds_without_warnings_or_external_resources(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//', text)
        assert not [tag for tag in re.findall(r"<link [^>]*>", text) if re.search(r'href="(?:https?:)?//', tag)]
        assert "arithmatex" not in text  # every formula is MathML
        assert not re.findall(r'<img [^>]*src="[^"]*/(?:digits|cifar10-resnet8|efficientnet-lite0)\.png"', text)
    pictures = {
        page.relative_to(tmp_path).as_posix(): page.read_text(encoding="utf-8").count('<span class="run"') for page in pages
    }
    assert {name: count for name, count in pictures.items() if count} == {"index.html": 1, "results.html": 2}
    for svgs in (re.findall(r"<svg class.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL) for page in pages):
        identifiers = re.findall(r'\bid="([^"]*)"', "".join(svgs))
        assert len(identifiers) == len(set(identifiers))
