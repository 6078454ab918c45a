"""Hooks of MkDocs: files from outside this folder, formulas as MathML, pictures of runs as SVG, and the help of commands."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latex2mathml.converter
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
#: Files that pages link to as they lie in the repository, so that the links work there too. The site has copies of them.
LINKED = ("bench/results/*.json", "bench/results/*.png", "examples/*.py")
#: A picture of a record. That of a pruning run is drawn anew, in the colours and for the width of the page.
PICTURE = re.compile(r'<img alt="([^"]*)" src="[^"]*bench/results/([\w-]+)\.png" ?/?>')
#: The figures of a run that a page shows: the first across its whole width, the others beside each other where there is room.
FIGURES = ("entropy", "accuracy", "latency")
#: Stands where the help of the commands is to be.
HELP = "<!-- help of each command -->"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what lies outside of the folder of the pages."""
    for pattern in LINKED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave the folder of the pages to the copies, and fill in the help."""
    markdown = re.sub(r"\]\(((?:\.\./)*)\.\./(bench/results|examples)/", r"](\1\2/", markdown)
    return markdown.replace(HELP, "\n".join(_help())) if HELP in markdown else markdown


def on_page_content(content: str, **_: Any) -> str:
    """Turn formulas, as the extension arithmatex marks them, into MathML, which browsers show without a script. Draw runs."""
    content = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)
    return PICTURE.sub(_drawn, content)


def _drawn(picture: re.Match[str]) -> str:
    """Return the figures of a pruning run in place of its picture. A picture of another record stays."""
    from fastentropy.reporting.run_report import draw_figures  # imports matplotlib and PyTorch

    alternative, name = picture.groups()
    record = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    if "steps" not in record:
        return picture[0]
    figures = draw_figures(record, FIGURES, f" in {name}")
    parts = "".join(f'<span class="{figure}">{svg}</span>' for figure, svg in figures.items())
    return f'<span class="run" role="figure" aria-label="{alternative}">{parts}</span>'


def _mathml(formula: re.Match[str]) -> str:
    display = "block" if formula[1] == "div" else "inline"
    return str(latex2mathml.converter.convert(html.unescape(formula[2]).strip(), display=display))


def _help() -> Iterator[str]:
    """Yield a section for each command, with the text that `fastentropy COMMAND --help` prints."""
    from fastentropy.cli import app  # imports PyTorch

    commands: Any = typer.main.get_command(app)
    for name in commands.commands:
        printed = CliRunner().invoke(app, [name, "--help"], prog_name="fastentropy", terminal_width=80, max_content_width=80)
        yield f"## fastentropy {name}\n\n```text\n{printed.output.strip()}\n```\n"
