"""Image files: chunks are runs of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Document, Place, Problems

#: Larger files, in bytes, are skipped.
MAX_IMAGE = 256 << 20


@dataclass(frozen=True)
class ImageFiles:
    """Files, each with its size in bytes."""

    files: tuple[tuple[str, int], ...]
    kind = "images"

    @property
    def path(self) -> str:
        """The first."""
        return self.files[0][0]

    @property
    def size(self) -> int:
        """The size of all in bytes."""
        return sum(size for _, size in self.files)

    @property
    def chunks(self) -> int:
        """How many."""
        return -(-len(self.files) // ROWS_PER_CHUNK)

    def size_of(self, chunk: int) -> int:
        """The size of a chunk in bytes."""
        return sum(size for _, size in self._run(chunk))

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """The images of a chunk, encoded as they are."""
        for path, size in self._run(chunk):
            place = Place(path, "byte", 0)
            if size > MAX_IMAGE:
                problems.add(place, f"is larger than {MAX_IMAGE >> 20} MB")
                continue
            try:
                with open(path, "rb") as file:
                    data = file.read(MAX_IMAGE)
            except OSError as error:
                problems.add(place, f"cannot be read: {error.strerror}")
            else:
                yield Document(data, place)

    def _run(self, chunk: int) -> tuple[tuple[str, int], ...]:
        start = chunk * ROWS_PER_CHUNK
        return self.files[start : start + ROWS_PER_CHUNK]
