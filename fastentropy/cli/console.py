"""What a command shows in the terminal: progress bars while it runs, and a table when it has finished."""

import contextlib
import datetime
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from fastentropy._utils.text import format_count, format_integer, plural
from fastentropy.calibration.report import format_overhead
from fastentropy.collector.statistics import Statistics
from fastentropy.pruning.steps import Step
from fastentropy.recipes import Progress, Report
from fastentropy.reporting.history import RunHistory

T = TypeVar("T")
Display = TypeVar("Display", bound="_Display")

#: Maximum number of kinds of problems with the data that the terminal lists.
MAX_PROBLEMS = 5
#: Progress that comes sooner after the last one than this, in seconds, is not shown.
SHORTEST_UPDATE = 0.2
#: Where no terminal shows the bars, a line about the progress is printed at most once in so many seconds.
BETWEEN_LINES = 60.0


class _Display:
    """Progress bars that are shown while a `with` block runs. They stay on the screen afterwards."""

    def __init__(self, *columns: ProgressColumn, console: Console) -> None:
        self._console = console
        self._progress = RichProgress(*columns, console=console)
        self._printed = time.monotonic()

    def _update(self, task: TaskID, **changes: Any) -> None:
        """Bring a bar up to date, and print a line about it from time to time if it goes to a file in place of a terminal."""
        self._progress.update(task, **changes)
        now = time.monotonic()
        if self._console.is_terminal or now - self._printed < BETWEEN_LINES:
            return
        self._printed = now
        bar = next(each for each in self._progress.tasks if each.id == task)
        share = "" if bar.total is None else f" {bar.percentage:.0f}%,"
        self._console.print(f"{bar.description}:{share} {bar.fields['figure']}", highlight=False, soft_wrap=True)

    def __enter__(self: Display) -> Display:
        """Start to show the bars."""
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop updating the bars, and leave them on the screen."""
        self._progress.stop()


class ProgressDisplay(_Display):
    """The progress bars of a pruning run: one for the activations removed so far, and one for the current phase of a step."""

    def __init__(self, console: Console) -> None:
        """Create the bars, which are drawn on `console`."""
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=None, table_column=Column(max_width=16)),
            TextColumn("{task.completed}/{task.total}"), _Figure(table_column=Column(no_wrap=True)), console=console,
        )  # fmt: skip
        self._removed = self._progress.add_task("activations removed", total=None, figure="", visible=False)

    def track(self, values: Iterable[T], total: int, title: str) -> Iterator[T]:
        """Yield the values, and show a bar that counts them and disappears after the last one.

        Args:
            values: the values of the phase. A float is shown next to the bar as the loss. For a `Progress` the bar counts
                images, and images per second and the time left are shown.
            total: the number of values.
            title: the text next to the bar.
        """
        task = self._progress.add_task(title, total=total, figure="")
        show = _ImageCounter(functools.partial(self._update, task))
        try:
            for value in values:
                if isinstance(value, Progress):
                    show(value)
                else:
                    figure = f"loss {value:.3f}" if isinstance(value, float) else ""
                    self._update(task, advance=1, figure=figure)
                yield value
        finally:
            self._progress.remove_task(task)

    @contextlib.contextmanager
    def phase(self, title: str) -> Iterator[Report]:
        """Show a bar within a `with` block. The block gets a function that brings the bar to the progress it is given.

        The bar appears with the first progress.
        """
        task = self._progress.add_task(title, total=None, figure="", visible=False)
        try:
            yield _ImageCounter(functools.partial(self._update, task))
        finally:
            self._progress.remove_task(task)

    def finish_step(self, steps: Sequence[Step], most_removed: int) -> None:
        """Print a line about the last of the steps, and update the bar that counts the removed activations.

        Args:
            steps: the finished steps.
            most_removed: how many activations are removed at most; 0 if that is not known, so that it may be all.
        """
        step = steps[-1]
        removed = sum(len(each.removed) for each in steps)
        score = f"validation {step.score:.2%}"
        neurons = sum(len(each.linear) + len(each.constant) for each in step.neurons.values())
        what = plural(neurons, "neuron") if neurons else ", ".join(step.removed) or "dense network"
        total = most_removed or len(steps[0].layer_entropy)
        self._progress.update(self._removed, completed=removed, total=total, figure=score, visible=True)
        self._console.print(f"step {len(steps) - 1}: {what}, {score}", highlight=False)


class _ImageCounter:
    """Shows on a progress bar how many images have been worked on, how many a second, and how long the rest will take."""

    def __init__(self, update: Callable[..., None]) -> None:
        """Begin to measure the time. `update` brings the bar up to date."""
        self._update = update
        self._began = self._shown = time.monotonic()

    def __call__(self, value: Progress) -> None:
        """Bring the bar up to date, at most a few times a second, since reading a loss waits for the GPU."""
        now = time.monotonic()
        if now - self._shown < SHORTEST_UPDATE and value.done < value.total:
            return
        self._shown, seconds = now, max(now - self._began, 1e-9)
        time_left = datetime.timedelta(seconds=round(seconds * (value.total - value.done) / value.done))
        loss = "" if value.loss is None else f", loss {float(value.loss):.2f}"
        speed = value.done / seconds
        figure = f"{format_count(round(speed)) if speed >= 9.95 else f'{speed:.1f}'} images/s, {time_left} left{loss}"
        self._update(completed=value.done, total=value.total, figure=figure, time_left=time_left, visible=True)


class _Figure(ProgressColumn):
    """A column with the figure of a task, and with the time since its start where the figure does not tell the time left."""

    def render(self, task: Task) -> Text:
        """Return the text for a task, such as "0:01:23 loss 0.310" or "96 images/s, 0:01:23 left"."""
        elapsed = datetime.timedelta(seconds=round(task.elapsed or 0))
        return Text(task.fields["figure"] if "time_left" in task.fields else f"{elapsed} {task.fields['figure']}")


class _TimeLeft(TimeRemainingColumn):
    """A column with the remaining time."""

    def render(self, task: Task) -> Text:
        """Return the remaining time, such as "01:23 left", or an empty text if the task is finished."""
        return Text() if task.finished else super().render(task).append(" left")


class CalibrationDisplay(_Display):
    """The progress bar of a calibration, with the speed and the cost of collecting statistics."""

    def __init__(self, console: Console, total: int | None, unit: str, shows_units: bool) -> None:
        """Create the bar.

        Args:
            console: the console to draw on.
            total: the length of the bar, in bytes of data, or in units if `shows_units` is true. None if it is unknown.
            unit: the name of the units that are counted: "tokens" or "images".
            shows_units: whether the bar shows units instead of bytes.
        """
        super().__init__(
            TextColumn("{task.description}"), BarColumn(bar_width=16), TaskProgressColumn(),
            TextColumn("{task.fields[figure]}"), _TimeLeft(compact=True), console=console,
        )  # fmt: skip
        self._task = self._progress.add_task("calibrate", total=total, figure="")
        self._unit, self._shows_units = unit, shows_units

    def show(self, read: int, tokens: int, tokens_per_second: float, overhead: float | None) -> None:
        """Update the bar.

        Args:
            read: the bytes of data read so far.
            tokens: the units (tokens or images) counted so far.
            tokens_per_second: the units counted per second.
            overhead: the time of inference while collecting statistics, relative to the time without. None if it is unknown.
        """
        cost = "" if overhead is None else f", time ×{overhead:.3f}"
        figure = f"{format_count(tokens)} {self._unit}, {format_count(round(tokens_per_second))}/s{cost}"
        self._update(self._task, completed=tokens if self._shows_units else read, figure=figure)


def print_calibration(statistics: Statistics, summary: Mapping[str, Any], page: Path, console: Console) -> None:
    """Print the outcome of a calibration: a table of the activations, and a few lines of figures.

    Args:
        statistics: the statistics of the activations.
        summary: the summary of the run, as `run_calibration` returns it.
        page: the report of the run.
        console: the console to print to.
    """
    unit, problems = summary["unit"], summary["problems"]
    more = len(problems) - MAX_PROBLEMS
    lines = [
        str(statistics),
        "",
        f"data     {format_integer(summary['tokens'])} {unit} in {plural(summary['documents'], 'document')}",
        f"speed    {format_count(round(summary['tokens_per_second']))} {unit} per second on "
        f"{plural(summary['ranks'], 'process', 'processes')}",
        f"cost     {format_overhead(summary)}",
        *(f"note     {notice}" for notice in summary["notices"]),
        *(f"left out {problem['path']}: {problem['what']} ({problem['times']} ×)" for problem in problems[:MAX_PROBLEMS]),
        *([f"left out {plural(more, 'more kind')}: see the report"] if more > 0 else []),
        f"report   {page}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def print_history(history: Mapping[str, Any], folder: Path, console: Console) -> None:
    """Print the outcome of a finished pruning run: a table of the steps, and a few lines of figures.

    Args:
        history: the parsed `history.json` of the run.
        folder: the folder of the run, which holds its report.
        console: the console to print to.
    """
    run, steps, kept = RunHistory(history), history["steps"], history["kept_step"]
    table = Table(title="Steps (* kept)", title_justify="left")
    for name in ("step", "removed", "bits", "valid.", "test", "ms", "fused ms"):
        table.add_column(name, justify="left" if name == "removed" else "right", overflow="fold")
    for index, step in enumerate(steps):
        entropies = steps[index - 1]["layer_entropy"] if index else {}
        table.add_row(
            f"{index}{' *' if index == kept else ''}",
            _removal(run, index) if index else "(dense)",
            "" if run.is_by_neuron else "\n".join(f"{entropies[name]:.3f}" for name in step["removed"]),
            f"{step['validation']:.2%}",
            f"{step['test']:.2%}",
            f"{step['latency_ms']['pruned']:.2f}",
            f"{step['latency_ms']['fused']:.2f}",
            style="bold" if index == kept else ("dim" if index > kept else None),
        )
    console.print(table)
    _print_outcome(history, folder, console)


def _removal(run: RunHistory, index: int) -> str:
    """Return what the step with this index removed: the names of activations, or the number of neurons."""
    if run.is_by_neuron:
        return plural(run.depths[index] - run.depths[index - 1], "neuron")
    return "\n".join(run.steps[index]["removed"])


def _print_outcome(history: Mapping[str, Any], folder: Path, console: Console) -> None:
    run = RunHistory(history)
    times = run.latency
    largest = max((projection["relative_error"] for projection in run.collapsed), default=0.0)
    stretches = plural(len(run.collapsed), "stretch", "stretches")
    approximated = f"approx.  {stretches}, each by one convolution: error up to {largest:.0%} before training"
    neurons = [f"neurons  {run.depths[run.kept_step]} replaced"] if run.is_by_neuron else []
    lines = [
        f"removed  {run.removed} of {plural(len(run.sites), 'activation')}",
        *neurons,
        f"test     {run.dense['test']:.2%} -> {run.kept['test']:.2%}",
        f"latency  dense {times['dense']:.2f} ms, pruned {times['pruned']:.2f} ms, fused {times['fused']:.2f} ms: "
        f"{run.speedup:.2f}x as fast as dense",
        *([approximated] if run.collapsed else []),
        f"error    {history['fusion']['max_relative_error']:.0e} (relative), fused against pruned",
        f"report   {folder / 'report.html'}",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
