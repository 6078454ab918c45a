"""Choose the column of a table that holds the documents, and read its cells."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastentropy.calibration.data.documents import MAX_TEXT, Document, DocumentError, Place, Problems

#: The columns that are read if none is named.
TEXT_COLUMN = "text"
COLUMNS = (TEXT_COLUMN, "image", "img")


def choose_column(names: Sequence[str], column: str | None) -> str:
    """Return the named column, or the first of COLUMNS that the table has.

    Raises:
        ValueError: the table does not have it. The message is a phrase without the name of the file.
    """
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    hint = "name one with --column" if column is None else "name one of these with --column"
    raise ValueError(f"has the columns {', '.join(names)}; expected {' or '.join(wanted)}; {hint}")


def text_of(value: Any, column: str) -> str:
    """Read a cell as text; return an empty string if it is blank.

    Raises:
        DocumentError: the cell is not text, is too long, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise DocumentError(f"no text under {column!r}; name another column with --column")
    if len(value) > MAX_TEXT:
        raise DocumentError(f"a text is longer than {MAX_TEXT >> 20} MB")
    try:
        value.encode()  # JSON can hold half of a surrogate pair, which no tokenizer accepts
    except UnicodeEncodeError as error:
        raise DocumentError("a text is not Unicode") from error
    return value if value.strip() else ""


def image_of(value: Any, column: str) -> bytes:
    """Read a cell as an encoded image: bytes, or a mapping with the key `bytes`, as the Hub stores images.

    A path in the mapping is not followed, because the user did not name that file.

    Raises:
        DocumentError: the cell holds no bytes.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise DocumentError(f"no bytes of an image under {column!r}; name another column with --column")
    return data


def documents_of(rows: Iterable[tuple[int, Any]], path: str, column: str, kind: str, problems: Problems) -> Iterator[Document]:
    """Yield the documents in the numbered cells of a column, without blank texts. `kind` is "text" or "images"."""
    for row, value in rows:
        place = Place(path, "row", row)
        try:
            content = text_of(value, column) if kind == "text" else image_of(value, column)
        except DocumentError as error:
            problems.add(place, str(error))
        else:
            if content:
                yield Document(content, place)
