"""What reading a corpus gives: chunks of documents, and the problems that occurred."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

#: Rows of a table, or image files, per chunk: about as much work as a chunk of text, and enough chunks for many ranks.
ROWS_PER_CHUNK = 256
#: Longer texts, in bytes or characters, are skipped: they are probably broken files, and their tokens would fill memory.
MAX_TEXT = 16 << 20
#: How many problems are listed separately; problems of the same kind in further files are counted together.
MAX_PROBLEMS = 1000


class Place(NamedTuple):
    """A position in a file: the byte or the row of that number, from 0."""

    path: str
    unit: str
    position: int


class Document(NamedTuple):
    """A text or the bytes of an encoded image, and the place where it was found."""

    content: str | bytes
    place: Place


class Problem(NamedTuple):
    """What is wrong with a file or its documents, how many times, and the byte or row where it first occurred."""

    path: str
    what: str
    unit: str
    position: int
    times: int

    def __str__(self) -> str:
        """Return the problem in one line."""
        return f"{self.path}: {self.what} ({self.times} ×, first at {self.unit} {self.position})"


class Problems:
    """Problems by path and kind, which add up over chunks, ranks and restarts. Iterated in the order of their occurrence."""

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        """Begin with some problems, for example those read from a checkpoint."""
        self._problems: dict[tuple[str, str, str], Problem] = {}
        self.update(problems)

    def add(self, place: Place, what: str, times: int = 1) -> None:
        """Count a problem."""
        self.update([Problem(place.path, what, place.unit, place.position, times)])

    def update(self, problems: Iterable[Problem]) -> None:
        """Add problems. Those of one path and kind become one, at the smallest position."""
        for problem in problems:
            if problem[:3] not in self._problems and len(self._problems) >= MAX_PROBLEMS:
                problem = problem._replace(path="further files", position=0)
            known = self._problems.get(problem[:3], problem._replace(times=0))
            position, times = min(known.position, problem.position), known.times + problem.times
            self._problems[problem[:3]] = problem._replace(position=position, times=times)

    def __iter__(self) -> Iterator[Problem]:
        """Iterate over the problems, one for each path and kind."""
        return iter(self._problems.values())

    def __len__(self) -> int:
        """Return the number of paths and kinds."""
        return len(self._problems)


class Chunk(NamedTuple):
    """A piece of a corpus: what one rank reads at a time.

    Attributes:
        number: the number of the chunk, from 0.
        size: its size in bytes of the files; 0 if it is unknown.
        documents: its documents, which can be iterated once.
        problems: its problems, complete once the documents are exhausted.
    """

    number: int
    size: int
    documents: Iterator[Document]
    problems: Problems


class Part(Protocol):
    """A file, or another source that is divided into chunks."""

    @property
    def chunks(self) -> int | None:
        """The number of chunks, or None if only reading to the end shows it."""

    def size_of(self, chunk: int) -> int:
        """Return the size of a chunk in bytes of the file."""

    def read(self, chunk: int, problems: Problems) -> Iterator[Document] | None:
        """Read the documents of a chunk, and add problems to `problems`; return None if there is no such chunk."""


class DocumentError(ValueError):
    """A document that cannot be used; the message is the problem."""
