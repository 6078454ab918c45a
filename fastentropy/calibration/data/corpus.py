"""Read a corpus: the texts or images that the user named.

A corpus is divided into numbered chunks, each of which can be read without the earlier ones. Rank r of a run reads the chunks
r, r + world size, r + 2 × world size and so on. The chunks depend on the files alone, so every number of ranks gives the same
batches, and a run can be continued with another number of ranks.
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

#: How a file is read, by the suffix of its name.
FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md"), "lines"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json-lines"), "json"),
    ".parquet": "parquet",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image"),
}

FilePart = TextFile | ParquetFile | ImageFiles


@dataclass(frozen=True)
class Corpus:
    """Texts or images, divided into numbered chunks.

    Attributes:
        source: what the user named: a path, a glob pattern or the name of a data set.
        kind: the kind of the documents, "text" or "images".
        size: the size of all files in bytes, or None if it is unknown.
        fingerprint: a hash of the names and sizes of all files, or of the name of the data set, and of the column, as 16
            hexadecimal digits. Runs over corpora with different fingerprints cannot continue each other.
        parts: what the corpus is read from, in order: files, groups of image files, or one stream.
        problems: the reasons why files are left out. They are the same on every rank, so only one rank may report them.
    """

    source: str
    kind: str
    size: int | None
    fingerprint: str
    parts: tuple[Part, ...]
    problems: Problems

    @property
    def chunks(self) -> int | None:
        """The number of chunks, or None if it is unknown until the corpus has been read to its end."""
        return None if self._ends is None else self._ends[-1]

    def read(self, first: int = 0, step: int = 1) -> Iterator[Chunk]:
        """Yield the chunks with the numbers first, first + step, first + 2 × step and so on, up to the end of the corpus.

        The documents of a chunk are read while the caller iterates over them.

        Args:
            first: the number of the first chunk to yield.
            step: the distance between the numbers of two chunks.

        Returns:
            An iterator over the chunks.

        Raises:
            OSError: a streamed data set cannot be read any further.
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
        """Return the part that holds a chunk, and the number of the chunk within the part; None if there is no such chunk."""
        if self._ends is None:
            return self.parts[0], number
        if number >= self._ends[-1]:
            return None
        index = bisect.bisect_right(self._ends, number) - 1
        return self.parts[index], number - self._ends[index]

    @functools.cached_property
    def _ends(self) -> list[int] | None:
        """For each part, the number of chunks before it; then the number of all chunks. None if any of these is unknown."""
        counts = [part.chunks for part in self.parts]
        known = [count for count in counts if count is not None]
        return list(itertools.accumulate(known, initial=0)) if len(known) == len(counts) else None


def open_corpus(source: str, *, column: str | None = None) -> Corpus:
    """Open a corpus. A file that cannot be used is left out, and the reason is added to the problems of the corpus.

    Args:
        source: one of four: a file; a folder, for all files of the kinds in `FORMATS` in and below it, except names that begin
            with a dot; a glob pattern; or the name of a data set (org/name, org/name:config or org/name:config:split), to
            stream it by the `datasets` library.
        column: the column of a table, or the key of a JSON line, that holds the document. With None, it is `text` for JSON
            lines, and the first of `text`, `image` and `img` that a table has.

    Returns:
        The corpus. `Corpus.read` reads its documents.

    Raises:
        ValueError: no file can be used, texts and images are mixed, or the data set cannot be opened.
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
    """Return the sorted paths of the files that a source stands for.

    The result is None if the source is neither an existing path nor a glob pattern. Folders that cannot be read are added to
    `problems`. If the source is a single file of an unknown kind, a ValueError is raised.
    """
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
    """Yield the paths of the files of known kinds in and below a folder. Add folders that cannot be read to `problems`.

    Symbolic links to files are followed, because the cache of the Hugging Face Hub consists of them. Links to folders are not.
    """

    def note(error: OSError) -> None:
        """Add a folder that cannot be read to the problems."""
        problems.add(Place(str(error.filename), "byte", 0), f"cannot be read: {error.strerror}")

    for root, folders, names in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _format(name) is not None:
                yield os.path.join(root, name)


def _open_files(source: str, paths: Sequence[str], column: str | None, problems: Problems) -> Corpus:
    """Open a corpus of files.

    Args:
        source: what the user named, for messages.
        paths: the paths of the files.
        column: the column or key of the documents, or None for the default.
        problems: receives the reason for each file that is left out.

    Raises:
        ValueError: no file can be used, or texts and images are mixed.
    """
    files = list(_usable(paths, problems))
    parts = list(_parts(files, column, problems))
    if not parts:
        reason = next((f"{problem.path} {problem.what}" for problem in problems), f"expected {', '.join(FORMATS)}")
        raise ValueError(f"{source} holds no file that can be used; {reason}")
    kind = _common_kind(source, parts)
    size = sum(part.size for part in parts)
    return Corpus(source, kind, size, _fingerprint(files, column), tuple(parts), problems)


def _usable(paths: Iterable[str], problems: Problems) -> Iterator[tuple[str, int]]:
    """Yield the path and the size in bytes of each file that is not empty and may be read. Add the others to `problems`."""
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
    """Yield the parts of a corpus in the order of its files. Consecutive image files form one part.

    Args:
        files: the path and the size in bytes of each file.
        column: the column or key of the documents, or None for the default.
        problems: receives the reason for each file that cannot be opened.
    """
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
    """Open a file of texts, or a parquet file. Raise ValueError if it cannot be used.

    Args:
        path: the path of the file.
        size: its size in bytes.
        column: the column or key of the documents, or None for the default.
        cursor: reads the rows of all parquet files.
    """
    match _format(path):
        case "parquet":
            return open_parquet(path, size, column, cursor)
        case "json":
            return TextFile(path, size, functools.partial(parse_json, column=column or TEXT_COLUMN))
        case _:
            return TextFile(path, size, parse_line)


def _common_kind(source: str, parts: Iterable[FilePart]) -> str:
    """Return the kind of all parts, "text" or "images". Raise ValueError if the parts have both kinds."""
    examples = {part.kind: part.path for part in parts}
    if len(examples) > 1:
        raise ValueError(
            f"{source} holds text ({examples['text']}) and images ({examples['images']}); expected only one kind: name a "
            f"pattern, such as {os.path.join(source, '**', '*.parquet')!r}"
        )
    return next(iter(examples))


def _fingerprint(files: Sequence[tuple[str, int]], column: str | None) -> str:
    """Return a hash of everything that determines the chunks.

    File names are taken relative to the common folder of all files, so the hash does not change if this folder is moved.
    """
    folder = os.path.commonpath([os.path.dirname(path) for path, _ in files])
    names = [[os.path.relpath(path, folder or os.curdir), size] for path, size in files]
    return _digest([names, column, TEXT_CHUNK, ROWS_PER_CHUNK])


def _digest(values: object) -> str:
    """Return a hash of values that JSON can represent, as 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _format(path: str) -> str | None:
    """Return how a file is read, a value of `FORMATS`, or None if the suffix of its name is unknown."""
    return FORMATS.get(os.path.splitext(path)[1].lower())
