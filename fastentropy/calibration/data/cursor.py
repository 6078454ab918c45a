"""Rows that can only be read forwards, read from anywhere."""

from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Cursor(Generic[S, T]):
    """Reads ranges of rows of sources of one kind: on from where the last range ended if it can, and else from anew.

    So ranges in ascending order cost one pass over a source. Only the last source stays open.
    """

    def __init__(self, open_source: Callable[[S, int], Generator[T, None, None]]) -> None:
        """open_source(source, row) gives the rows of a source from that row on."""
        self._open_source = open_source
        self._rows: Generator[T, None, None] | None = None
        self._source: S | None = None
        self._next = 0

    def rows(self, source: S, start: int, stop: int) -> Iterator[tuple[int, T]]:
        """The rows from `start` to before `stop`, or to the end, with their numbers."""
        for wanted in range(start, stop):
            found = self._advance(source, wanted)
            if found is None:
                return
            yield wanted, found[0]

    def _advance(self, source: S, wanted: int) -> tuple[T] | None:
        """One row; where another reader moved the cursor since the last one, it is found again."""
        if self._rows is None or self._source != source or self._next > wanted:
            self.close()
            self._rows, self._source, self._next = self._open_source(source, wanted), source, wanted
        try:
            for row in self._rows:
                self._next += 1
                if self._next > wanted:
                    return (row,)
        except BaseException:
            self._rows = None  # a generator that raised says afterwards that it ended
            raise
        return None

    def close(self) -> None:
        """Close the source that is open."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None
