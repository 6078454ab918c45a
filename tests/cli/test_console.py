"""What the terminal shows while a run works fits a line of 80 characters."""

import io
import time

import pytest
import torch
from rich.console import Console

from fastentropy.cli.console import ProgressDisplay
from fastentropy.pruning.steps import Step
from fastentropy.recipes import Progress


def shown(display):
    """Return the lines of a display on a terminal of 80 columns."""
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(display._progress.get_renderable())
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.fixture
def display(monkeypatch):
    clock = iter(range(0, 1_000_000, 100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    display = ProgressDisplay(Console(file=io.StringIO()))
    display._progress.update(display._removed, completed=12, total=33, figure="validation 95.12%", visible=True)
    return display


@pytest.mark.parametrize(
    ("progress", "counted", "figure"),
    [
        (Progress(96, 480, torch.tensor(1.234)), "96/480", "1.0 images/s, 0:06:40 left, loss 1.23"),
        (Progress(200_000, 1_281_167, torch.tensor(11.0)), "200000/1281167", "2.0 k images/s, 0:09:01 left, loss 11.00"),
        (Progress(640, 640), "640/640", "6.4 images/s, 0:00:00 left"),
    ],
)
def test_images_are_shown_in_one_line(progress, counted, figure, display):
    values = display.track([progress], 3, "train dense network")
    assert next(values) is progress
    removed, line = shown(display)
    assert removed.endswith("validation 95.12%")
    assert line.startswith("train dense network ")
    assert line.endswith(f"{counted} {figure}")
    assert list(values) == []
    assert len(shown(display)) == 1


def test_phase_is_shown_from_its_first_progress(display):
    with display.phase("validate") as report:
        assert len(shown(display)) == 1
        report(Progress(128, 500))
        assert shown(display)[1].endswith("128/500 1.3 images/s, 0:04:51 left")
    assert len(shown(display)) == 1


@pytest.mark.parametrize(("most", "counted"), [(2, "1/2"), (0, "1/3")])
def test_removed_activations_are_counted_up_to_those_that_may_be_removed(most, counted):
    display = ProgressDisplay(Console(file=io.StringIO()))
    entropies = {"a": 0.1, "b": 0.2, "c": 0.3}
    display.finish_step([Step((), entropies, 0.5), Step(("a",), {"b": 0.2, "c": 0.3}, 0.4)], most)
    (line,) = shown(display)
    assert line.split()[-3:] == ["0:00:00", "validation", "40.00%"]
    assert line.split()[-4] == counted
    assert display._console.file.getvalue() == "step 1: a, validation 40.00%\n"


def test_losses_of_epochs_are_shown_with_the_elapsed_time(display):
    values = display.track([0.5, 0.25], 2, "fine-tune")
    next(values), next(values)
    assert shown(display)[1].split()[-4:] == ["2/2", "0:00:00", "loss", "0.250"]


def test_file_gets_a_line_from_time_to_time(monkeypatch):
    clock = iter(range(0, 1_000_000, 25))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    file, total = io.StringIO(), 8
    display = ProgressDisplay(Console(file=file))
    for _ in display.track([Progress(done, total) for done in range(1, total + 1)], total, "fine-tune"):
        pass
    lines = file.getvalue().splitlines()
    assert 1 < len(lines) < total
    assert lines[-1].startswith("fine-tune: 88%, 0.0 images/s, 0:00:")


def test_terminal_gets_no_lines_beside_the_bars(display):
    terminal = ProgressDisplay(Console(file=io.StringIO(), force_terminal=True))
    list(terminal.track([0.5, 0.25], 2, "fine-tune"))
    assert terminal._console.file.getvalue() == ""
