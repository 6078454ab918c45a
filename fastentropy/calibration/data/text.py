"""Text and JSON lines, read by ranges of bytes: a line is in the chunk in which its first byte lies."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fastentropy.calibration.data.columns import text_of
from fastentropy.calibration.data.documents import MAX_TEXT, Document, DocumentError, Place, Problems

#: Bytes in a chunk: some 60 thousand tokens, so that several batches share the loss of a last one that is not full, while
#: a corpus of some megabytes still has a chunk for each of some GPUs.
TEXT_CHUNK = 256 << 10

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """A file of `size` bytes with a document in each line; `parse` makes its text of the line."""

    path: str
    size: int
    parse: Callable[[str], str]
    chunk_size: int = TEXT_CHUNK
    kind = "text"

    @property
    def chunks(self) -> int:
        """How many."""
        return -(-self.size // self.chunk_size)

    def size_of(self, chunk: int) -> int:
        """The size of a chunk in bytes."""
        return min(self.chunk_size, self.size - chunk * self.chunk_size)

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """The documents of a chunk; lines that are blank are none."""
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
        """The text of a line, or an empty one."""
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
    r"""The lines whose first byte lies from `start` to before `stop`, each with that byte's position and its \n.

    Of a line that is longer than `limit` bytes, only a part is read that is longer, too. Bytes behind `stop` are read only for
    the line that reaches there, and bytes before `start` not at all but for one.
    """
    position = start
    if start:  # the byte before tells whether a line begins here
        file.seek(start - 1)
        position += len(file.readline(stop - start + 1)) - 1
    while position < stop and (line := file.readline(limit + 2)):
        yield position, line
        position += len(line)
        if not line.endswith(b"\n"):
            position += len(file.readline(max(stop - position, 0)))


def parse_line(line: str) -> str:
    """The document in a line of a text file: the line."""
    return line


def parse_json(line: str, column: str) -> str:
    """The text under the key `column` of a line that is a JSON object. Raises DocumentError where there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DocumentError("a line is not JSON") from error
    if not isinstance(row, dict):
        raise DocumentError("a line is not a JSON object")
    return text_of(row.get(column), column)
