"""The plot of a record of `fastentropy bench`.

The plot of the kernels is a roofline: achieved bandwidth against the number of values. The other plots show ratios: the time of
each operation relative to that of a reference operation, with a row for each case.
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
    "copy": {"color": GREY, "linestyle": "--", "label": "fastest copy (the roof)"},
    "activation alone": {"color": INK, "marker": "o", "label": "relu"},
    "activation_states": {"color": BLUE, "marker": "s", "label": "activation_states: relu and its states"},
    "count_states": {"color": ORANGE, "marker": "^", "label": "count_states: the states alone"},
}
BASELINE_MARKERS = dict(zip(sorted(BASELINES), ("x", "+", "1", "2"), strict=True))
#: Operations of fastentropy, whose markers are filled with a colour in the plot of ratios.
OURS = {"collecting": BLUE, "fused": BLUE, "collecting, eager": ORANGE, "fused, torch.compile": ORANGE}
#: The markers of all other operations there, in their order in the record.
OTHER_MARKERS = "xo+^1d*"
#: Sizes in inches in the plot of ratios: the height of a row, which shows a case, and the sum of the margins of the figure.
ROW, MARGIN = 0.3, 1.5
#: The copies of tensors whose numbers of values differ by at most this factor are copies of one size.
SAME_SIZE = 1.1


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
            copies = [each for each in relu if (each.operation, each.facts["dtype"]) == ("copy", dtype)]
            _draw_roofline(panels[row, column], here, copies)
            panels[row, column].set_title(f"{layout}, {dtype}", loc="left", fontweight="bold")
        panels[row, 0].set_ylabel("GB/s, read and written")
        panels[row, 0].set_ylim(bottom=0)  # after the whole row is drawn, since its panels share the height
    for axes in panels[-1]:
        axes.set_xlabel("values")
    lines = {line.get_label(): line for axes in panels.flat for line in axes.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _draw_roofline(axes: Axes, measurements: list[Measurement], copies: list[Measurement]) -> None:
    """Draw a line for each operation of `LINES`, and a marker for each baseline.

    The lines show CUDA graphs if there are any. The roof is the fastest copy of each size, because copying does
    not depend on the layout. The baselines are eager calls at the largest number of values.

    Args:
        axes: the axes to draw on.
        measurements: the measurements of one layout and dtype.
        copies: the measurements of copies of all layouts of this dtype.
    """
    largest = max(each.facts["values"] for each in measurements)
    operations = list(dict.fromkeys(each.operation for each in measurements))
    for operation in (name for name in LINES if name in operations):
        points = [each for each in measurements if each.operation == operation and not _is_eager(each, measurements)]
        points.sort(key=lambda each: each.facts["values"])
        heights = [_roof(each, copies) if operation == "copy" else _bandwidth(each) for each in points]
        axes.plot([each.facts["values"] for each in points], heights, **LINES[operation])
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


def _roof(copy: Measurement, copies: list[Measurement]) -> float:
    """Return the bandwidth of the fastest of the copies that have the size of `copy`."""
    sizes = [(each, max(each.facts["values"], copy.facts["values"])) for each in copies]
    return max(
        _bandwidth(each) for each, larger in sizes if larger <= SAME_SIZE * min(each.facts["values"], copy.facts["values"])
    )


def _is_eager(measurement: Measurement, measurements: list[Measurement]) -> bool:
    """Return whether a measurement is an eager call although others of the same plot are CUDA graphs.

    Such a measurement is not drawn as part of a line, because it includes the time that Python takes to launch kernels.
    """
    return not measurement.facts["cuda_graph"] and any(each.facts["cuda_graph"] for each in measurements)


def _ratios(record: Record) -> Figure:
    """Draw a row for each case, with a marker and the quartiles of each operation, on one axis of ratios. Return the figure."""
    cases = {name: [each for each in each_case if each.ratio] for name, each_case in record.cases().items()}
    operations = dict.fromkeys(each.operation for each_case in cases.values() for each in each_case)
    others = [operation for operation in operations if operation not in OURS]
    figure = Figure(figsize=(9, MARGIN + ROW * len(cases)), layout="constrained")
    axes = figure.subplots()
    entries = {}
    for row, measurements in enumerate(cases.values()):
        for each in measurements:
            assert each.ratio is not None
            low, middle, high = each.ratio
            color = OURS.get(each.operation, INK)
            marker = "s" if each.operation in OURS else OTHER_MARKERS[others.index(each.operation) % len(OTHER_MARKERS)]
            axes.plot([low, high], [row, row], color=color, linewidth=1)
            (entries[each.operation],) = axes.plot(
                middle, row, marker, color=color, markerfacecolor=color if each.operation in OURS else "none"
            )
    axes.axvline(1, color=INK, linewidth=0.8, zorder=1)
    axes.set_yticks(range(len(cases)), list(cases), fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid()
    axes.set_axisbelow(True)
    axes.set_xlabel("time, as a multiple of the baseline's")
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=4, fontsize=8)
    return figure
