"""Show how far a fusion, or a pruning, has come, as a line in a terminal."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TextIO, TypeAlias

#: Receives the name of a phase, the number of its steps that are done, and the number of all its steps (0 if it has none).
Progress: TypeAlias = Callable[[str, int, int], None]

#: The number of characters of a full bar.
_BAR = 16


def ignore(phase: str, done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def shown(progress: bool | None, stream: TextIO | None = None, *, command: str = "fuse") -> Iterator[Progress]:
    """Show the progress on one line while a `with` block runs. The line disappears afterwards.

    Args:
        progress: whether to show it; None shows it in a terminal only.
        stream: where to show it; the default is the standard error.
        command: what the line begins with.
    """
    stream = sys.stderr if stream is None else stream
    is_shown = progress if progress is not None else stream is not None and stream.isatty()
    if not is_shown or stream is None:
        yield ignore
        return
    line = _Line(stream, command)
    try:
        yield line.show
    finally:
        line.clear()


class _Line:
    """A line of a terminal that is written again and again."""

    def __init__(self, stream: TextIO, command: str) -> None:
        """Begin with an empty line. `command` is the start of all others."""
        self._stream, self._command = stream, command
        self._length = 0

    def show(self, phase: str, done: int, total: int) -> None:
        """Write the phase, with a bar and the numbers of its steps if it has any."""
        filled = _BAR * done // total if total else 0
        bar = f" {'█' * filled}{'░' * (_BAR - filled)} {done}/{total}" if total else ""
        text = f"{self._command}: {phase}{bar}"
        self._write(text[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Empty the line."""
        self._write("")

    def _write(self, text: str) -> None:
        """Write a text over the last one, and go back to its start, where what others print overwrites it."""
        with contextlib.suppress(OSError, ValueError):  # a closed stream must not end the work
            self._stream.write("\r" + text.ljust(self._length) + "\r")
            self._stream.flush()
        self._length = len(text)
