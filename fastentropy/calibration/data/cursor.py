"""Read ranges of rows in any order from sources, such as parquet files or streams, that can only be read forwards."""

from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")


class Cursor(Generic[S, T]):
    """Reads ranges of rows from sources that can only be read forwards.

    If a range begins after the last row that was read from the same source, reading continues from there. Otherwise the source
    is opened again. Ranges in ascending order therefore cost a single pass over a source. Only one source is open at a time.

    The type `S` identifies a source, and `T` is the type of a row.
    """

    def __init__(self, open_source: Callable[[S, int], Generator[T, None, None]]) -> None:
        """Prepare to read; nothing is opened yet.

        Args:
            open_source: a function `open_source(source, row)` that opens a source and yields its rows from the number `row` on,
                counted from 0.
        """
        self._open_source = open_source
        self._rows: Generator[T, None, None] | None = None
        self._source: S | None = None
        self._next = 0

    def rows(self, source: S, start: int, stop: int) -> Iterator[tuple[int, T]]:
        """Yield rows of a source, each as its number and the row.

        Args:
            source: the source.
            start: the number of the first row, counted from 0.
            stop: the number after that of the last row. If the source has fewer rows, its last row is the last one.
        """
        for wanted in range(start, stop):
            found = self._advance(source, wanted)
            if found is None:
                return
            yield wanted, found[0]

    def _advance(self, source: S, wanted: int) -> tuple[T] | None:
        """Return the row with the number `wanted`, in a tuple of one; None if the source has fewer rows.

        Callers may take turns with different ranges. If the row cannot be reached by reading on, the source is opened again.
        """
        if self._rows is None or self._source != source or self._next > wanted:
            self.close()
            self._rows, self._source, self._next = self._open_source(source, wanted), source, wanted
        try:
            for row in self._rows:
                self._next += 1
                if self._next > wanted:
                    return (row,)
        except BaseException:
            self._rows = None  # a generator that has raised yields nothing more, as if the source had ended
            raise
        return None

    def close(self) -> None:
        """Close the source that is open, if any."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None
