"""Write the sections with measured figures of README.md and docs/results.md, and draw their plots, from bench/results.

python bench/draw_figures.py

A section lies between <!-- NAME --> and <!-- /NAME -->. Do not edit it by hand, because a test checks that it is what this
script writes.
"""

import re
from pathlib import Path

from markdown_tables import MACHINES, RESULTS, ROOT, load_json
from sections import SECTIONS

from fastentropy.benchmarks.plots import plot_record
from fastentropy.benchmarks.records import Record
from fastentropy.reporting.run_report import plot_summary

PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def main() -> None:
    """Rewrite the sections of the pages, and draw the plots."""
    for path in PAGES:
        path.write_text(rewrite_sections(path.read_text(encoding="utf-8"), path_to_records(path)), encoding="utf-8")
    for name in (*(f"kernels-{machine}" for machine in MACHINES), *(f"fuse-{machine}" for machine in MACHINES)):
        plot_record(Record.load(RESULTS / f"{name}.json"), RESULTS / f"{name}.png")
    for name in ("digits", "cifar10-resnet8", "efficientnet-lite0"):
        plot_summary(load_json(name), RESULTS / f"{name}.png")


def rewrite_sections(page: str, results: str) -> str:
    """Rewrite the sections of a page from the records.

    Args:
        page: the text of the page.
        results: the path from the page to the folder of the records, for links.

    Returns:
        The new text of the page.
    """

    def section(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{SECTIONS[name](results)}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", section, page, flags=re.DOTALL)


def path_to_records(path: Path) -> str:
    """Return the relative path from a page to the folder of the records, for links."""
    return "bench/results" if path.parent == ROOT else "../bench/results"


if __name__ == "__main__":
    main()
