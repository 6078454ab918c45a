"""Read parquet files. A chunk, the unit of work of a rank, is a range of rows within one row group.

Only the column that holds the documents is read.
"""

import bisect
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from fastentropy._utils.errors import one_line
from fastentropy._utils.optional import require
from fastentropy.calibration.data.columns import choose_column, documents_of
from fastentropy.calibration.data.cursor import Cursor
from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Document, Place, Problems

#: How many rows are decoded at a time. Only these are in memory, because a row group may have a million rows.
ROWS_DECODED = 64
#: How many bytes of a file are read at a time. Without a buffer, pyarrow would read the whole column of a row group.
BUFFER = 1 << 20


class RowGroup(NamedTuple):
    """The column to read in a row group of a file.

    Attributes:
        path: the path of the file.
        number: the number of the row group in the file, from 0.
        column: the name of the column.
        inner: the field that holds the images if the column is a struct, otherwise None.
    """

    path: str
    number: int
    column: str
    inner: str | None


@dataclass(frozen=True)
class ParquetFile:
    """A parquet file as a part of a corpus.

    Attributes:
        path: the path of the file.
        size: the size of the file in bytes.
        kind: the kind of the documents, "text" or "images".
        column: the name of the column that holds them.
        inner: the field that holds the images if the column is a struct, otherwise None.
        rows: the number of rows in each row group.
        cursor: reads rows of row groups. All parquet files of a corpus share it.
    """

    path: str
    size: int
    kind: str
    column: str
    inner: str | None
    rows: tuple[int, ...]
    cursor: Cursor[RowGroup, Any] = field(repr=False)

    @property
    def chunks(self) -> int:
        """The number of chunks into which the file is divided."""
        return self._ends[-1]

    def size_of(self, chunk: int) -> int:
        """Return the size of a chunk in bytes, estimated from its share of the rows. `chunk` is its number, from 0.

        The sizes are rounded in such a way that their sum is the size of the file.
        """
        total = sum(self.rows)
        before, rows = self._rows_of(chunk)[1:]
        first, last = before + rows.start, before + rows.stop
        return self.size * last // total - self.size * first // total

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the documents of a chunk.

        Args:
            chunk: the number of the chunk, from 0.
            problems: receives the problems of documents and rows that cannot be read.
        """
        group, before, rows = self._rows_of(chunk)
        yield from documents_of(self._cells(group, before, rows, problems), self.path, self.column, self.kind, problems)

    def _cells(self, group: int, before: int, rows: range, problems: Problems) -> Iterator[tuple[int, Any]]:
        """Yield cells of the column, each as its row number in the file and its value as a Python object.

        Args:
            group: the number of the row group.
            before: how many rows of the file precede the row group.
            rows: the numbers of the rows within the row group.
            problems: receives the problems of cells that cannot be read.
        """
        arrow = require("pyarrow", "reading parquet")
        wanted = rows.start
        try:
            source = RowGroup(self.path, group, self.column, self.inner)
            for row, cell in self.cursor.rows(source, rows.start, rows.stop):
                wanted = row + 1
                try:
                    value = cell.as_py()
                except UnicodeDecodeError:
                    problems.add(Place(self.path, "row", before + row), "a text is not UTF-8")
                else:
                    yield before + row, value
        except (arrow.ArrowException, OSError) as error:
            problems.add(Place(self.path, "row", before + wanted), f"cannot be read: {one_line(error)}", rows.stop - wanted)

    def _rows_of(self, chunk: int) -> tuple[int, int, range]:
        """Locate a chunk.

        Returns:
            The number of its row group, how many rows of the file precede this row group, and the numbers of the chunk's rows
            within the row group.
        """
        group = bisect.bisect_right(self._ends, chunk) - 1
        start = (chunk - self._ends[group]) * ROWS_PER_CHUNK
        return group, sum(self.rows[:group]), range(start, min(start + ROWS_PER_CHUNK, self.rows[group]))

    @cached_property
    def _ends(self) -> list[int]:
        """For each row group, the number of chunks before it; then the number of all chunks."""
        return list(itertools.accumulate((-(-rows // ROWS_PER_CHUNK) for rows in self.rows), initial=0))


def open_parquet(path: str, size: int, column: str | None, cursor: Cursor[RowGroup, Any]) -> ParquetFile:
    """Open a parquet file. Only its metadata is read.

    Args:
        path: the path of the file.
        size: its size in bytes.
        column: the column that holds the documents, or None for the default of `choose_column`.
        cursor: reads the rows, from `row_group_cursor`.

    Returns:
        The file as a part of a corpus.

    Raises:
        ValueError: the file cannot be used. The message has no subject; the caller puts the path before it.
    """
    arrow, parquet = require("pyarrow", "reading parquet"), require("pyarrow.parquet", "reading parquet")
    try:
        with parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
            rows = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot be read as parquet: {one_line(error)}") from error
    if not any(rows):
        raise ValueError("is empty")
    name = choose_column(schema.names, column)
    kind, inner = _kind(arrow.types, schema.field(name))
    return ParquetFile(path, size, kind, name, inner, rows, cursor)


def row_group_cursor() -> Cursor[RowGroup, Any]:
    """Return a cursor that reads the row groups of any number of files. Only one file is open at a time."""
    return Cursor(_open_row_group)


def _open_row_group(source: RowGroup, start: int) -> Generator[Any, None, None]:
    """Yield the cells of a column in a row group as pyarrow scalars. Earlier rows are decoded too, but not yielded.

    Args:
        source: the column and the row group.
        start: the number of the first row to yield, within the row group.
    """
    parquet = require("pyarrow.parquet", "reading parquet")
    leaf = source.column if source.inner is None else f"{source.column}.{source.inner}"
    with parquet.ParquetFile(source.path, buffer_size=BUFFER) as file:
        for batch in file.iter_batches(ROWS_DECODED, row_groups=[source.number], columns=[leaf]):
            yield from batch.column(source.column)[start:]
            start = max(start - len(batch), 0)


def _kind(types: Any, column: Any) -> tuple[str, str | None]:
    """Find out what a column holds.

    Args:
        types: the module `pyarrow.types`.
        column: the pyarrow field of the column.

    Returns:
        "text" or "images", and the field that holds the images if the column is a struct, otherwise None.

    Raises:
        ValueError: the column holds neither texts nor images. The message has no subject; the path is put before it.
    """
    inner = "bytes" if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0 else None
    cells = column.type if inner is None else column.type.field(inner).type
    cells = cells.value_type if types.is_dictionary(cells) else cells
    if inner is None and (types.is_string(cells) or types.is_large_string(cells) or types.is_string_view(cells)):
        return "text", None
    if types.is_binary(cells) or types.is_large_binary(cells) or types.is_binary_view(cells):
        return "images", inner
    raise ValueError(f"has a column {column.name} of type {column.type}; expected strings, or the bytes of images")
