"""What a corpus is read as: chunks of documents, and the problems that were met on the way."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

#: Rows of a table, or image files, in a chunk: about as much work as a chunk of text, and enough chunks for many ranks.
ROWS_PER_CHUNK = 256
#: Longer texts, in bytes or characters, are skipped: one that long is rather a broken file, and its tokens would fill memory.
MAX_TEXT = 16 << 20
#: Paths with problems of one kind that are told apart; those of further paths are counted together.
MAX_PROBLEMS = 1000


class Place(NamedTuple):
    """Where in a file: at the byte, or in the row, of that number from 0."""

    path: str
    unit: str
    position: int


class Document(NamedTuple):
    """A text, or the bytes of an encoded image, and where it was found."""

    content: str | bytes
    place: Place


class Problem(NamedTuple):
    """What is wrong with a file or with documents in it: how often, and where first, in the byte or row of that number."""

    path: str
    what: str
    unit: str
    position: int
    times: int

    def __str__(self) -> str:
        """One line."""
        return f"{self.path}: {self.what} ({self.times} ×, first at {self.unit} {self.position})"


class Problems:
    """Problems by path and kind, which add up over chunks, ranks and restarts; iterated, in the order in which they came."""

    def __init__(self, problems: Iterable[Problem] = ()) -> None:
        """Begin with some, as they were read back from a file, for example."""
        self._problems: dict[tuple[str, str, str], Problem] = {}
        self.update(problems)

    def add(self, place: Place, what: str, times: int = 1) -> None:
        """Count a problem."""
        self.update([Problem(place.path, what, place.unit, place.position, times)])

    def update(self, problems: Iterable[Problem]) -> None:
        """Add others: equal ones become one, with the first of their positions."""
        for problem in problems:
            if problem[:3] not in self._problems and len(self._problems) >= MAX_PROBLEMS:
                problem = problem._replace(path="further files", position=0)
            known = self._problems.get(problem[:3], problem._replace(times=0))
            position, times = min(known.position, problem.position), known.times + problem.times
            self._problems[problem[:3]] = problem._replace(position=position, times=times)

    def __iter__(self) -> Iterator[Problem]:
        """One for each path and kind."""
        return iter(self._problems.values())

    def __len__(self) -> int:
        """How many there are to list."""
        return len(self._problems)


class Chunk(NamedTuple):
    """A piece of a corpus: what one rank reads at a time.

    documents can be iterated once; problems are complete when they end. size is in bytes of the files, 0 where it is unknown.
    """

    number: int
    size: int
    documents: Iterator[Document]
    problems: Problems


class Part(Protocol):
    """A file, or whatever else is divided into chunks. chunks is None where only reading tells how many there are."""

    @property
    def chunks(self) -> int | None:
        """How many."""

    def size_of(self, chunk: int) -> int:
        """The size of a chunk in bytes of the file."""

    def read(self, chunk: int, problems: Problems) -> Iterator[Document] | None:
        """The documents of a chunk; what is met on the way is added to `problems`. None where there is no such chunk."""


class DocumentError(ValueError):
    """A document that cannot be used; the message is the problem."""
