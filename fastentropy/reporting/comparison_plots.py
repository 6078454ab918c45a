"""The plots of a comparison of runs: the test accuracy after each step against activations removed, and against latency."""

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

#: Colours of Okabe and Ito's palette, without those that are hard to see on a light or a dark ground, and filled markers. Their
#: combinations distinguish up to 42 runs.
COLORS = [BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
MARKERS = "osD^v<>"
#: Markers of published results. They are not filled, so none is mistaken for a run.
PUBLISHED_MARKERS = "x+*1"
#: Sizes in inches: the height of a plot, the height of a line of the legend, the width of a character of the legend, and the
#: width of a marker in the legend with its margin.
PLOT, LINE, CHARACTER, MARK = 3.2, 0.18, 0.07, 0.55
#: Styles of the steps up to the kept one, of the kept step itself, of the rejected steps after it, and of published results.
TRIED: dict[str, Any] = {"markersize": 4, "linewidth": 1.3}
KEPT: dict[str, Any] = {"linestyle": "none", "markersize": 9, "markeredgecolor": INK, "markeredgewidth": 1.2, "zorder": 3}
REJECTED: dict[str, Any] = TRIED | {"linestyle": "--", "markerfacecolor": "none"}
PUBLISHED_STYLE: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1, "markersize": 8}


def draw_removed(axes: Axes, runs: Runs) -> dict[str, Line2D]:
    """Draw the test accuracy after each step against the number of activations removed, and the published results.

    Runs that replace single neurons are left out.

    Returns:
        The lines that the legend explains, by their text in the legend.
    """
    axes.set_xlabel("activations removed")
    entries = _draw_runs(axes, runs, {label: run.depths for label, run in runs.started.items() if not run.is_by_neuron})
    for published, marker in zip(runs.published, PUBLISHED_MARKERS, strict=False):
        (line,) = axes.plot(*zip(*published.tests, strict=True), marker=marker, **PUBLISHED_STYLE)
        entries[f"{published.model}, published"] = line
    axes.set_xlim(left=-0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return entries


def draw_latency(axes: Axes, runs: Runs) -> dict[str, Line2D]:
    """Draw the test accuracy after each step against the milliseconds of one call of the step's fused network.

    Returns:
        The lines that the legend explains, by their text in the legend.
    """
    axes.set_xlabel("latency, fused (ms per call)")
    times = {label: [step["latency_ms"]["fused"] for step in run.steps] for label, run in runs.started.items()}
    for label, run in runs.started.items():
        times[label][0], times[label][run.kept_step] = run.latency["dense_fused"], run.latency["fused"]
    entries = _draw_runs(axes, runs, times)
    axes.set_xlim(left=0)
    return entries


def _draw_runs(axes: Axes, runs: Runs, positions: Mapping[str, Sequence[float]]) -> dict[str, Line2D]:
    """Draw each run as a solid line up to its kept step, a large marker there, and a dashed line through the rejected steps.

    Args:
        axes: the axes to draw on.
        runs: the runs.
        positions: the x coordinate of each step of a run, by the label of the run. Runs that are missing are not drawn.

    Returns:
        The lines that the legend explains, by their text in the legend.
    """
    axes.set_ylabel("test accuracy (%)")
    axes.grid()
    axes.set_axisbelow(True)
    entries, kinds = {}, {}
    for index, (label, text) in enumerate(runs.entries.items()):
        if label not in positions:
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
    """Add a legend below the plots of a figure, with as many columns as fit. The figure grows by the height of the legend.

    Texts that are wider than the figure are cut off. They begin with the label of their run.

    Args:
        figure: the figure, whose width is fixed.
        entries: the lines that the legend explains, by their text.
    """
    longest = int((figure.get_figwidth() - MARK) / CHARACTER)
    texts = [text if len(text) <= longest else f"{text[: longest - 1]}…" for text in entries]
    widths = [MARK + CHARACTER * len(text) for text in texts]
    shapes = ((columns, np.array_split(widths, columns)) for columns in range(len(widths), 0, -1))
    columns = next((columns for columns, parts in shapes if sum(map(max, parts)) <= figure.get_figwidth()), 1)
    figure.set_figheight(figure.get_figheight() + LINE * math.ceil(len(widths) / columns))
    figure.legend(list(entries.values()), texts, loc="outside lower left", ncols=columns, fontsize=8)
