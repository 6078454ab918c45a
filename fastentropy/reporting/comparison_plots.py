"""The plots of a comparison: test accuracy of each step against activations removed, and against latency."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastentropy.reporting.compared_runs import Runs
from fastentropy.reporting.plots import BLUE, GREY, INK, ORANGE

#: Okabe and Ito's colours, without those that are hard to see on a light or a dark ground, and filled markers. Together they
#: tell 42 runs apart.
COLORS = [BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
MARKERS = "osD^v<>"
#: Markers of published results are not filled, so that none is mistaken for a run.
PUBLISHED_MARKERS = "x+*1"
#: Inches: the height of a plot and of a line in its legend; the width of a character there, and of a marker with its margin.
PLOT, LINE, CHARACTER, MARK = 3.2, 0.18, 0.07, 0.55
#: Styles of the steps that were tried, of the kept one, which stands out, of those rejected after it, and of published results.
TRIED: dict[str, Any] = {"markersize": 4, "linewidth": 1.3}
KEPT: dict[str, Any] = {"linestyle": "none", "markersize": 9, "markeredgecolor": INK, "markeredgewidth": 1.2, "zorder": 3}
REJECTED: dict[str, Any] = TRIED | {"linestyle": "--", "markerfacecolor": "none"}
PUBLISHED_STYLE: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1, "markersize": 8}


def draw_removed(axes: Axes, runs: Runs) -> dict[str, Line2D]:
    """Draw test accuracy of each step against the activations removed, with published results. Return the legend's entries."""
    axes.set_xlabel("activations removed")
    entries = _draw_runs(axes, runs, {label: run.depths for label, run in runs.started.items()})
    for published, marker in zip(runs.published, PUBLISHED_MARKERS, strict=False):
        scores = [100 * published.dense, 100 * published.pruned]
        (line,) = axes.plot([0, published.removed], scores, marker=marker, **PUBLISHED_STYLE)
        entries[f"{published.model}, published"] = line
    axes.set_xlim(left=-0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return entries


def draw_latency(axes: Axes, runs: Runs) -> dict[str, Line2D]:
    """Draw test accuracy of each step against the time of one call of its fused network. Return the legend's entries."""
    axes.set_xlabel("latency, fused (ms per call)")
    times = {label: [step["latency_ms"]["fused"] for step in run.steps] for label, run in runs.started.items()}
    for label, run in runs.started.items():
        times[label][0], times[label][run.kept_step] = run.latency["dense_fused"], run.latency["fused"]
    entries = _draw_runs(axes, runs, times)
    axes.set_xlim(left=0)
    return entries


def _draw_runs(axes: Axes, runs: Runs, positions: Mapping[str, Sequence[float]]) -> dict[str, Line2D]:
    """Draw each run as a line up to its kept step, which stands out, and a dashed one to the rejected steps.

    Returns the lines that a legend explains, by its texts.
    """
    axes.set_ylabel("test accuracy (%)")
    axes.grid()
    axes.set_axisbelow(True)
    entries, kinds = {}, {}
    for index, (label, text) in enumerate(runs.entries.items()):
        if label not in runs.started:
            continue
        run, at = runs.started[label], positions[label]
        kept, scores = run.kept_step, [100 * step["test"] for step in run.steps]
        draw = partial(axes.plot, color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)])
        (entries[text],) = draw(at[: kept + 1], scores[: kept + 1], **TRIED)
        if label in runs.finished:
            draw(at[kept], scores[kept], **KEPT)
            kinds["the kept step"] = Line2D([], [], color=GREY, marker="o", **KEPT)
        if run.rejected_step:
            draw(at[kept:], scores[kept:], markevery=slice(1, None), **REJECTED)
            kinds["rejected steps"] = Line2D([], [], color=GREY, marker="o", **REJECTED)
    return entries | kinds


def draw_legend(figure: Figure, entries: Mapping[str, Line2D]) -> None:
    """Add a legend below the plots, where it hides no line, with as many columns as fit. The figure grows by its height."""
    widths = [MARK + CHARACTER * len(text) for text in entries]
    shapes = ((columns, np.array_split(widths, columns)) for columns in range(len(widths), 0, -1))
    columns = next((columns for columns, parts in shapes if sum(map(max, parts)) <= figure.get_figwidth()), 1)
    figure.set_figheight(figure.get_figheight() + LINE * math.ceil(len(widths) / columns))
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns, fontsize=8)
