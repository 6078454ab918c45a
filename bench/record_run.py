"""Keep a finished run as bench/results/NAME.json, and draw its picture beside it.

fastentropy prune --output RUN && python bench/record_run.py RUN digits
"""

import sys
from pathlib import Path

from records import RESULTS

from fastentropy.files import save_json
from fastentropy.report import plot_summary
from fastentropy.runs import read_history


def main(folder: str, name: str) -> None:
    """Record the run in a folder, without where its data lay."""
    history = read_history(Path(folder) / "history.json")
    history["options"].pop("data", None)
    save_json(history, RESULTS / f"{name}.json")
    plot_summary(history, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
