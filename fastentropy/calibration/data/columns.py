"""Choose the column of a table that holds the documents, and read its cells."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastentropy.calibration.data.documents import MAX_TEXT, Document, DocumentError, Place, Problems

#: The column that holds texts if the user names none.
TEXT_COLUMN = "text"
#: The columns that are tried in this order if the user names none.
COLUMNS = (TEXT_COLUMN, "image", "img")


def choose_column(names: Sequence[str], column: str | None) -> str:
    """Return the name of the column that holds the documents.

    Args:
        names: the names of all columns of the table.
        column: the column that the user named; None for the first of `COLUMNS` that the table has.

    Returns:
        The name, one of `names`.

    Raises:
        ValueError: the table has no such column. The message has no subject; the caller puts the name of the file before it.
    """
    wanted = COLUMNS if column is None else (column,)
    for name in wanted:
        if name in names:
            return name
    hint = "name one with --column" if column is None else "name one of these with --column"
    raise ValueError(f"has the columns {', '.join(names)}; expected {' or '.join(wanted)}; {hint}")


def text_of(value: Any, column: str) -> str:
    """Read the text in a cell.

    Args:
        value: the value of the cell.
        column: the name of its column, for the message.

    Returns:
        The text, or an empty string if there is only white space.

    Raises:
        DocumentError: the cell is not text, is too long, or is not valid Unicode.
    """
    if not isinstance(value, str):
        raise DocumentError(f"no text under {column!r}; name another column with --column")
    if len(value) > MAX_TEXT:
        raise DocumentError(f"a text is longer than {MAX_TEXT >> 20} MB")
    try:
        value.encode()  # fails for half of a surrogate pair: JSON can hold it, but no tokenizer accepts it
    except UnicodeEncodeError as error:
        raise DocumentError("a text is not Unicode") from error
    return value if value.strip() else ""


def image_of(value: Any, column: str) -> bytes:
    """Read the encoded image in a cell.

    Args:
        value: the value of the cell: bytes, or a dict whose key "bytes" holds bytes, as the Hugging Face Hub stores images. If
            the dict holds a path instead, that file is not read, because the user did not name it.
        column: the name of the column, for the message.

    Returns:
        The content of an image file, such as a PNG.

    Raises:
        DocumentError: the cell holds no bytes.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise DocumentError(f"no bytes of an image under {column!r}; name another column with --column")
    return data


def documents_of(rows: Iterable[tuple[int, Any]], path: str, column: str, kind: str, problems: Problems) -> Iterator[Document]:
    """Yield the documents in the cells of a column, without texts of white space only.

    Args:
        rows: the number of each row and the value of its cell.
        path: the file or data set of the table, for the places of documents and problems.
        column: the name of the column.
        kind: "text" or "images".
        problems: receives a problem for each cell that holds no usable document.
    """
    for row, value in rows:
        place = Place(path, "row", row)
        try:
            content = text_of(value, column) if kind == "text" else image_of(value, column)
        except DocumentError as error:
            problems.add(place, str(error))
        else:
            if content:
                yield Document(content, place)
