"""Text and JSON lines, read by ranges of bytes: a line belongs to the chunk that contains its first byte."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fastentropy.calibration.data.columns import text_of
from fastentropy.calibration.data.documents import MAX_TEXT, Document, DocumentError, Place, Problems

#: Bytes per chunk: some 60 thousand tokens. A chunk has several batches, of which only the last is not full, and a corpus of a
#: few megabytes still has a chunk for each of several GPUs.
TEXT_CHUNK = 256 << 10

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """A file of `size` bytes with one document per line; `parse` turns a line into the text."""

    path: str
    size: int
    parse: Callable[[str], str]
    chunk_size: int = TEXT_CHUNK
    kind = "text"

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return -(-self.size // self.chunk_size)

    def size_of(self, chunk: int) -> int:
        """Return the size of a chunk in bytes."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the documents of a chunk, without blank lines."""
        start = chunk * self.chunk_size
        try:
            with open(self.path, "rb") as file:
                for position, line in lines(file, start, start + self.size_of(chunk), MAX_TEXT):
                    place = Place(self.path, "byte", position)
                    try:
                        text = self._text(line, position)
                    except DocumentError as error:
                        problems.add(place, str(error))
                    else:
                        if text:
                            yield Document(text, place)
        except OSError as error:
            problems.add(Place(self.path, "byte", start), f"cannot be read: {error.strerror}")

    def _text(self, line: bytes, position: int) -> str:
        """Return the text of a line, or an empty string if it is blank."""
        if position == 0:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > MAX_TEXT:
            raise DocumentError(f"a line is longer than {MAX_TEXT >> 20} MB")
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise DocumentError("a line is not UTF-8") from error
        return self.parse(text) if text.strip() else ""


def lines(file: BinaryIO, start: int, stop: int, limit: int) -> Iterator[tuple[int, bytes]]:
    r"""Yield the lines whose first byte lies between `start` and `stop`, exclusive, with the position of that byte.

    A line includes its \n. Of a line longer than `limit` bytes, only a prefix is read, which is longer than `limit` too. Bytes
    after `stop` are read only for a line that extends there; before `start`, only one byte is read.
    """
    position = start
    if start:  # the byte before shows whether a line begins here
        file.seek(start - 1)
        position += len(file.readline(stop - start + 1)) - 1
    while position < stop and (line := file.readline(limit + 2)):
        yield position, line
        position += len(line)
        if not line.endswith(b"\n"):
            position += len(file.readline(max(stop - position, 0)))


def parse_line(line: str) -> str:
    """Return a line of a text file, which is the document."""
    return line


def parse_json(line: str, column: str) -> str:
    """Return the text under the key `column` of a line that is a JSON object.

    Raises:
        DocumentError: the line is not a JSON object, or holds no text under that key.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError("a line is not JSON") from error
    if not isinstance(row, dict):
        raise DocumentError("a line is not a JSON object")
    return text_of(row.get(column), column)
