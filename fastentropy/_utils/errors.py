"""Shorten error messages to one line, and suggest names for a misspelt one."""

import difflib
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """Return the first line of the message of an error, or the name of its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def joined_lines(error: BaseException) -> str:
    """Return the whole message of an error in one line, for messages whose first line alone says little."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return the (at most three) `names` most similar to `name`, separated by commas, for a message that `name` is unknown."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))
