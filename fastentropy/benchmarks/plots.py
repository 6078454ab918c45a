"""The plot of a record of `fastentropy bench`.

The plot of the kernels is a roofline: achieved bandwidth against the number of values. The other plots show bars: the time of
each operation relative to that of a reference operation.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastentropy._utils.files import replace_file
from fastentropy.benchmarks.kernels import BASELINES
from fastentropy.benchmarks.measurements import Measurement
from fastentropy.benchmarks.records import Record
from fastentropy.reporting.plots import BLUE, FORMATS, GREY, INK, ORANGE, STYLE, figure_format

#: Style and label of each operation that is a line in the roofline. Baselines are drawn as markers only.
LINES: dict[str, dict[str, Any]] = {
    "copy": {"color": GREY, "linestyle": "--", "label": "copy (the roof)"},
    "activation alone": {"color": INK, "marker": "o", "label": "relu"},
    "activation_states": {"color": BLUE, "marker": "s", "label": "activation_states: relu and its states"},
    "count_states": {"color": ORANGE, "marker": "^", "label": "count_states: the states alone"},
}
BASELINE_MARKERS = dict(zip(sorted(BASELINES), ("x", "+", "1", "2"), strict=True))
#: Sizes in inches in the plot of relative times: the height of a row, which shows a bar, and the sum of the margins above and
#: below the rows of a panel.
ROW, MARGIN = 0.22, 0.55


def plot_record(record: Record, path: str | PathLike[str]) -> None:
    """Draw a record to a file.

    Args:
        record: the record.
        path: the file to write, with the suffix .png, .svg or .pdf.

    Raises:
        ValueError: the path has another suffix.
    """
    form = figure_format(path)
    with matplotlib.style.context(["default", STYLE]):
        figure = _roofline(record) if record.benchmark == "kernels" else _ratios(record)
        figure.suptitle(f"{record.machine}, {record.date}, torch {record.versions['torch']}", fontsize=9)
        replace_file(path, lambda file: figure.savefig(file, format=form, dpi=120, metadata=FORMATS[form]))


def _roofline(record: Record) -> Figure:
    """Draw the achieved bandwidth against the number of values, in a panel for each layout and dtype. Return the figure."""
    relu = [each for each in record.measurements if each.facts.get("activation") == "relu" and each.milliseconds]
    layouts = list(dict.fromkeys(each.facts["layout"] for each in relu))
    dtypes = list(dict.fromkeys(each.facts["dtype"] for each in relu))
    figure = Figure(figsize=(10, 0.8 + 3.1 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(layouts), squeeze=False, sharex=True, sharey="row")
    for row, dtype in enumerate(dtypes):
        for column, layout in enumerate(layouts):
            here = [each for each in relu if (each.facts["layout"], each.facts["dtype"]) == (layout, dtype)]
            _draw_roofline(panels[row, column], here)
            panels[row, column].set_title(f"{layout}, {dtype}", loc="left", fontweight="bold")
        panels[row, 0].set_ylabel("GB/s, read and written")
        panels[row, 0].set_ylim(bottom=0)  # after the whole row is drawn, since its panels share the height
    for axes in panels[-1]:
        axes.set_xlabel("values")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_roofline(axes: Axes, measurements: list[Measurement]) -> None:
    """Draw a line for each operation of `LINES`, and a marker for each baseline.

    The lines show CUDA graphs if there are any. The baselines are eager calls at the largest number of values.

    Args:
        axes: the axes to draw on.
        measurements: the measurements of one layout and dtype.
    """
    largest = max(each.facts["values"] for each in measurements)
    operations = list(dict.fromkeys(each.operation for each in measurements))
    for operation in (name for name in LINES if name in operations):
        points = [each for each in measurements if each.operation == operation and not _is_eager(each, measurements)]
        points.sort(key=lambda each: each.facts["values"])
        axes.plot([each.facts["values"] for each in points], [_bandwidth(each) for each in points], **LINES[operation])
    baselines = [each for each in measurements if each.operation not in LINES and each.facts["values"] == largest]
    for each in baselines:
        axes.plot(
            [largest], [_bandwidth(each)], BASELINE_MARKERS[each.operation], markersize=7, color=INK, label=each.operation
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda values, position: _in_units(values))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _in_units(values: float) -> str:
    """Return a number in units of powers of 1,024, such as "64 k", as the option --sizes has them."""
    power = min(int(math.log2(max(values, 1))) // 10, 3)
    return f"{values / 1024**power:.3g}{('', ' k', ' M', ' G')[power]}"


def _bandwidth(measurement: Measurement) -> float:
    assert measurement.gigabytes_per_second is not None
    return measurement.gigabytes_per_second


def _is_eager(measurement: Measurement, measurements: list[Measurement]) -> bool:
    """Return whether a measurement is an eager call although others of the same plot are CUDA graphs.

    Such a measurement is not drawn as part of a line, because it includes the time that Python takes to launch kernels.
    """
    return not measurement.facts["cuda_graph"] and any(each.facts["cuda_graph"] for each in measurements)


def _ratios(record: Record) -> Figure:
    """Draw a panel for each case, with a bar and the quartiles of the relative time of each operation. Return the figure."""
    cases = {name: [each for each in each_case if each.ratio] for name, each_case in record.cases().items()}
    heights = [MARGIN + ROW * len(each) for each in cases.values()]
    figure = Figure(figsize=(8, 0.5 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, measurements) in zip(panels, cases.items(), strict=True):
        for row, each in enumerate(measurements):
            assert each.ratio is not None
            low, middle, high = each.ratio
            color = BLUE if each.operation in ("collecting", "fused") else GREY
            axes.barh(row, middle, height=0.7, color=color)
            axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], color=INK, linewidth=1, capsize=2)
            axes.annotate(f"{middle:.2f}", (high, row), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(measurements)), [each.operation for each in measurements], fontsize=8)
        axes.set_ylim(len(measurements) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.margins(x=0.12)
        axes.set_title(name, loc="left", fontweight="bold", fontsize=9)
    panels[-1].set_xlabel("time, as a multiple of the baseline's")
    return figure
