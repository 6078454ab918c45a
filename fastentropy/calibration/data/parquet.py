"""Parquet files: a chunk is a range of rows within a row group, of which only one column is read."""

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

#: Rows decoded at a time. Only these are in memory; a row group may have a million.
ROWS_DECODED = 64
#: Bytes of a file read at a time. Without a buffer, pyarrow reads the column of a whole row group.
BUFFER = 1 << 20


class RowGroup(NamedTuple):
    """A column in a row group of a file. If the column is a struct, `inner` is the field with the images."""

    path: str
    number: int
    column: str
    inner: str | None


@dataclass(frozen=True)
class ParquetFile:
    """A file of `size` bytes whose row groups have `rows` rows; `kind` is "text" or "images"."""

    path: str
    size: int
    kind: str
    column: str
    inner: str | None
    rows: tuple[int, ...]
    cursor: Cursor[RowGroup, Any] = field(repr=False)

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return self._ends[-1]

    def size_of(self, chunk: int) -> int:
        """Return the size of a chunk in bytes: its share of the rows, rounded so that all chunks add up to the file."""
        total = sum(self.rows)
        before, rows = self._rows_of(chunk)[1:]
        first, last = before + rows.start, before + rows.stop
        return self.size * last // total - self.size * first // total

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the documents of a chunk."""
        group, before, rows = self._rows_of(chunk)
        yield from documents_of(self._cells(group, before, rows, problems), self.path, self.column, self.kind, problems)

    def _cells(self, group: int, before: int, rows: range, problems: Problems) -> Iterator[tuple[int, Any]]:
        """Yield the cells of rows of a row group, with their row numbers in the file; the group starts at row `before`."""
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
        """Return the row group of a chunk, how many rows of the file precede the group, and the rows within the group."""
        group = bisect.bisect_right(self._ends, chunk) - 1
        start = (chunk - self._ends[group]) * ROWS_PER_CHUNK
        return group, sum(self.rows[:group]), range(start, min(start + ROWS_PER_CHUNK, self.rows[group]))

    @cached_property
    def _ends(self) -> list[int]:
        """How many chunks precede each row group, and the number of all chunks."""
        return list(itertools.accumulate((-(-rows // ROWS_PER_CHUNK) for rows in self.rows), initial=0))


def open_parquet(path: str, size: int, column: str | None, cursor: Cursor[RowGroup, Any]) -> ParquetFile:
    """Open a file by its metadata.

    Raises:
        ValueError: the file cannot be used. The message is a phrase without the path.
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
    """Return a cursor for the row groups of any number of files; one file is open at a time."""
    return Cursor(_open_row_group)


def _open_row_group(source: RowGroup, start: int) -> Generator[Any, None, None]:
    """Yield the cells, as pyarrow scalars, from a row on. Earlier rows are decoded, but not converted."""
    parquet = require("pyarrow.parquet", "reading parquet")
    leaf = source.column if source.inner is None else f"{source.column}.{source.inner}"
    with parquet.ParquetFile(source.path, buffer_size=BUFFER) as file:
        for batch in file.iter_batches(ROWS_DECODED, row_groups=[source.number], columns=[leaf]):
            yield from batch.column(source.column)[start:]
            start = max(start - len(batch), 0)


def _kind(types: Any, column: Any) -> tuple[str, str | None]:
    """Return "text" or "images", and the field of a struct with the images; raise ValueError if the column is neither."""
    inner = "bytes" if types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0 else None
    cells = column.type if inner is None else column.type.field(inner).type
    cells = cells.value_type if types.is_dictionary(cells) else cells
    if inner is None and (types.is_string(cells) or types.is_large_string(cells) or types.is_string_view(cells)):
        return "text", None
    if types.is_binary(cells) or types.is_large_binary(cells) or types.is_binary_view(cells):
        return "images", inner
    raise ValueError(f"has a column {column.name} of type {column.type}; expected strings, or the bytes of images")
