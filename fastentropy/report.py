"""One pruning run as a page that opens from disk, and as one picture: pure functions of the run's history."""

import io
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import matplotlib.style
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastentropy.files import replace_file
from fastentropy.plots import BLUE, GREY, INK, MARGIN, ORANGE, ROW, STYLE, draw_layer_entropy, label_sites

#: Inches: the width of a figure of the page.
WIDTH = 7.6


def write_report(history: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write the history of one run (`history.json`) as one HTML page that needs nothing but itself.

    The same history gives the same bytes. A run that is not finished (`"kept_step": null`) gives the page of its steps.
    """
    run = _Run(history)
    environment = Environment(
        loader=PackageLoader("fastentropy"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, milliseconds=_milliseconds)
    page = environment.get_template("report.html.j2").render(run=run, headline=_headline(run), figures=_figures(run))
    replace_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def plot_summary(history: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write one PNG: the dense network's entropies, then accuracy and latency against the activations removed."""
    run = _Run(history)
    panels = {"Entropy of each activation": _draw_entropy, "Accuracy": _draw_accuracy, "Latency": _draw_latency}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(13, max(3.6, _rows_height(run))), layout="constrained")
        for axes, (title, draw) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            draw(axes, run)
            axes.set_title(title, loc="left", pad=20, fontweight="bold")
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))


class _Run:
    """A history, and what the page and the plots read out of it. Step 0 is the dense network."""

    def __init__(self, history: Mapping[str, Any]) -> None:
        self.history = history
        self.steps: Sequence[Mapping[str, Any]] = history["steps"]
        self.kept_step: int = len(self.steps) - 1 if history["kept_step"] is None else history["kept_step"]
        self.fusion: Mapping[str, Any] | None = history["fusion"]
        self.dense, self.kept = self.steps[0], self.steps[self.kept_step]
        self.sites: list[str] = list(self.dense["layer_entropy"])
        self.depths = list(itertools.accumulate(len(step["removed"]) for step in self.steps))
        self.tried_at = {name: index for index, step in enumerate(self.steps) for name in step["removed"]}

    @property
    def removed(self) -> int:
        """How many sites are linearised in the kept network."""
        return self.depths[self.kept_step]

    @property
    def rejected_step(self) -> int | None:
        """The step that fell too far, if the run has come to one."""
        return self.kept_step + 1 if self.kept_step + 1 < len(self.steps) else None

    @property
    def lowest_validation(self) -> float:
        """The score that a step must reach to be kept."""
        return float(self.dense["validation"] - self.history["options"]["max_drop"])

    @property
    def latency(self) -> Mapping[str, float]:
        """Milliseconds per call, measured side by side at the end; of a run that has not come to it, those of its steps."""
        dense, kept = self.dense["latency_ms"], self.kept["latency_ms"]
        steps = {"dense": dense["pruned"], "dense_fused": dense["fused"], "pruned": kept["pruned"], "fused": kept["fused"]}
        return self.history["latency_ms"] or steps

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense network, run as it is."""
        return self.latency["dense"] / self.latency["fused"]

    def entropy_before(self, index: int) -> dict[str, float]:
        """What a step removed, with the entropy in bits that each site had before."""
        return {name: self.steps[index - 1]["layer_entropy"][name] for name in self.steps[index]["removed"]}


def _headline(run: _Run) -> str:
    exceptions = {0: "No activation is", len(run.sites): f"All {len(run.sites)} activations are"}
    removed = exceptions.get(run.removed, f"{run.removed} of {len(run.sites)} activations are")
    change = round(100 * (run.kept["test"] - run.dense["test"]), 2)
    points = f"{abs(change):.2f} points {'more' if change > 0 else 'less'}" if change else "the same"
    so_far = " so far" if run.fusion is None else ""
    return f"{removed} removed{so_far}: {run.speedup:.2f} times as fast as the dense network, {points} test accuracy."


def _percent(score: float) -> str:
    return f"{100 * score:.2f}"


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _figures(run: _Run) -> dict[str, Markup]:
    """The page's figures as inline SVG, by name."""
    rows = _rows_height(run)
    return {
        "entropy": _svg(_draw_entropy, run, rows, "Bars: the entropy of each activation in the dense network"),
        "map": _svg(_draw_entropy_map, run, rows, "Heat map: the entropy of each activation after each step"),
        "accuracy": _svg(_draw_accuracy, run, 3.2, "Lines: accuracy in percent against activations removed"),
        "latency": _svg(_draw_latency, run, 3.2, "Lines: milliseconds per call against activations removed"),
    }


def _svg(draw: Callable[[Axes, _Run], None], run: _Run, height: float, description: str) -> Markup:
    """A figure as an SVG element that takes its ink from the page, so that it reads on a light and on a dark ground."""
    buffer = io.StringIO()
    # Identifiers must be unique in a page: the salt tells its figures apart, and those of groups are used by nothing.
    with matplotlib.style.context(["default", STYLE, {"svg.hashsalt": description}]):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.subplots(), run)
        no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = re.sub(r'<g id="[\w.]+"', "<g", buffer.getvalue())
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))


def _rows_height(run: _Run) -> float:
    return MARGIN + ROW * len(run.sites)


def _draw_entropy(axes: Axes, run: _Run) -> None:
    """A bar for each site of the dense network, in call order; the removed ones in another colour, with their step."""
    gone = {name for name, step in run.tried_at.items() if step <= run.kept_step}
    notes = {name: f", {'removed' if name in gone else 'tried'} at step {step}" for name, step in run.tried_at.items()}
    draw_layer_entropy(axes, run.dense["layer_entropy"], dict.fromkeys(gone, ORANGE), notes)


def _draw_entropy_map(axes: Axes, run: _Run) -> None:
    """Sites × steps; a cell's colour is the entropy of the site after the step, and hatching says that it is gone."""
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


def _entropy_range(entropies: Sequence[Sequence[float]]) -> Normalize:
    """The tenths of a bit between which the entropies lie: networks differ more than the layers of one network."""
    bits = [value for row in entropies for value in row if not math.isnan(value)] or [0.0, 1.0]
    lowest, highest = math.floor(10 * min(bits)) / 10, math.ceil(10 * max(bits)) / 10
    return Normalize(min(lowest, highest - 0.1), highest)


def _draw_accuracy(axes: Axes, run: _Run) -> None:
    """Validation and test accuracy of each step, and the lowest validation accuracy that is kept."""
    for split, color, marker in (("validation", BLUE, "o"), ("test", ORANGE, "s")):
        axes.plot(run.depths, [100 * step[split] for step in run.steps], color=color, marker=marker, label=split)
    axes.axhline(100 * run.lowest_validation, color=GREY, linestyle="--", label="lowest validation to keep")
    axes.set_ylabel("accuracy (%)")
    _finish_lines(axes, run)


def _draw_latency(axes: Axes, run: _Run) -> None:
    """The time of one call of each step's network, as it is and fused."""
    for form, color, marker in (("pruned", BLUE, "o"), ("fused", ORANGE, "s")):
        axes.plot(run.depths, [step["latency_ms"][form] for step in run.steps], color=color, marker=marker, label=form)
    axes.set_ylim(0, 1.1 * max(max(step["latency_ms"].values()) for step in run.steps))
    axes.set_ylabel("latency (ms per call)")
    _finish_lines(axes, run)


def _finish_lines(axes: Axes, run: _Run) -> None:
    axes.axvline(run.removed, color=INK, linewidth=0.8, zorder=1)
    _label_steps(axes, run, run.depths)
    axes.set_xlabel("activations removed")
    axes.grid(axis="y")
    axes.legend()


def _label_steps(axes: Axes, run: _Run, positions: Sequence[int]) -> None:
    """Limit the axis to the steps' positions, and write `kept` and `rejected` above those of these two."""
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
