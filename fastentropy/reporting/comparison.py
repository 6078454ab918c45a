"""The comparison of several pruning runs of one recipe: an HTML page, a PNG picture and a text table.

All three are made from the histories (`history.json`) of the runs alone.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastentropy._utils.files import replace_file
from fastentropy._utils.text import GAP, format_milliseconds, format_percent, format_table
from fastentropy._utils.text import WIDTH as TERMINAL
from fastentropy.reporting.compared_runs import COLUMN_LENGTH, SOURCE, Runs, distinct_machines
from fastentropy.reporting.comparison_plots import PLOT, draw_latency, draw_legend, draw_removed
from fastentropy.reporting.history import RunHistory
from fastentropy.reporting.pages import draw_svg, write_page
from fastentropy.reporting.plots import STYLE

#: A space at which a line is not broken.
UNBROKEN = "\N{NO-BREAK SPACE}"
#: A run is called the fastest only if it is at least this many times as fast as the second one. The noise is smaller.
LEAD = 1.02


def write_comparison(histories: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Compare several runs on one self-contained HTML page. The same histories give the same bytes.

    Args:
        histories: the parsed `history.json` of each run, by the label of the run.
        path: the HTML file to write.

    Raises:
        ValueError: the runs have different recipes, or no run has a finished step.
    """
    runs = Runs(histories)
    headline, best = _verdict(runs)
    write_page("comparison.html.j2", path, runs=runs, headline=headline, best=best, figures=_figures(runs), source=SOURCE)


def plot_comparison(histories: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]) -> Figure:
    """Draw the test accuracy of several runs against activations removed, and against latency, to one PNG file.

    Args:
        histories: the parsed `history.json` of each run, by the label of the run.
        path: the PNG file to write.

    Returns:
        The figure.

    Raises:
        ValueError: the runs have different recipes, or no run has a finished step.
    """
    runs = Runs(histories)
    panels = {"Accuracy against activations removed": draw_removed, "Accuracy against latency": draw_latency}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 1.2 * PLOT), layout="constrained")
        entries: dict[str, Line2D] = {}
        for axes, (title, draw) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            entries |= draw(axes, runs)
            axes.set_title(title, loc="left", fontweight="bold")
        draw_legend(figure, entries)
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))
    return figure


def format_comparison(histories: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the comparison of several runs as text of 80 columns.

    Args:
        histories: the parsed `history.json` of each run, by the label of the run.

    Returns:
        A sentence with the result, tables of the figures and of the differing options, and notes.

    Raises:
        ValueError: the runs have different recipes, or no run has a finished step.
    """
    runs = Runs(histories)
    common = {"recipe": runs.recipe, **runs.common}
    notes = [f"The same in all runs: {', '.join(f'{name}{UNBROKEN}{text}' for name, text in common.items())}."]
    if len(runs.finished) < len(runs.labels):
        notes.append("* unfinished: shown up to its last step.")
    if runs.on_different_machines:
        notes.append("Latencies are of different machines or versions of PyTorch: compare them only within a run.")
    headline, *others = (textwrap.fill(note, TERMINAL, break_on_hyphens=False) for note in [_verdict(runs)[0], *notes])
    return "\n\n".join([headline, *_text_tables(runs), "\n".join(others).replace(UNBROKEN, " ")])


def _verdict(runs: Runs) -> tuple[str, str | None]:
    """Return a sentence with the result of the comparison, and the label of the best run, or None if no run is the best."""
    finished = runs.finished
    if len(finished) < 2:
        which = f"Only {next(iter(finished))}" if finished else "None of the runs"
        return f"{which} is finished, so there is no best run yet.", None
    if len(distinct_machines(finished)) > 1:
        return "The latencies are of different machines, so they do not tell which run is fastest.", None
    fastest, second = sorted(finished, key=lambda label: finished[label].latency["fused"])[:2]
    if finished[second].latency["fused"] < LEAD * finished[fastest].latency["fused"]:
        return f"No run is clearly the fastest: {fastest} and {second} are less than {100 * (LEAD - 1):.0f} % apart.", None
    of = "" if len(finished) == len(runs.labels) else " of the finished runs"
    accurate = max(finished, key=lambda label: (finished[label].kept["test"], label == fastest))
    if accurate == fastest:
        return f"{fastest} is the fastest{of}, and none is more accurate: {_figures_of(finished[fastest])}.", fastest
    limits = {(runs.options["model"][label], run.history["options"]["max_drop"]) for label, run in finished.items()}
    if len(limits) == 1:
        ((_, drop),) = limits
        limit = f"within the same accuracy limit ({100 * drop:.2f} points of validation accuracy)"
        return f"{fastest} is the fastest{of} {limit}: {_figures_of(finished[fastest])}.", fastest
    verdicts = [
        f"{label} is the {what}{of} ({_figures_of(finished[label])})"
        for label, what in ((fastest, "fastest"), (accurate, "most accurate"))
    ]
    return f"{', '.join(verdicts)}.", None


def _figures_of(run: RunHistory) -> str:
    time, test = format_milliseconds(run.latency["fused"]), format_percent(run.kept["test"])
    return f"{time} ms per call, {run.speedup:.2f} times as fast as its dense network, {test} % test accuracy"


def _text_tables(runs: Runs) -> list[str]:
    """Return the tables of the comparison as text.

    The first table holds the results, and as many of the options that differ between the runs as fit into its width. Further
    tables hold the remaining differing options.
    """
    results = _results(runs)
    whole = TERMINAL - min(max(map(len, runs.labels)), COLUMN_LENGTH)
    room = whole - sum(_width(head, texts) for head, texts in results.items())
    tables: list[dict[str, list[str]]] = [{}]
    for name, by_label in runs.short.items():
        texts = list(by_label.values())
        if _width(name, texts) > room:
            tables.append({})
            room = whole
        tables[-1][name] = texts
        room -= _width(name, texts)
    return [
        format_table(["run", *columns], list(zip(runs.labels, *columns.values(), strict=True)), left=1 + len(options))
        for options, columns in zip(tables, [tables[0] | results, *tables[1:]], strict=True)
    ]


def _width(head: str, texts: Sequence[str]) -> int:
    return len(GAP) + max(map(len, [head, *texts]))


def _results(runs: Runs) -> dict[str, list[str]]:
    """Return the columns of the table of results: head of the column → one cell per run."""
    columns: dict[str, list[str]] = {"removed": [], "test, %": [], "ms per call": [], "speed": []}
    for label in runs.labels:
        cells = ["-"] * len(columns)
        if run := runs.started.get(label):
            tests, times = (run.dense["test"], run.kept["test"]), (run.latency["dense"], run.latency["fused"])
            cells = [
                f"{run.removed} of {len(run.sites)}",
                " -> ".join(map(format_percent, tests)),
                " -> ".join(map(format_milliseconds, times)),
                f"{run.speedup:.2f}x",
            ]
        if len(runs.finished) < len(runs.labels):
            cells[0] += "  " if label in runs.finished else " *"
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return columns


def _figures(runs: Runs) -> dict[str, Markup]:
    """Return the figures of the page as inline SVG, by name."""
    drawn = {
        "removed": (draw_removed, "Lines: test accuracy in percent against activations removed, for each run"),
        "latency": (draw_latency, "Lines: test accuracy in percent against milliseconds per call, for each run"),
    }

    def draw(axes: Axes, draw_lines: Callable[[Axes, Runs], dict[str, Line2D]]) -> None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        draw_legend(figure, draw_lines(axes, runs))

    return {name: draw_svg(partial(draw, draw_lines=lines), PLOT, text) for name, (lines, text) in drawn.items()}
