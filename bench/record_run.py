"""Copy the record of a finished run to bench/results/NAME.json. For a pruning run, also draw its plots, as NAME.png.

fastentropy prune --output RUN && python bench/record_run.py RUN digits
fastentropy calibrate MODEL --data DATA --output RUN && python bench/record_run.py RUN minilm
"""

import json
import sys
from pathlib import Path

from records import RESULTS

from fastentropy._utils.files import save_json
from fastentropy.recipes.settings import read_history
from fastentropy.reporting.run_report import plot_summary


def main(folder: str, name: str) -> None:
    """Copy the record of a run to bench/results, without the local paths of its data and its weights.

    Args:
        folder: the folder of a run of `fastentropy prune` or `fastentropy calibrate`.
        name: the name of the record, without a suffix.
    """
    if (Path(folder) / "summary.json").exists():
        record_calibration(json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8")), name)
        return
    history = read_history(Path(folder) / "history.json")
    for path in ("data", "weights"):
        history["options"].pop(path, None)
    save_json(history, RESULTS / f"{name}.json")
    plot_summary(history, RESULTS / f"{name}.png")


def record_calibration(summary: dict, name: str) -> None:
    """Write the summary of a calibration to bench/results. Paths of the model and the data are replaced by their last parts."""
    names = {key: Path(summary[key]).name for key in ("model", "data")}
    save_json(summary | names, RESULTS / f"{name}.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
