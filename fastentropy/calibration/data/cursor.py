"""Read ranges of rows, in any order, from sources that can only be read forwards."""

from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Cursor(Generic[S, T]):
    """Reads ranges of rows: from where the last range ended if possible, and otherwise by opening the source again.

    Ranges in ascending order therefore cost one pass over a source. Only the last source stays open.
    """

    def __init__(self, open_source: Callable[[S, int], Generator[T, None, None]]) -> None:
        """Read with `open_source(source, row)`, which yields the rows of a source from that row on."""
        self._open_source = open_source
        self._rows: Generator[T, None, None] | None = None
        self._source: S | None = None
        self._next = 0

    def rows(self, source: S, start: int, stop: int) -> Iterator[tuple[int, T]]:
        """Yield the rows from `start` to `stop`, exclusive, or to the end of the source, with their numbers."""
        for wanted in range(start, stop):
            found = self._advance(source, wanted)
            if found is None:
                return
            yield wanted, found[0]

    def _advance(self, source: S, wanted: int) -> tuple[T] | None:
        """Return one row. If another reader has moved the cursor in between, find the row again."""
        if self._rows is None or self._source != source or self._next > wanted:
            self.close()
            self._rows, self._source, self._next = self._open_source(source, wanted), source, wanted
        try:
            for row in self._rows:
                self._next += 1
                if self._next > wanted:
                    return (row,)
        except BaseException:
            self._rows = None  # a generator that raised would afterwards look as if it had ended
            raise
        return None

    def close(self) -> None:
        """Close the open source."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None
