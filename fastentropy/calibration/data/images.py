"""Image files: a chunk is a sequence of files."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Document, Place, Problems

#: Larger files are skipped; in bytes.
MAX_IMAGE = 256 << 20


@dataclass(frozen=True)
class ImageFiles:
    """Image files: their paths with their sizes in bytes."""

    files: tuple[tuple[str, int], ...]
    kind = "images"

    @property
    def path(self) -> str:
        """The path of the first file."""
        return self.files[0][0]

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(size for _, size in self.files)

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return -(-len(self.files) // ROWS_PER_CHUNK)

    def size_of(self, chunk: int) -> int:
        """Return the size of a chunk in bytes."""
        return sum(size for _, size in self._files(chunk))

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the images of a chunk, still encoded."""
        for path, size in self._files(chunk):
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

    def _files(self, chunk: int) -> tuple[tuple[str, int], ...]:
        start = chunk * ROWS_PER_CHUNK
        return self.files[start : start + ROWS_PER_CHUNK]
