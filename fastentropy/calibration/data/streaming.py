"""Streamed data sets of the `datasets` library: a chunk is a shard if there are many, and otherwise a range of rows.

A rank reads only its own shards. Ranges of rows let any number of ranks share a single file; since it has no index, each rank
also reads the rows of the others, and skips them.
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

#: With at least this many shards, a shard is a chunk; with fewer, too many ranks would have nothing to do.
MANY_SHARDS = 64

_NAME = re.compile(r"(?P<path>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]*))?(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Shards:
    """A data set of many shards, each of which is a chunk."""

    name: str
    column: str
    kind: str
    stream: Any = field(repr=False)

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return int(self.stream.num_shards)

    def size_of(self, chunk: int) -> int:
        """Return 0: the size is unknown."""
        return 0

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the documents of a shard."""
        shard = self.stream.shard(num_shards=self.chunks, index=chunk)
        cells = enumerate(_cells(shard, self.name, self.column))
        return documents_of(cells, f"{self.name}, shard {chunk}", self.column, self.kind, problems)


@dataclass(frozen=True)
class Rows:
    """A data set of few shards, of which a range of rows is a chunk."""

    name: str
    column: str
    kind: str
    cursor: Cursor[None, Any] = field(repr=False)

    @property
    def chunks(self) -> None:
        """None: only reading to the end shows how many there are."""
        return

    def size_of(self, chunk: int) -> int:
        """Return 0: the size is unknown."""
        return 0

    def read(self, chunk: int, problems: Problems) -> Iterator[Document] | None:
        """Return the documents of a range of rows, or None if the data set ends before it."""
        start = chunk * ROWS_PER_CHUNK
        rows = self.cursor.rows(None, start, start + ROWS_PER_CHUNK)
        first = next(rows, None)
        if first is None:
            return None
        return documents_of(itertools.chain([first], rows), self.name, self.column, self.kind, problems)


def is_dataset_name(source: str) -> bool:
    """Return whether a string is a name for `datasets`: name or org/name, optionally followed by :config and :split."""
    return _NAME.fullmatch(source) is not None


def open_stream(source: str, column: str | None) -> Shards | Rows:
    """Open the data set of that name. The default split is train. Only the rows that are read are downloaded.

    Raises:
        ValueError: `datasets` is not installed, cannot open the data set, or the data set holds no documents.
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
        return _cells(stream.skip(start), source, name)

    return Rows(source, name, kind, Cursor(open_rows))


def _with_many_shards(stream: Any) -> Any:
    """Make the row groups of parquet files shards if there are few files, whose footers are read for that."""
    return stream if stream.num_shards >= MANY_SHARDS else stream.reshard()


def _kind(cells: Iterable[Any], source: str, column: str) -> str:
    """Return "text" or "images", by the first cell that is either."""
    for value in cells:
        if isinstance(value, str):
            return "text"
        if isinstance(value, dict | bytes):
            return "images"
    raise ValueError(f"{source} holds neither text nor images under {column!r}; name another column with --column")


def _cells(stream: Iterable[Any], name: str, column: str) -> Generator[Any, None, None]:
    """Yield the cells of a column. If the stream breaks for any reason, raise OSError: the rest would be lost."""
    try:
        for row in stream:
            yield row[column]
    except Exception as error:
        raise OSError(f"{name} cannot be read any further: {one_line(error)}") from error
