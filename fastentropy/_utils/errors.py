"""Shorten error messages to one line, and suggest names for a misspelt one."""

import difflib
import os
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if the message is empty.

    An error of the operating system is "FILE: what went wrong", without its number.
    """
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def joined_lines(error: BaseException) -> str:
    """Return the whole message of an error in one line, for messages whose first line alone says little."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """Return what an error says, in one line, for the end of a message that names the file or the object already.

    An error of the operating system is told without the name of the file, which may be that of a temporary one.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error} is missing" if isinstance(error, KeyError) and error.args else joined_lines(error)


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return the (at most three) `names` most similar to `name`, separated by commas, for a message that `name` is unknown."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))
