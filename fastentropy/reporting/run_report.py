"""The report of one pruning run: an HTML page and a PNG picture, both made from its history (`history.json`) alone."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import matplotlib.style
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastentropy._utils.files import replace_file
from fastentropy._utils.text import plural
from fastentropy.reporting.history import RunHistory
from fastentropy.reporting.pages import draw_svg, write_page
from fastentropy.reporting.plots import BAR, BLUE, GREY, INK, MARGIN, ORANGE, ROW, STYLE, draw_layer_entropy, label_sites


def write_report(history: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write the report of one run as one self-contained HTML page. The same history gives the same bytes.

    Args:
        history: the parsed `history.json`, with at least one step. If its "kept_step" is None, the run is unfinished, and the
            page shows its steps so far.
        path: the HTML file to write.
    """
    run = RunHistory(history)
    write_page("report.html.j2", path, run=run, headline=_headline(run), figures=_figures(run))


def plot_summary(history: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Draw the entropies of the dense network, and accuracy and latency against activations removed, to one PNG file.

    Args:
        history: the parsed `history.json`, with at least one step.
        path: the PNG file to write.
    """
    run = RunHistory(history)
    panels = {"Entropy of each activation": _draw_entropy, "Accuracy": _draw_accuracy, "Latency": _draw_latency}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(13, max(3.6, _rows_height(run))), layout="constrained")
        for axes, (title, draw) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            draw(axes, run)
            axes.set_title(title, loc="left", pad=20, fontweight="bold")
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))


def _headline(run: RunHistory) -> str:
    sites = len(run.sites)
    exceptions = {0: "No activation is", sites: f"All {sites} activations are" if sites > 1 else "The only activation is"}
    removed = exceptions.get(run.removed, f"{run.removed} of {sites} activations {'are' if run.removed > 1 else 'is'}")
    if run.is_by_neuron:
        removed = f"The activation of {plural(run.depths[run.kept_step], 'neuron')} is"
    change = round(100 * (run.kept["test"] - run.dense["test"]), 2)
    points = f"{abs(change):.2f} points {'more' if change > 0 else 'less'}" if change else "the same"
    so_far = " so far" if run.fusion is None else ""
    return f"{removed} removed{so_far}: {run.speedup:.2f} times as fast as the dense network, {points} test accuracy."


def draw_figures(history: Mapping[str, Any], names: Sequence[str], of: str) -> dict[str, Markup]:
    """Return some figures of the page of a run as inline SVG, by name, to be shown on another page.

    Args:
        history: the parsed `history.json`, with at least one step.
        names: the names of the figures: "entropy", "map", "accuracy" or "latency".
        of: text that is added to the descriptions of the figures, so that they are unique on the page.
    """
    return _figures(RunHistory(history), names, of)


def _figures(run: RunHistory, names: Sequence[str] | None = None, of: str = "") -> dict[str, Markup]:
    """Return the figures of the page as inline SVG, by name; see `draw_figures`. By default, all are returned."""
    rows = _rows_height(run)
    drawn = {
        "entropy": (_draw_entropy, rows, "Bars: the entropy of each activation in the dense network"),
        "map": (_draw_entropy_map, rows, "Heat map: the entropy of each activation after each step"),
        "accuracy": (_draw_accuracy, 3.2, "Lines: accuracy in percent against activations removed"),
        "latency": (_draw_latency, 3.2, "Lines: milliseconds per call against activations removed"),
    }
    if run.is_by_neuron:
        drawn["neurons"] = (_draw_neurons, rows, "Bars: the shares of active, linear and constant neurons of each activation")
    shown = {name: drawn[name] for name in (names or drawn)}
    return {name: draw_svg(partial(draw, run=run), height, f"{text}{of}") for name, (draw, height, text) in shown.items()}


def _rows_height(run: RunHistory) -> float:
    return MARGIN + ROW * len(run.sites)


def _draw_entropy(axes: Axes, run: RunHistory) -> None:
    """Draw a bar for the entropy of each site (call of an activation) of the dense network, in call order.

    Removed sites have another colour. A note gives the step at which a site was removed or tried.
    """
    gone = {name for name, step in run.tried_at.items() if step <= run.kept_step}
    notes = {name: f", {'removed' if name in gone else 'tried'} at step {step}" for name, step in run.tried_at.items()}
    draw_layer_entropy(axes, run.dense["layer_entropy"], dict.fromkeys(gone, ORANGE), notes)


def _draw_entropy_map(axes: Axes, run: RunHistory) -> None:
    """Draw a map with a row per site and a column per step.

    The colour of a cell is the entropy of the site after the step. Cells of removed sites are hatched.
    """
    entropies = [[step["layer_entropy"].get(name, math.nan) for step in run.steps] for name in run.sites]
    edges = [[index - 0.5 for index in range(len(cells) + 1)] for cells in (run.steps, run.sites)]
    mesh = axes.pcolormesh(*edges, entropies, norm=_entropy_range(entropies))
    for name, step in run.tried_at.items():
        row, columns = run.sites.index(name), len(run.steps) - step
        axes.barh(row, columns, 1, step - 0.5, color="none", edgecolor=GREY, hatch="//////", linewidth=0.5)
    for column, line in ((run.kept_step, "-"), (run.rejected_step, ":")):
        if column is not None:
            frame = axes.axvspan(column - 0.5, column + 0.5, fill=False, edgecolor=INK, linestyle=line, linewidth=1.4)
            frame.set_clip_on(False)
    label_sites(axes, run.sites)
    _label_steps(axes, run, range(len(run.steps)))
    axes.set_xlabel("step")
    axes.figure.colorbar(mesh, ax=axes, label="entropy (bits)", aspect=30, pad=0.02)


def _draw_neurons(axes: Axes, run: RunHistory) -> None:
    """Draw a bar for each site that is divided into its active, linear and constant neurons in the kept network."""
    shares = list(run.neuron_shares.values())
    linear, constant = [100 * share for share, _ in shares], [100 * share for _, share in shares]
    rows, ends = range(len(shares)), [a + b for a, b in zip(linear, constant, strict=True)]
    axes.barh(rows, linear, BAR, color=ORANGE, label="linear")
    axes.barh(rows, constant, BAR, linear, color=GREY, label="constant")
    axes.barh(rows, [100 - end for end in ends], BAR, ends, color=BLUE, label="active")
    label_sites(axes, run.sites)
    axes.set_xlim(0, 100)
    axes.set_xlabel("neurons (%)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)


def _entropy_range(entropies: Sequence[Sequence[float]]) -> Normalize:
    """Return the colour range of the entropies, rounded outwards to tenths of a bit.

    The range follows the data, because the layers of one network differ less than networks do.
    """
    bits = [value for row in entropies for value in row if not math.isnan(value)] or [0.0, 1.0]
    lowest, highest = math.floor(10 * min(bits)) / 10, math.ceil(10 * max(bits)) / 10
    return Normalize(min(lowest, highest - 0.1), highest)


def _draw_accuracy(axes: Axes, run: RunHistory) -> None:
    """Draw the validation and test accuracy after each step, and the lowest validation accuracy at which a step is kept."""
    for split, color, marker in (("validation", BLUE, "o"), ("test", ORANGE, "s")):
        axes.plot(run.depths, [100 * step[split] for step in run.steps], color=color, marker=marker, label=split)
    if run.lowest_validation > 0:
        axes.axhline(100 * run.lowest_validation, color=GREY, linestyle="--", label="lowest validation to keep")
    axes.set_ylabel("accuracy (%)")
    _finish_lines(axes, run)


def _draw_latency(axes: Axes, run: RunHistory) -> None:
    """Draw the milliseconds of one call of each step's network, before and after fusing."""
    for form, color, marker in (("pruned", BLUE, "o"), ("fused", ORANGE, "s")):
        axes.plot(run.depths, [step["latency_ms"][form] for step in run.steps], color=color, marker=marker, label=form)
    axes.set_ylim(0, 1.1 * max(max(step["latency_ms"].values()) for step in run.steps))
    axes.set_ylabel("latency (ms per call)")
    _finish_lines(axes, run)


def _finish_lines(axes: Axes, run: RunHistory) -> None:
    axes.axvline(run.depths[run.kept_step], color=INK, linewidth=0.8, zorder=1)
    _label_steps(axes, run, run.depths)
    axes.set_xlabel(run.unit)
    axes.grid(axis="y")
    axes.legend()


def _label_steps(axes: Axes, run: RunHistory, positions: Sequence[int]) -> None:
    """Limit the x axis to the steps, and label the kept step and the first rejected step above the plot.

    Args:
        axes: the axes to label.
        run: the run.
        positions: the x coordinate of each step.
    """
    labels = [(run.kept_step, "kept", "center" if run.rejected_step is None else "right", INK)]
    if run.rejected_step is not None:
        labels.append((run.rejected_step, "rejected", "left", ORANGE))
    for step, label, side, color in labels:
        axes.annotate(
            label,
            (positions[step], 1),
            (0, 3),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            horizontalalignment=side,
            color=color,
            fontsize=8,
        )
    axes.set_xlim(-0.5, positions[-1] + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
