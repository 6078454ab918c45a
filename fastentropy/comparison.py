"""Several runs of one recipe beside each other, as a page, a picture and a table: pure functions of their histories."""

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastentropy.files import replace_file
from fastentropy.histories import RunHistory
from fastentropy.pages import draw_svg, write_page
from fastentropy.plots import BLUE, GREY, INK, ORANGE, STYLE
from fastentropy.tables import GAP, format_milliseconds, format_percent, format_table, shorten_names
from fastentropy.tables import WIDTH as TERMINAL

#: Okabe and Ito's colours without those that a light or a dark ground swallows, and filled marks: 42 runs look different.
COLORS = [BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]
MARKERS = "osD^v<>"
#: Marks of what is published have no filling, so that none is taken for that of a run.
PUBLISHED_MARKERS = "x+*1"
#: The characters of a run's label in a legend, and of a label and of an option in a column of a terminal.
LEGEND_LENGTH, COLUMN_LENGTH = 36, 16
#: Inches: the height of a plot, that of a line of its legend, and the width of a character there, of its mark and its margin.
PLOT, LINE, CHARACTER, MARK = 3.2, 0.18, 0.07, 0.55
#: How steps are drawn, the one that was kept, which stands out, those that were rejected after it, and what is published.
TRIED: dict[str, Any] = {"markersize": 4, "linewidth": 1.3}
KEPT: dict[str, Any] = {"linestyle": "none", "markersize": 9, "markeredgecolor": INK, "markeredgewidth": 1.2, "zorder": 3}
REJECTED: dict[str, Any] = TRIED | {"linestyle": "--", "markerfacecolor": "none"}
PUBLISHED_STYLE: dict[str, Any] = {"color": INK, "linestyle": ":", "linewidth": 1, "markersize": 8}
#: A space at which no line ends.
UNBROKEN = "\N{NO-BREAK SPACE}"
#: How many times as fast as the next run the fastest one must be to be called so: measured times vary by less.
LEAD = 1.02
#: The order in which options are told; others follow.
OPTIONS = ["model", "criterion", "collapse", "target_speedup", "seed", "max_drop", "max_removed", "per_step", "epochs"]
#: What options are that a history does not tell, because they are newer than it or were left to the recipe.
UNTOLD = {"criterion": "entropy", "zeros_together": False, "compile": False}
UNTOLD_MODELS = {"cifar10": "resnet18"}


@dataclass(frozen=True)
class Published:
    """What a paper reports of a model: its test accuracy before and after the removal of some of its activations."""

    model: str
    sites: int
    removed: int
    dense: float
    pruned: float


SOURCE = "EASIER, arXiv 2404.18949, Table 5"
#: By the letters and digits of the model's name in the recipe cifar10. The paper's VGG-16 has batch norm.
PUBLISHED = {
    "resnet18": Published("ResNet-18", 17, 8, 0.9247, 0.9210),
    "swint": Published("Swin-T", 12, 8, 0.9166, 0.9083),
    "mobilenetv2": Published("MobileNetV2", 35, 15, 0.9365, 0.9277),
    "vgg16": Published("VGG-16", 15, 10, 0.9350, 0.9304),
    "vgg16bn": Published("VGG-16", 15, 10, 0.9350, 0.9304),
}


def write_comparison(histories: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]) -> None:
    """Write the histories of several runs, by their labels, as one HTML page that needs nothing but itself.

    The same histories give the same bytes. Raises ValueError for runs of different recipes, and where no run has a step.
    """
    runs = _Runs(histories)
    headline, best = _verdict(runs)
    write_page("comparison.html.j2", path, runs=runs, headline=headline, best=best, figures=_figures(runs), source=SOURCE)


def plot_comparison(histories: Mapping[str, Mapping[str, Any]], path: str | PathLike[str]) -> Figure:
    """Write one PNG: test accuracy against the activations removed, and against the latency. Raises as the page does."""
    runs = _Runs(histories)
    panels = {"Accuracy against activations removed": _draw_removed, "Accuracy against latency": _draw_latency}
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(13, 1.2 * PLOT), layout="constrained")
        entries: dict[str, Line2D] = {}
        for axes, (title, draw) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            entries |= draw(axes, runs)
            axes.set_title(title, loc="left", fontweight="bold")
        _draw_legend(figure, entries)
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=160))
    return figure


def format_comparison(histories: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs as text for a terminal of 80 columns. Raises as the page does."""
    runs = _Runs(histories)
    common = {"recipe": runs.recipe, **runs.common}
    notes = [f"The same in all runs: {', '.join(f'{name}{UNBROKEN}{text}' for name, text in common.items())}."]
    if len(runs.finished) < len(runs.labels):
        notes.append("* unfinished: shown as far as it has come.")
    if runs.on_different_machines:
        notes.append("Latencies are of different machines or versions of PyTorch: compare them within a run only.")
    headline, *others = (textwrap.fill(note, TERMINAL, break_on_hyphens=False) for note in [_verdict(runs)[0], *notes])
    return "\n\n".join([headline, *_text_tables(runs), "\n".join(others).replace(UNBROKEN, " ")])


def label_runs(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other path has."""
    return [next(end for end in _ends(path) if sum(end in _ends(other) for other in paths) == 1) for path in paths]


def _ends(path: Path) -> list[str]:
    return [str(Path(*path.parts[start:])) for start in reversed(range(len(path.parts)))]


class _Runs:
    """Histories by label, and what the page, the picture and the tables read out of them."""

    def __init__(self, histories: Mapping[str, Mapping[str, Any]]) -> None:
        self.histories, self.labels, self.recipe = histories, list(histories), _common_recipe(histories)
        self.started = {label: RunHistory(history) for label, history in histories.items() if history["steps"]}
        if not self.started:
            raise ValueError(f"{', '.join(self.labels)}: no step is finished yet; there is nothing to compare")
        self.finished = {label: run for label, run in self.started.items() if run.history["kept_step"] is not None}
        self.on_different_machines = len(_machines(self.started)) > 1
        self.options = _options(histories, self.recipe)
        self.differing = {name: texts for name, texts in self.options.items() if len(set(texts.values())) > 1}
        same = {name: next(iter(texts.values())) for name, texts in self.options.items() if name not in self.differing}
        self.common = {name: text for name, text in same.items() if text not in ("none", "no")}
        self.short = {name: _shorten(texts, COLUMN_LENGTH) for name, texts in self.differing.items()}

    @property
    def published(self) -> list[Published]:
        """What is published of the models of these runs."""
        models = self.options["model"].values() if self.recipe == "cifar10" else ()
        names = ("".join(filter(str.isalnum, model)).lower() for model in models)
        return list(dict.fromkeys(PUBLISHED[name] for name in names if name in PUBLISHED))

    @property
    def entries(self) -> dict[str, str]:
        """What a legend says of each run: its label, how it differs from others, and whether it has not come to its end."""
        entries = _shorten(dict(zip(self.labels, self.labels, strict=True)), LEGEND_LENGTH)
        for label, name in entries.items():
            notes = [f"{option} {texts[label]}" for option, texts in self.short.items()]
            notes += [] if label in self.finished else ["unfinished"]
            entries[label] = f"{name} ({', '.join(notes)})" if notes else name
        return entries


def _shorten(texts: Mapping[str, str], length: int) -> dict[str, str]:
    return dict(zip(texts, shorten_names(list(texts.values()), length), strict=True))


def _common_recipe(histories: Mapping[str, Mapping[str, Any]]) -> str:
    (first, history), *others = histories.items()
    for label, other in others:
        if other["recipe"] != history["recipe"]:
            raise ValueError(
                f"{first} is a run of the recipe {history['recipe']!r} and {label} of {other['recipe']!r}; "
                "accuracies on different data cannot be compared"
            )
    return str(history["recipe"])


def _options(histories: Mapping[str, Mapping[str, Any]], recipe: str) -> dict[str, dict[str, str]]:
    """The options of the runs, the seed among them, as texts by name and label."""
    untold = {**UNTOLD, "model": UNTOLD_MODELS.get(recipe)}
    told = {label: {**history["options"], "seed": history["seed"]} for label, history in histories.items()}
    given = {label: {name: value for name, value in options.items() if value is not None} for label, options in told.items()}
    names = dict.fromkeys(itertools.chain(OPTIONS, *told.values()))
    return {name: {label: _tell({**untold, **options}.get(name)) for label, options in given.items()} for name in names}


def _tell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _machines(runs: Mapping[str, RunHistory]) -> set[tuple[str, str]]:
    """The machines and versions of PyTorch that latencies were measured with."""
    return {(run.history["machine"]["device"], run.history["machine"]["torch"]) for run in runs.values()}


def _verdict(runs: _Runs) -> tuple[str, str | None]:
    """What the comparison comes to in a sentence, and the label of the best run where there is one."""
    finished = runs.finished
    if len(finished) < 2:
        which = f"Only {next(iter(finished))}" if finished else "None of the runs"
        return f"{which} is finished; which one is best cannot be said yet.", None
    if len(_machines(finished)) > 1:
        return "The latencies are of different machines; which run is fastest cannot be said.", None
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
    told = [
        f"{label} is the {what}{of} ({_figures_of(finished[label])})"
        for label, what in ((fastest, "fastest"), (accurate, "most accurate"))
    ]
    return f"{', '.join(told)}.", None


def _figures_of(run: RunHistory) -> str:
    time, test = format_milliseconds(run.latency["fused"]), format_percent(run.kept["test"])
    return f"{time} ms per call, {run.speedup:.2f} times as fast as its dense network, {test} % test accuracy"


def _text_tables(runs: _Runs) -> list[str]:
    """The results beside as many of the options that differ as there is room for, then tables of the other options."""
    results = _results(runs)
    whole = TERMINAL - min(max(map(len, runs.labels)), COLUMN_LENGTH)
    room = whole - sum(_width(head, texts) for head, texts in results.items())
    tables: list[dict[str, list[str]]] = [{}]
    for name, told in runs.short.items():
        texts = list(told.values())
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


def _results(runs: _Runs) -> dict[str, list[str]]:
    """The columns of the table of results, by their heads."""
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


def _figures(runs: _Runs) -> dict[str, Markup]:
    """The page's figures as inline SVG, by name."""
    drawn = {
        "removed": (_draw_removed, "Lines: test accuracy in percent against activations removed, for each run"),
        "latency": (_draw_latency, "Lines: test accuracy in percent against milliseconds per call, for each run"),
    }

    def draw(axes: Axes, draw_lines: Callable[[Axes, _Runs], dict[str, Line2D]]) -> None:
        figure = axes.get_figure(root=True)
        assert figure is not None
        _draw_legend(figure, draw_lines(axes, runs))

    return {name: draw_svg(partial(draw, draw_lines=lines), PLOT, text) for name, (lines, text) in drawn.items()}


def _draw_removed(axes: Axes, runs: _Runs) -> dict[str, Line2D]:
    """Test accuracy of each step of each run against the activations removed, with what is published."""
    axes.set_xlabel("activations removed")
    entries = _draw_runs(axes, runs, {label: run.depths for label, run in runs.started.items()})
    for published, marker in zip(runs.published, PUBLISHED_MARKERS, strict=False):
        scores = [100 * published.dense, 100 * published.pruned]
        (line,) = axes.plot([0, published.removed], scores, marker=marker, **PUBLISHED_STYLE)
        entries[f"{published.model}, published"] = line
    axes.set_xlim(left=-0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return entries


def _draw_latency(axes: Axes, runs: _Runs) -> dict[str, Line2D]:
    """Test accuracy of each step of each run against the time of one call of its fused network."""
    axes.set_xlabel("latency, fused (ms per call)")
    times = {label: [step["latency_ms"]["fused"] for step in run.steps] for label, run in runs.started.items()}
    for label, run in runs.started.items():
        times[label][0], times[label][run.kept_step] = run.latency["dense_fused"], run.latency["fused"]
    entries = _draw_runs(axes, runs, times)
    axes.set_xlim(left=0)
    return entries


def _draw_runs(axes: Axes, runs: _Runs, positions: Mapping[str, Sequence[float]]) -> dict[str, Line2D]:
    """For each run a line up to its kept step, which stands out, and a dashed one to those that were rejected.

    Returns what a legend has to explain, by its texts.
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


def _draw_legend(figure: Figure, entries: Mapping[str, Line2D]) -> None:
    """Make a figure higher by a legend below its plots: lines may be anywhere in them. As many columns as there is room for."""
    widths = [MARK + CHARACTER * len(text) for text in entries]
    shapes = ((columns, np.array_split(widths, columns)) for columns in range(len(widths), 0, -1))
    columns = next((columns for columns, parts in shapes if sum(map(max, parts)) <= figure.get_figwidth()), 1)
    figure.set_figheight(figure.get_figheight() + LINE * math.ceil(len(widths) / columns))
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns, fontsize=8)
