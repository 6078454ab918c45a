"""Which column of a table holds the documents, and what a cell of it is."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastentropy.calibration.data.documents import MAX_TEXT, Document, DocumentError, Place, Problems

#: The columns that are read where none is named.
TEXT_COLUMN = "text"
COLUMNS = (TEXT_COLUMN, "image", "img")


def choose_column(names: Sequence[str], column: str | None) -> str:
    """The column that was named, or the first of COLUMNS. Raises ValueError where the table has none of them."""
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    mend = "name one with --column" if column is None else "name one of these with --column"
    raise ValueError(f"has the columns {', '.join(names)}; expected {' or '.join(wanted)}; {mend}")


def text_of(value: Any, column: str) -> str:
    """A cell as a text, an empty one where it is blank. Raises DocumentError where it is none."""
    if not isinstance(value, str):
        raise DocumentError(f"no text under {column!r}; name another column with --column")
    if len(value) > MAX_TEXT:
        raise DocumentError(f"a text is longer than {MAX_TEXT >> 20} MB")
    try:
        value.encode()  # JSON can hold one half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise DocumentError("a text is not Unicode") from error
    return value if value.strip() else ""


def image_of(value: Any, column: str) -> bytes:
    """A cell as an encoded image: bytes, or a mapping that holds them under `bytes`, as the Hub stores images.

    Raises DocumentError where there are none. A path beside them is not followed: nobody named that file.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise DocumentError(f"no bytes of an image under {column!r}; name another column with --column")
    return data


def documents_of(rows: Iterable[tuple[int, Any]], path: str, column: str, kind: str, problems: Problems) -> Iterator[Document]:
    """The documents in numbered cells of one column; blank texts are none. kind: text or images."""
    for row, value in rows:
        place = Place(path, "row", row)
        try:
            content = text_of(value, column) if kind == "text" else image_of(value, column)
        except DocumentError as error:
            problems.add(place, str(error))
        else:
            if content:
                yield Document(content, place)
