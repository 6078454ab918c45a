"""The command `fastentropy report`: show a run again, or compare several pruning runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fastentropy.calibration.report import write_report as write_calibration
from fastentropy.calibration.run import PAGE, is_finished, read_outcome
from fastentropy.cli.console import print_calibration
from fastentropy.cli.options import AsJson, check_writable, one_line_errors
from fastentropy.recipes.settings import check_read_history, read_history
from fastentropy.reporting.compared_runs import label_runs
from fastentropy.reporting.comparison import format_comparison, plot_comparison, write_comparison
from fastentropy.reporting.run_report import plot_summary, write_report


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders of fastentropy prune, or one of fastentropy calibrate.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML page to write. [default: report.html in the folder of a single run, else comparison.html]"),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Also write the plots of pruning runs as a picture to this .png file. [default: no picture]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a run again, or compare several pruning runs.

    For a calibration, its table is printed too. A comparison shows accuracy against the number of activations removed, and
    against latency. --json prints the history of a run or the summary of a calibration, and for several runs their histories
    by name.
    """
    with one_line_errors():
        if any(map(is_finished, runs)):
            _report_calibration(runs, output, png, as_json)
            return
        histories = _read_histories(runs)
        several = len(histories) > 1
        page = output or (Path("comparison.html") if several else next(iter(histories)).parent / "report.html")
        for path, suffix in ((page, ".html"), (png, ".png")):
            if path:
                check_writable(path, suffix)
        found: dict[str, Any] = _labelled(histories) if several else next(iter(histories.values()))
        written = _compare(found, page, png) if several else _report_again(*histories.popitem(), page, png)
    typer.echo(json.dumps(found, indent=2) if as_json else written)


def _report_calibration(runs: Sequence[Path], output: Path | None, png: Path | None, as_json: bool) -> None:
    """Write the page of a calibration again, and print its outcome as at the end of the run."""
    folder, *others = runs
    if others or png:
        raise ValueError("a calibration is reported by itself, without a comparison or --png; name only its folder")
    page = output or folder / PAGE
    check_writable(page, ".html")
    statistics, summary = read_outcome(folder)
    write_calibration(statistics, summary, page)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        print_calibration(statistics, summary, page, Console())


def _read_histories(runs: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Read and check the history of each run.

    Args:
        runs: the folders of the runs, or their `history.json` files.

    Returns:
        The parsed histories, by the path of the file.

    Raises:
        ValueError: a run is named twice, or a history is missing or damaged.
    """
    histories: dict[Path, dict[str, Any]] = {}
    for run in runs:
        path = run if run.is_file() else run / "history.json"
        if path.resolve() in map(Path.resolve, histories):
            raise ValueError(f"{run} is named twice; name each run once")
        histories[path] = read_history(path)
        check_read_history(histories[path], path)
    return histories


def _report_again(path: Path, history: dict[str, Any], page: Path, png: Path | None) -> str:
    if not history["steps"]:
        raise ValueError(f"{path}: no step is finished yet; there is nothing to report")
    write_report(history, page)
    if png:
        plot_summary(history, png)
    return f"report   {page}"


def _labelled(histories: dict[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the histories by short names of their runs."""
    files = map(Path.resolve, histories)
    labels = label_runs([path.parent if path.name == "history.json" else path for path in files])
    return dict(zip(labels, histories.values(), strict=True))


def _compare(labelled: dict[str, dict[str, Any]], page: Path, png: Path | None) -> str:
    table = format_comparison(labelled)
    write_comparison(labelled, page)
    if png:
        plot_comparison(labelled, png)
    return f"{table}\n\nreport   {page}"
