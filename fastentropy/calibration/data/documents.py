"""The types that reading a corpus returns: documents, the chunks into which a corpus is divided, and problems."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

#: The number of rows of a table, or of image files, in a chunk. Such a chunk is about as much work as one of a text file, and a
#: corpus has enough chunks for many ranks.
ROWS_PER_CHUNK = 256
#: The greatest length of a text: bytes of a line in a file, or characters of a cell in a table. Longer texts are skipped,
#: because they are probably damaged, and their tokens would fill memory.
MAX_TEXT = 16 << 20
#: How many problems are listed separately. After that, the problems of one kind in all further files are counted as one.
MAX_PROBLEMS = 1000


class Place(NamedTuple):
    """A position in a file.

    Attributes:
        path: the path of the file, or the name of a data set.
        unit: what `position` counts, "byte" or "row".
        position: the number of the byte or row, from 0.
    """

    path: str
    unit: str
    position: int


class Document(NamedTuple):
    """A text, or the content of an image file as bytes; and the place where the document was found."""

    content: str | bytes
    place: Place


class Problem(NamedTuple):
    """A problem with a file or with documents in it.

    Attributes:
        path: the path of the file, or the name of a data set.
        what: what is wrong, as a phrase.
        unit: what `position` counts, "byte" or "row".
        position: the number of the byte or row where the problem first occurred, from 0.
        times: how many times it occurred.
    """

    path: str
    what: str
    unit: str
    position: int
    times: int

    def __str__(self) -> str:
        """Return the problem in one line."""
        return f"{self.path}: {self.what} ({self.times} ×, first at {self.unit} {self.position})"


class Problems:
    """A collection of problems, with one entry for each file and kind of problem, in the order in which they first occurred.

    The collections of several chunks, ranks or parts of a run can be added up.
    """

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        """Create a collection that holds the given problems."""
        self._problems: dict[tuple[str, str, str], Problem] = {}
        self.update(problems)

    def add(self, place: Place, what: str, times: int = 1) -> None:
        """Add a problem that occurred `times` times at a place. `what` says what is wrong, as a phrase."""
        self.update([Problem(place.path, what, place.unit, place.position, times)])

    def update(self, problems: Iterable[Problem]) -> None:
        """Add problems. Problems with the same path, phrase and unit become one entry with the smallest of their positions."""
        for problem in problems:
            if problem[:3] not in self._problems and len(self._problems) >= MAX_PROBLEMS:
                problem = problem._replace(path="further files", position=0)
            known = self._problems.get(problem[:3], problem._replace(times=0))
            position, times = min(known.position, problem.position), known.times + problem.times
            self._problems[problem[:3]] = problem._replace(position=position, times=times)

    def __iter__(self) -> Iterator[Problem]:
        """Iterate over the entries."""
        return iter(self._problems.values())

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._problems)


class Chunk(NamedTuple):
    """A piece of a corpus. It is the unit of work that is given to a rank.

    Attributes:
        number: the number of the chunk in the corpus, from 0.
        size: how many bytes it takes up in the files of the corpus; 0 if that is unknown.
        documents: the documents of the chunk. They can be iterated over only once, and are read while this is done.
        problems: the problems of the chunk. They are complete after the iteration over the documents.
    """

    number: int
    size: int
    documents: Iterator[Document]
    problems: Problems


class Part(Protocol):
    """A part of a corpus that is divided into chunks: a file, a group of image files, or a streamed data set."""

    @property
    def chunks(self) -> int | None:
        """The number of chunks, or None if it is unknown until the part has been read to its end."""

    def size_of(self, chunk: int) -> int:
        """Return how many bytes a chunk takes up in the files; 0 if unknown. `chunk` is its number in the part, from 0."""

    def read(self, chunk: int, problems: Problems) -> Iterator[Document] | None:
        """Return an iterator that reads the documents of a chunk.

        Args:
            chunk: the number of the chunk within the part, from 0.
            problems: receives the problems that occur while the documents are read.

        Returns:
            The documents. None if `chunks` is None and the part ends before this chunk.
        """


class DocumentError(ValueError):
    """Raised for a document that cannot be used. The message is the phrase that says what is wrong."""
