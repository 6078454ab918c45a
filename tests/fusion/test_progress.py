"""The progress of a fusion: nothing unless in a terminal, and one line there, which disappears."""

import io

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.fusion.progress import ignore, shown


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def screen(text):
    """Return each state of a line that a terminal shows."""
    line, states = "", []
    for part in text.split("\r"):
        line = part + line[len(part) :]
        states.append(line)
    return states


@pytest.mark.parametrize(
    ("progress", "stream", "is_shown"),
    [(None, Terminal, True), (None, io.StringIO, False), (True, io.StringIO, True), (False, Terminal, False)],
)
def test_terminals_show_progress_by_default(progress, stream, is_shown):
    written = stream()
    with shown(progress, written) as show:
        show("plan", 3, 12)
    assert bool(written.getvalue()) == is_shown
    assert (show is ignore) != is_shown


def test_line_says_how_far_it_is_and_disappears():
    stream = Terminal()
    with pytest.raises(ZeroDivisionError), shown(None, stream) as show:  # noqa: PT012
        show("plan chains", 5, 20)
        show("time", 0, 0)
        show("all", 1 / 0, 1)
    states = screen(stream.getvalue())
    assert any("plan chains" in state and "5/20" in state for state in states)
    assert any(state.rstrip() == "fuse: time" for state in states)
    assert not states[-1].strip()


def test_closed_stream_does_not_matter():
    stream = Terminal()
    with shown(True, stream) as show:
        stream.close()
        show("plan", 1, 2)


@pytest.mark.parametrize("progress", [True, None])
def test_fuse_reports_every_chain(progress, capsys):
    layers = [layer for _ in range(3) for layer in (nn.Linear(4, 16), nn.Linear(16, 4), nn.Tanh())]
    fe.fuse(nn.Sequential(*layers).eval(), (torch.randn(2, 4),), measure=False, progress=progress)
    captured = capsys.readouterr()
    assert not captured.out
    for planned in range(4):
        assert (f"{planned}/3" in captured.err) == (progress is True)
