"""Keep a finished run of the recipe digits as bench/results/digits.json and draw the README's picture from it.

fastentropy prune --output RUN && python bench/record_digits.py RUN
"""

import sys
from pathlib import Path

from fastentropy.files import save_json
from fastentropy.report import plot_summary
from fastentropy.runs import read_history

RESULTS = Path(__file__).parent / "results"


def main(folder: str) -> None:
    """Record the run in a folder."""
    history = read_history(Path(folder) / "history.json")
    save_json(history, RESULTS / "digits.json")
    plot_summary(history, RESULTS / "digits.png")


if __name__ == "__main__":
    main(sys.argv[1])
