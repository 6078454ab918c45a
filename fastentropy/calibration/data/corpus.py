"""A corpus: the data that the user named, in chunks that any number of ranks read without overlap, starting at any chunk.

Rank r reads the chunks r, r + world size, r + 2 × world size and so on. The chunks depend on the files alone, so that a run can
be continued with another number of ranks, and any number gives the same batches.
"""

import bisect
import functools
import glob
import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastentropy.calibration.data.columns import TEXT_COLUMN
from fastentropy.calibration.data.cursor import Cursor
from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Chunk, Part, Place, Problems
from fastentropy.calibration.data.images import ImageFiles
from fastentropy.calibration.data.parquet import ParquetFile, RowGroup, open_parquet, row_group_cursor
from fastentropy.calibration.data.streaming import is_dataset_name, open_stream
from fastentropy.calibration.data.text import TEXT_CHUNK, TextFile, parse_json, parse_line

#: The suffix of a file's name -> how the file is read.
FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md"), "lines"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json-lines"), "json"),
    ".parquet": "parquet",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image"),
}

FilePart = TextFile | ParquetFile | ImageFiles


@dataclass(frozen=True)
class Corpus:
    """Texts or images in numbered chunks.

    Attributes:
        source: what the user named.
        kind: "text" or "images".
        size: bytes of all files, or None if it is unknown.
        fingerprint: 16 hexadecimal digits, which differ for other files, sizes or columns.
        parts: the files, or the stream, in order.
        problems: of files that are left out. They are the same on every rank, so only one rank may report them.
    """

    source: str
    kind: str
    size: int | None
    fingerprint: str
    parts: tuple[Part, ...]
    problems: Problems

    @property
    def chunks(self) -> int | None:
        """The number of chunks, or None if only reading to the end shows it."""
        return None if self._ends is None else self._ends[-1]

    def read(self, first: int = 0, step: int = 1) -> Iterator[Chunk]:
        """Yield the chunks first, first + step, first + 2 × step and so on, to the end; earlier chunks are not read.

        Documents are read while they are iterated.

        Raises:
            OSError: a streamed data set breaks off.
        """
        for number in itertools.count(first, step):
            located = self._locate(number)
            if located is None:
                return
            part, chunk = located
            problems = Problems()
            documents = part.read(chunk, problems)
            if documents is None:
                return
            yield Chunk(number, part.size_of(chunk), documents, problems)

    def _locate(self, number: int) -> tuple[Part, int] | None:
        """Return the part that holds a chunk, and the number of the chunk in the part."""
        if self._ends is None:
            return self.parts[0], number
        if number >= self._ends[-1]:
            return None
        index = bisect.bisect_right(self._ends, number) - 1
        return self.parts[index], number - self._ends[index]

    @functools.cached_property
    def _ends(self) -> list[int] | None:
        """How many chunks precede each part, and the number of all chunks; None if it is unknown."""
        counts = [part.chunks for part in self.parts]
        known = [count for count in counts if count is not None]
        return list(itertools.accumulate(known, initial=0)) if len(known) == len(counts) else None


def open_corpus(source: str, *, column: str | None = None) -> Corpus:
    """Open a corpus. Files that cannot be used become problems of the corpus.

    Args:
        source: a file; a folder, which stands for all files in and below it of the kinds in FORMATS, without names that begin
            with a dot; a glob pattern; or the name of a data set (org/name, org/name:config or org/name:config:split), which
            the `datasets` library streams.
        column: the key of JSON lines (`text` by default), or the column of tables (by default the first of `text`, `image` and
            `img`), that holds the documents.

    Raises:
        ValueError: nothing can be used, or texts and images are mixed.
    """
    problems = Problems()
    paths = _find(source, problems)
    if paths is not None:
        return _open_files(source, paths, column, problems)
    if not is_dataset_name(source) or _format(source) is not None:
        raise ValueError(f"{source} does not exist; expected a file, a folder, a glob pattern or the name of a data set")
    stream = open_stream(source, column)
    fingerprint = _digest([source, stream.column, stream.chunks, ROWS_PER_CHUNK])
    return Corpus(source, stream.kind, None, fingerprint, (stream,), problems)


def _find(source: str, problems: Problems) -> list[str] | None:
    """Return the sorted paths that a source stands for, or None if it is neither a path nor a pattern."""
    if os.path.isdir(source):
        return sorted(_files_below(source, problems))
    if os.path.exists(source):
        if _format(source) is None:
            raise ValueError(f"{source} is not of a kind that can be read; expected {', '.join(FORMATS)}")
        return [source]
    if not glob.has_magic(source):
        return None
    matches = glob.glob(source, recursive=True)
    found = itertools.chain.from_iterable(
        _files_below(match, problems) if os.path.isdir(match) else [match] for match in matches
    )
    return sorted({path for path in found if _format(path) is not None})


def _files_below(folder: str, problems: Problems) -> Iterator[str]:
    """Yield the files of known kinds in and below a folder. Links to files, as in the Hub's cache, are followed; others not."""

    def note(error: OSError) -> None:
        problems.add(Place(str(error.filename), "byte", 0), f"cannot be read: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _format(name) is not None:
                yield os.path.join(root, name)


def _open_files(source: str, paths: Sequence[str], column: str | None, problems: Problems) -> Corpus:
    """Open the files of a corpus, and add what is wrong with any of them to `problems`."""
    files = list(_usable(paths, problems))
    parts = list(_parts(files, column, problems))
    if not parts:
        reason = next((f"{problem.path} {problem.what}" for problem in problems), f"expected {', '.join(FORMATS)}")
        raise ValueError(f"{source} holds no file that can be used; {reason}")
    kind = _common_kind(source, parts)
    size = sum(part.size for part in parts)
    return Corpus(source, kind, size, _fingerprint(files, column), tuple(parts), problems)


def _usable(paths: Iterable[str], problems: Problems) -> Iterator[tuple[str, int]]:
    """Yield the files that are not empty and may be read, with their sizes in bytes."""
    for path in paths:
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
                problem = "is not a file"
            elif not os.access(path, os.R_OK):
                problem = "cannot be read: Permission denied"
            else:
                problem = "" if status.st_size else "is empty"
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
        if problem:
            problems.add(Place(path, "byte", 0), problem)
        else:
            yield path, status.st_size


def _parts(files: Iterable[tuple[str, int]], column: str | None, problems: Problems) -> Iterator[FilePart]:
    """Yield the parts of a corpus, in the order of its files. Consecutive image files form one part."""
    cursor = row_group_cursor()
    for are_images, group in itertools.groupby(files, key=lambda file: _format(file[0]) == "image"):
        if are_images:
            yield ImageFiles(tuple(group))
            continue
        for path, size in group:
            try:
                yield _open_file(path, size, column, cursor)
            except ValueError as error:
                problems.add(Place(path, "byte", 0), str(error))


def _open_file(path: str, size: int, column: str | None, cursor: Cursor[RowGroup, Any]) -> TextFile | ParquetFile:
    match _format(path):
        case "parquet":
            return open_parquet(path, size, column, cursor)
        case "json":
            return TextFile(path, size, functools.partial(parse_json, column=column or TEXT_COLUMN))
        case _:
            return TextFile(path, size, parse_line)


def _common_kind(source: str, parts: Iterable[FilePart]) -> str:
    """Return "text" or "images"; raise ValueError if there are both."""
    examples = {part.kind: part.path for part in parts}
    if len(examples) > 1:
        raise ValueError(
            f"{source} holds text ({examples['text']}) and images ({examples['images']}); expected only one kind: name a "
            f"pattern, such as {os.path.join(source, '**', '*.parquet')!r}"
        )
    return next(iter(examples))


def _fingerprint(files: Sequence[tuple[str, int]], column: str | None) -> str:
    """Return a digest of all that determines the chunks, with names relative to the common folder of all files."""
    folder = os.path.commonpath([os.path.dirname(path) for path, _ in files])
    names = [[os.path.relpath(path, folder or os.curdir), size] for path, size in files]
    return _digest([names, column, TEXT_CHUNK, ROWS_PER_CHUNK])


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _format(path: str) -> str | None:
    return FORMATS.get(os.path.splitext(path)[1].lower())
