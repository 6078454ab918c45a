"""Errors as one line."""

import difflib
from collections.abc import Iterable


def nearest_names(name: str, names: Iterable[str]) -> str:
    """The three names that are most like one that does not exist, for an error."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def reason_of(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
