"""The command `fastentropy report`: write the report of a pruning run again, or compare several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastentropy.cli.options import one_line_errors
from fastentropy.recipes.run import read_history
from fastentropy.reporting.compared_runs import label_runs
from fastentropy.reporting.comparison import format_comparison, plot_comparison, write_comparison
from fastentropy.reporting.history import check_history
from fastentropy.reporting.run_report import plot_summary, write_report


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders of fastentropy prune, or their history.json files.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML page to write. [default: report.html in the folder of a single run, else comparison.html]"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Also write the plots as a picture to this .png file. [default: no picture]")
    ] = None,
) -> None:
    """Write the report of a pruning run again, or compare several runs.

    A comparison shows accuracy against the number of activations removed, and against latency.
    """
    with one_line_errors():
        histories = _read_histories(runs)
        several = len(histories) > 1
        page = output or (Path("comparison.html") if several else next(iter(histories)).parent / "report.html")
        for path, suffix in ((page, ".html"), (png, ".png")):
            if path and (path.suffix != suffix or not path.parent.is_dir()):
                raise ValueError(f"{path} cannot be written; name a file that ends in {suffix}, in a folder that exists")
        written = _compare(histories, page, png) if several else _report_again(*histories.popitem(), page, png)
    typer.echo(written)


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
        try:
            check_history(histories[path])
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    return histories


def _report_again(path: Path, history: dict[str, Any], page: Path, png: Path | None) -> str:
    if not history["steps"]:
        raise ValueError(f"{path}: no step is finished yet; there is nothing to report")
    write_report(history, page)
    if png:
        plot_summary(history, png)
    return f"report   {page}"


def _compare(histories: dict[Path, dict[str, Any]], page: Path, png: Path | None) -> str:
    files = map(Path.resolve, histories)
    labels = label_runs([path.parent if path.name == "history.json" else path for path in files])
    labelled = dict(zip(labels, histories.values(), strict=True))
    table = format_comparison(labelled)
    write_comparison(labelled, page)
    if png:
        plot_comparison(labelled, png)
    return f"{table}\n\nreport   {page}"
