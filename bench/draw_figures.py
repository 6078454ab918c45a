"""Write every figure that the README and docs/results.md quote from the records in bench/results, and draw their pictures.

python bench/draw_figures.py

A page has sections between <!-- NAME --> and <!-- /NAME -->, which nobody else writes. A test holds the pages to it.
"""

import re
from pathlib import Path

from sections import MACHINES, RESULTS, ROOT, SECTIONS, loaded

from fastentropy.benchmarks.plots import plot_record
from fastentropy.benchmarks.records import Record
from fastentropy.reporting.run_report import plot_summary

PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def main() -> None:
    """Write the sections and the pictures."""
    for path in PAGES:
        path.write_text(drawn(path.read_text(encoding="utf-8"), links_from(path)), encoding="utf-8")
    for name in (*(f"kernels-{machine}" for machine in MACHINES), *(f"fuse-{machine}" for machine in MACHINES)):
        plot_record(Record.load(RESULTS / f"{name}.json"), RESULTS / f"{name}.png")
    for name in ("digits", "cifar10-resnet8"):
        plot_summary(loaded(name), RESULTS / f"{name}.png")


def drawn(page: str, results: str) -> str:
    """The page with its sections as the records have them; results is the path from the page to the records."""

    def section(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{SECTIONS[name](results)}\n<!-- /{name} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", section, page, flags=re.DOTALL)


def links_from(path: Path) -> str:
    """The way from a page to the records."""
    return "bench/results" if path.parent == ROOT else "../bench/results"


# The kernels -----------------------------------------------------------------------------------------------------------


# Collecting ------------------------------------------------------------------------------------------------------------


# Fusing ----------------------------------------------------------------------------------------------------------------


# The README's choice ---------------------------------------------------------------------------------------------------


# The goals -------------------------------------------------------------------------------------------------------------


# The runs --------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    main()
