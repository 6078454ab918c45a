"""The measurements of a case as a table of 80 columns.

A case is a group of operations that are timed side by side. The table shows the time of each operation and its ratio to the
time of the reference operation of the case.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from fastentropy._utils.text import WIDTH, format_milliseconds, format_table
from fastentropy.benchmarks.measurements import Measurement, Quartiles


def format_case(measurements: Sequence[Measurement]) -> str:
    """Return the measurements of one case as text.

    Args:
        measurements: the measurements of all operations of the case. At least one operation was measured.

    Returns:
        The name of the case, a table with a row for each measured operation, and the reasons for which others were skipped.
    """
    measured = [each for each in measurements if each.milliseconds]
    head, rows = ["", "ms", "times baseline", "quartiles"], [_times(each) for each in measured]
    if any(each.bytes for each in measured):
        head += ["GB/s", "of copy"]
        rows = [[*row, *_bandwidth(each)] for row, each in zip(rows, measured, strict=True)]
    if any("peak_bytes" in each.facts for each in measured):
        head.append("added MB")
        least = min(each.facts["peak_bytes"] for each in measured if "peak_bytes" in each.facts)
        rows = [[*row, _memory(each, least)] for row, each in zip(rows, measured, strict=True)]
    notes = [f"{each.operation} was skipped: {each.skipped}" for each in measurements if each.skipped]
    skipped = [textwrap.fill(note, WIDTH, subsequent_indent="  ") for note in notes]
    return "\n".join([measurements[0].case, format_table(head, rows), *skipped])


def format_quartiles(quartiles: Quartiles, digits: int = 2) -> str:
    """Return the lower and the upper quartile as text, such as "0.98 to 1.03"."""
    return f"{quartiles.lower:.{digits}f} to {quartiles.upper:.{digits}f}"


def _times(measurement: Measurement) -> list[str]:
    times, ratio = measurement.milliseconds, measurement.ratio
    assert times is not None
    assert ratio is not None
    return [measurement.operation, format_milliseconds(times.median), f"{ratio.median:.2f}", format_quartiles(ratio)]


def _bandwidth(measurement: Measurement) -> list[str]:
    speed, share = measurement.gigabytes_per_second, measurement.percent_of_roof
    return ["" if speed is None else f"{speed:.1f}", "" if share is None else f"{share:.0f} %"]


def _memory(measurement: Measurement, least: int) -> str:
    size = measurement.facts.get("peak_bytes")
    return "" if size is None else f"{(size - least) / 1e6:.2f}"
