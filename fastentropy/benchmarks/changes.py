"""The changes of the times since an older record, compared with the noise of the two runs."""

from __future__ import annotations

import dataclasses
import textwrap

from fastentropy._utils.text import WIDTH, format_milliseconds, format_table
from fastentropy.benchmarks.measurements import Quartiles
from fastentropy.benchmarks.records import Record


@dataclasses.dataclass(frozen=True)
class Change:
    """The times of one operation in an older and a newer record.

    Attributes:
        case: the name of the case.
        operation: the name of the operation.
        before: the milliseconds of one call in the older record.
        after: the milliseconds of one call in the newer record.
    """

    case: str
    operation: str
    before: Quartiles
    after: Quartiles

    @property
    def change(self) -> float:
        """Return the relative change of the median time: 0.1 means ten percent slower."""
        return self.after.median / self.before.median - 1

    @property
    def noise(self) -> float:
        """Return the mean of the two interquartile ranges, each relative to its median."""
        return sum((times.upper - times.lower) / times.median for times in (self.before, self.after)) / 2

    @property
    def is_real(self) -> bool:
        """Return whether the change exceeds the noise, which means that the interquartile ranges do not overlap."""
        return self.after.apart_from(self.before)


def compare(old: Record, new: Record) -> list[Change]:
    """Return the change of each operation that was measured in both records, in the order of the new record."""
    before = {(each.case, each.operation): each.milliseconds for each in old.measurements}
    changes = []
    for each in new.measurements:
        times = before.get((each.case, each.operation))
        if times and each.milliseconds:
            changes.append(Change(each.case, each.operation, times, each.milliseconds))
    return changes


def format_changes(old: Record, new: Record) -> str:
    """Return the changes between two records as text of 80 columns, with a table for each case.

    Args:
        old: the older record.
        new: the newer record of the same benchmark.

    Returns:
        The text. Changes that exceed the noise are marked as "slower" or "faster".
    """
    changes = compare(old, new)
    if not changes:
        return "Nothing was measured in both records: the cases or the sizes differ."
    lines = [_origin("before:", old), _origin("now:   ", new)]
    if old.machine != new.machine:
        lines.append("The records are of two machines, which may explain the changes.")
    for case in dict.fromkeys(change.case for change in changes):
        rows = [_row(change) for change in changes if change.case == case]
        lines += ["", case, format_table(["operation", "before, ms", "now, ms", "change", "noise", ""], rows)]
    marked = sum(change.is_real for change in changes)
    return "\n".join([*lines, "", f"{marked} of {len(changes)} changed by more than the noise within the two runs."])


def _row(change: Change) -> list[str]:
    return [
        change.operation,
        format_milliseconds(change.before.median),
        format_milliseconds(change.after.median),
        f"{change.change:+.1%}",
        f"±{change.noise:.1%}",
        ("slower" if change.change > 0 else "faster") if change.is_real else "",
    ]


def _origin(name: str, record: Record) -> str:
    text = f"{name} {record.machine}, {record.date}, commit {record.commit or 'unknown'}, torch {record.versions['torch']}"
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * (len(name) + 1))
