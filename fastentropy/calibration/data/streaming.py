"""Data sets of the `datasets` library, streamed: a chunk is a shard of one that has many, or else a run of rows.

A rank that reads a shard reads nothing else. Runs of rows let any number of ranks share a single file, of which there is no
index, so that each of them reads the rows of the others and passes over them.
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

#: From so many shards on, a shard is a chunk; with fewer, too many ranks would have nothing to do.
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
        """How many."""
        return int(self.stream.num_shards)

    def size_of(self, chunk: int) -> int:
        """Unknown, which is 0."""
        return 0

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """The documents of a shard."""
        shard = self.stream.shard(num_shards=self.chunks, index=chunk)
        cells = enumerate(_cells(shard, self.name, self.column))
        return documents_of(cells, f"{self.name}, shard {chunk}", self.column, self.kind, problems)


@dataclass(frozen=True)
class Rows:
    """A data set of a few shards in runs of rows; only reading tells how many."""

    name: str
    column: str
    kind: str
    cursor: Cursor[None, Any] = field(repr=False)

    @property
    def chunks(self) -> None:
        """Unknown."""
        return

    def size_of(self, chunk: int) -> int:
        """Unknown, which is 0."""
        return 0

    def read(self, chunk: int, problems: Problems) -> Iterator[Document] | None:
        """The documents of a run of rows, or None where the data set ends before it."""
        start = chunk * ROWS_PER_CHUNK
        rows = self.cursor.rows(None, start, start + ROWS_PER_CHUNK)
        first = next(rows, None)
        if first is None:
            return None
        return documents_of(itertools.chain([first], rows), self.name, self.column, self.kind, problems)


def is_dataset_name(source: str) -> bool:
    """Whether a text is a name as `datasets` knows them: name or org/name, then :config, and then :split."""
    return _NAME.fullmatch(source) is not None


def open_stream(source: str, column: str | None) -> Shards | Rows:
    """Open the data set of that name; its split is train where none is named. Nothing is downloaded but what is read.

    Raises ValueError where `datasets` is missing, where it cannot open the data set, and where that holds no documents.
    """
    library = require("datasets", f"the data set {source}")
    parts = _NAME.fullmatch(source)
    assert parts is not None
    try:
        stream = library.load_dataset(parts["path"], parts["config"] or None, split=parts["split"] or "train", streaming=True)
        stream = _with_many_shards(stream.decode(False))  # images stay bytes
        names = stream.column_names or list(next(iter(stream), {}))
    except Exception as error:  # of the HTTP client, of the formats of files, and so on
        raise ValueError(f"{source} is no path, and no data set that can be opened: {one_line(error)}") from error
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
    """The row groups of parquet files as shards, where there are few files: finding them reads the end of each."""
    return stream if stream.num_shards >= MANY_SHARDS else stream.reshard()


def _kind(cells: Iterable[Any], source: str, column: str) -> str:
    """text or images, as the first of the cells is that is either."""
    for value in cells:
        if isinstance(value, str):
            return "text"
        if isinstance(value, dict | bytes):
            return "images"
    raise ValueError(f"{source} holds neither text nor images under {column!r}; name another column with --column")


def _cells(stream: Iterable[Any], name: str, column: str) -> Generator[Any, None, None]:
    """The cells of a column. Raises OSError, whatever went wrong, where the stream breaks: what follows would be lost."""
    try:
        for row in stream:
            yield row[column]
    except Exception as error:
        raise OSError(f"{name} cannot be read on: {one_line(error)}") from error
