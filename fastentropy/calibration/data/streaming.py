"""Stream data sets by the `datasets` library.

A chunk, the unit of work of a rank, is a shard of the data set if there are many shards, and otherwise a range of rows. If
chunks are shards, a rank reads only its own ones. If chunks are ranges of rows, any number of ranks can share a single file.
Each rank then also reads the rows of the other ranks, because the file has no index, and skips them.
"""

import itertools
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastentropy._utils.errors import one_line
from fastentropy._utils.optional import require
from fastentropy.calibration.data.columns import choose_column, documents_of
from fastentropy.calibration.data.cursor import Cursor
from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Document, Problems

#: If a data set has at least this many shards, a shard is a chunk. With fewer shards, many ranks would have nothing to do, so
#: a chunk is a range of rows.
MANY_SHARDS = 64

_NAME = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Shards:
    """A data set of many shards as the only part of a corpus. Each shard is a chunk.

    Attributes:
        name: the name of the data set, as the user gave it.
        column: the name of the column that holds the documents.
        kind: the kind of the documents, "text" or "images".
        stream: the data set, an `IterableDataset` of the `datasets` library.
    """

    name: str
    column: str
    kind: str
    stream: Any = field(repr=False)

    @property
    def chunks(self) -> int:
        """The number of chunks, which is the number of shards."""
        return int(self.stream.num_shards)

    def size_of(self, chunk: int) -> int:
        """Return 0, because the size is unknown."""
        return 0

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Return an iterator over the documents of a shard.

        Args:
            chunk: the number of the shard, from 0.
            problems: receives the problems of documents that cannot be used.
        """
        shard = self.stream.shard(num_shards=self.chunks, index=chunk)
        cells = enumerate(_cells(shard, self.name, self.column))
        return documents_of(cells, f"{self.name}, shard {chunk}", self.column, self.kind, problems)


@dataclass(frozen=True)
class Rows:
    """A data set of few shards as the only part of a corpus. A range of `ROWS_PER_CHUNK` rows is a chunk.

    Attributes:
        name: the name of the data set, as the user gave it.
        column: the name of the column that holds the documents.
        kind: the kind of the documents, "text" or "images".
        cursor: reads the rows of the data set. The source that it is given is always None, because there is only one.
    """

    name: str
    column: str
    kind: str
    cursor: Cursor[None, Any] = field(repr=False)

    @property
    def chunks(self) -> None:
        """None, because the number is unknown until the data set has been read to its end."""
        return

    def size_of(self, chunk: int) -> int:
        """Return 0, because the size is unknown."""
        return 0

    def read(self, chunk: int, problems: Problems) -> Iterator[Document] | None:
        """Return an iterator over the documents of a range of rows, or None if the data set ends before the range.

        Args:
            chunk: the number of the chunk, from 0.
            problems: receives the problems of documents that cannot be used.
        """
        start = chunk * ROWS_PER_CHUNK
        rows = self.cursor.rows(None, start, start + ROWS_PER_CHUNK)
        first = next(rows, None)
        if first is None:
            return None
        return documents_of(itertools.chain([first], rows), self.name, self.column, self.kind, problems)


def is_dataset_name(source: str) -> bool:
    """Return whether `source` looks like the name of a data set: name or org/name, optionally with :config or :config:split."""
    return _NAME.fullmatch(source) is not None


def open_stream(source: str, column: str | None) -> Shards | Rows:
    """Open a data set. Its rows are downloaded only as they are read.

    Args:
        source: the name of the data set: name or org/name, optionally followed by :config or :config:split. The default split
            is train.
        column: the column that holds the documents, or None for the default of `choose_column`.

    Returns:
        `Shards` if the data set has many shards, otherwise `Rows`.

    Raises:
        ValueError: `datasets` is not installed or cannot open the data set, or the data set holds neither texts nor images in
            that column.
    """
    library = require("datasets", f"the data set {source}")
    parts = _NAME.fullmatch(source)
    assert parts is not None
    try:
        stream = library.load_dataset(parts["path"], parts["config"] or None, split=parts["split"] or "train", streaming=True)
        stream = _with_many_shards(stream.decode(False))  # images stay bytes
        names = stream.column_names or list(next(iter(stream), {}))
    except Exception as error:  # of the HTTP client, of file formats, and so on
        raise ValueError(f"{source} is neither a path nor a data set that can be opened: {one_line(error)}") from error
    try:
        name = choose_column(names, column)
    except ValueError as error:
        raise ValueError(f"{source} {error}") from error
    stream = stream.select_columns([name])
    kind = _kind(itertools.islice(_cells(stream, source, name), ROWS_PER_CHUNK), source, name)
    if stream.num_shards >= MANY_SHARDS:
        return Shards(source, name, kind, stream)

    def open_rows(_: None, start: int) -> Generator[Any, None, None]:
        """Yield the cells of the data set from the row `start` on."""
        return _cells(stream.skip(start), source, name)

    return Rows(source, name, kind, Cursor(open_rows))


def _with_many_shards(stream: Any) -> Any:
    """If a data set has few shards, make each row group of its parquet files a shard. This reads the footers of all files."""
    return stream if stream.num_shards >= MANY_SHARDS else stream.reshard()


def _kind(cells: Iterable[Any], source: str, column: str) -> str:
    """Return "text" or "images", whichever the first cell with a known type holds.

    Args:
        cells: the values of the first cells of the column.
        source: the name of the data set, for the message.
        column: the name of the column, for the message.

    Raises:
        ValueError: no cell holds a text or an image.
    """
    for value in cells:
        if isinstance(value, str):
            return "text"
        if isinstance(value, dict | bytes):
            return "images"
    raise ValueError(f"{source} holds neither text nor images under {column!r}; name another column with --column")


def _cells(stream: Iterable[Any], name: str, column: str) -> Generator[Any, None, None]:
    """Yield the values of the cells of a column.

    Args:
        stream: yields the rows of the data set as dicts.
        name: the name of the data set, for the message.
        column: the name of the column.

    Raises:
        OSError: the stream raised any exception. The run must end then, because the remaining rows would be missing.
    """
    try:
        for row in stream:
            yield row[column]
    except Exception as error:
        raise OSError(f"{name} cannot be read any further: {one_line(error)}") from error
