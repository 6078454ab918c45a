"""The changes since an older record, next to the noise."""

from __future__ import annotations

import dataclasses
import textwrap

from fastentropy._utils.text import WIDTH, format_milliseconds, format_table
from fastentropy.benchmarks.measurements import Quartiles
from fastentropy.benchmarks.records import Record


@dataclasses.dataclass(frozen=True)
class Change:
    """The milliseconds of one operation in two records."""

    case: str
    operation: str
    before: Quartiles
    after: Quartiles

    @property
    def change(self) -> float:
        """Return the change of the median as a share of the older one: 0.1 is ten percent slower."""
        return self.after.median / self.before.median - 1

    @property
    def noise(self) -> float:
        """Return half the sum of the two interquartile ranges, each as a share of its median."""
        return sum((times.upper - times.lower) / times.median for times in (self.before, self.after)) / 2

    @property
    def is_real(self) -> bool:
        """Return whether the interquartile ranges do not overlap."""
        return self.after.apart_from(self.before)


def compare(old: Record, new: Record) -> list[Change]:
    """Return the changes of the operations that both records have, in the order of the new one."""
    before = {(each.case, each.operation): each.milliseconds for each in old.measurements}
    changes = []
    for each in new.measurements:
        times = before.get((each.case, each.operation))
        if times and each.milliseconds:
            changes.append(Change(each.case, each.operation, times, each.milliseconds))
    return changes


def format_changes(old: Record, new: Record) -> str:
    """Return a table of all changes, case by case, in 80 columns. Changes beyond the noise are marked."""
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
