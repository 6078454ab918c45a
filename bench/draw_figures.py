"""Write the measured sections of README.md and docs/results.md from the records in bench/results, and draw their plots.

python bench/draw_figures.py

The sections lie between <!-- NAME --> and <!-- /NAME --> and are written by this script alone. A test checks the pages.
"""

import re
from pathlib import Path

from sections import MACHINES, RESULTS, ROOT, SECTIONS, load_json

from fastentropy.benchmarks.plots import plot_record
from fastentropy.benchmarks.records import Record
from fastentropy.reporting.run_report import plot_summary

PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def main() -> None:
    """Write the pages and draw the plots."""
    for path in PAGES:
        path.write_text(rewrite_sections(path.read_text(encoding="utf-8"), path_to_records(path)), encoding="utf-8")
    for name in (*(f"kernels-{machine}" for machine in MACHINES), *(f"fuse-{machine}" for machine in MACHINES)):
        plot_record(Record.load(RESULTS / f"{name}.json"), RESULTS / f"{name}.png")
    for name in ("digits", "cifar10-resnet8"):
        plot_summary(load_json(name), RESULTS / f"{name}.png")


def rewrite_sections(page: str, results: str) -> str:
    """Return the page with its sections rewritten from the records. `results` is the path from the page to the records."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{SECTIONS[name](results)}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", section, page, flags=re.DOTALL)


def path_to_records(path: Path) -> str:
    """Return the path from a page to the records."""
    return "bench/results" if path.parent == ROOT else "../bench/results"


if __name__ == "__main__":
    main()
