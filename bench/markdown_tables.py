"""Tables of measured figures in Markdown, with lines that tell which record in bench/results the figures come from."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastentropy.benchmarks.measurements import Measurement, Quartiles
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.tables import format_quartiles

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
#: The machines for which there is a record of each benchmark.
MACHINES = ("epyc", "h100")


def load_json(name: str) -> dict[str, Any]:
    """Read bench/results/NAME.json, for a record that was not made by `fastentropy bench`."""
    values: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return values


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, from the texts of its head and its rows."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def quartiles(values: Quartiles, digits: int = 2) -> str:
    """Return a median and, in brackets, its quartiles as text, such as "1.00 (0.98 to 1.03)"."""
    return f"{values.median:.{digits}f} ({format_quartiles(values, digits)})"


def inverse(values: Quartiles) -> Quartiles:
    """Return the quartiles of the reciprocals: from ratios of times to ratios of speeds."""
    return Quartiles(1 / values.upper, 1 / values.median, 1 / values.lower)


def origin(name: str, machine: str, date: str, commit: str | None, command: str, results: str) -> str:
    """Return a line that tells where figures come from: machine, date, commit, a link to the record `name`, and command."""
    at = f", commit {commit}" if commit else ""
    machine = machine.replace(", 1 threads", ", 1 thread")  # as older records have it
    return f"{machine}, {date}{at}: [{name}.json]({results}/{name}.json), by `{command}`."


def of_record(name: str, record: Record, results: str) -> str:
    """Return a line that tells where the figures of a record of `fastentropy bench` come from, and if it is incomplete."""
    stopped = "" if record.complete else " The run is incomplete."
    return origin(name, record.machine, record.date, record.commit, record.command, results) + stopped


def for_each_machine(kind: str, head: Sequence[str], rows: Callable[[Record], Iterable[Sequence[str]]], results: str) -> str:
    """Return a table for the record of each machine, below a line that tells where its figures come from.

    Args:
        kind: the name of the benchmark: "kernels", "collect" or "fuse".
        head: the head of the table.
        rows: a function from a record to the rows of its table.
        results: the path from the page to bench/results.
    """
    parts = []
    for name in (f"{kind}-{machine}" for machine in MACHINES):
        record = Record.load(RESULTS / f"{name}.json")
        parts.append(f"{of_record(name, record, results)}\n\n{table(head, rows(record))}")
    return "\n\n".join(parts)


def case_rows(row: Callable[[str, dict[str, Measurement]], Sequence[str]], record: Record) -> Iterator[Sequence[str]]:
    """Yield `row(case, operations)` for each case of a record. `operations` are its measurements, by operation."""
    return (row(case, by_operation(measurements)) for case, measurements in record.cases().items())


def by_operation(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    """Return the measurements of one case by the name of the operation, without skipped operations."""
    return {each.operation: each for each in measurements if each.ratio}


def median(measurement: Measurement | None) -> str:
    """Return the median ratio of a measurement as text, or a dash if there is no measurement."""
    return f"{measurement.ratio.median:.2f}" if measurement and measurement.ratio else "–"
