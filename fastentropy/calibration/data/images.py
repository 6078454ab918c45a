"""Read image files. A chunk, the unit of work of a rank, is a sequence of files."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastentropy.calibration.data.documents import ROWS_PER_CHUNK, Document, Place, Problems

#: The largest size of an image file in bytes. Larger files are skipped.
MAX_IMAGE = 256 << 20


@dataclass(frozen=True)
class ImageFiles:
    """A part of a corpus that consists of image files.

    Attributes:
        files: the path and the size in bytes of each file.
        kind: "images", the kind of the documents.
    """

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
        """The number of chunks into which the files are divided."""
        return -(-len(self.files) // ROWS_PER_CHUNK)

    def size_of(self, chunk: int) -> int:
        """Return the size of the files of a chunk in bytes. `chunk` is its number, from 0."""
        return sum(size for _, size in self._files(chunk))

    def read(self, chunk: int, problems: Problems) -> Iterator[Document]:
        """Yield the content of each image file of a chunk. The images are not decoded.

        Args:
            chunk: the number of the chunk, from 0.
            problems: receives the problems of files that are too large or cannot be read.
        """
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
        """Return the path and the size in bytes of each file of a chunk."""
        start = chunk * ROWS_PER_CHUNK
        return self.files[start : start + ROWS_PER_CHUNK]
