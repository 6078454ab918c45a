"""Read files with one document per line, as plain text or as JSON.

A chunk, the unit of work of a rank, is a range of bytes. A line belongs to the chunk that contains its first byte.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fastentropy.calibration.data.columns import text_of
from fastentropy.calibration.data.documents import MAX_TEXT, Document, DocumentError, Place, Problems

#: The number of bytes in a chunk, which are some 60 thousand tokens. A chunk is large enough for several batches, because the
#: last batch of a chunk is not full. It is small enough that a corpus of a few megabytes has a chunk for each of several GPUs.
TEXT_CHUNK = 256 << 10

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """A file with one document per line, as a part of a corpus.

    Attributes:
        path: the path of the file.
        size: the size of the file in bytes.
        parse: a function that returns the text in a line. It may raise DocumentError.
        chunk_size: the number of bytes in a chunk.
        kind: "text", the kind of the documents.
    """

    path: str
    size: int
    parse: Callable[[str], str]
    chunk_size: int = TEXT_CHUNK
    kind = "text"

    @property
    def chunks(self) -> int:
        """The number of chunks into which the file is divided."""
        return -(-self.size // self.chunk_size)

    def size_of(self, chunk: int) -> int:
        """Return the size of a chunk in bytes. `chunk` is its number, from 0."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the documents of a chunk, without blank ones.

        Args:
            chunk: the number of the chunk, from 0.
            problems: receives the problems of lines that cannot be used.
        """
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
        """Return the text of a line, or an empty string if the line is blank.

        Args:
            line: the bytes of the line, with its line break.
            position: the position of its first byte in the file.

        Raises:
            DocumentError: the line is too long, is not UTF-8, or holds no text.
        """
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
    r"""Yield the lines of a file whose first byte lies in a range of positions.

    The bytes after `stop` are read only as far as a line extends there. Of the bytes before `start`, only one is read.

    Args:
        file: a file opened for reading bytes.
        start: the first position of the range.
        stop: the position after the last one of the range.
        limit: the greatest length of a line in bytes. Of a longer line, only the first `limit + 2` bytes are yielded, by which
            the caller can tell that it is too long.

    Returns:
        An iterator over the position of each line's first byte and the bytes of the line, including its \n.
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
    """Return a line of a plain text file unchanged, because the line itself is the document."""
    return line


def parse_json(line: str, column: str) -> str:
    """Return the text in a line that is a JSON object.

    Args:
        line: the line.
        column: the key of the object under which the text is.

    Returns:
        The text, or an empty string if there is only white space.

    Raises:
        DocumentError: the line is not a JSON object, or has no usable text under the key.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError("a line is not JSON") from error
    if not isinstance(row, dict):
        raise DocumentError("a line is not a JSON object")
    return text_of(row.get(column), column)
