"""Shorten error messages to one line, and suggest names for a misspelt one."""

import difflib
import textwrap
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, cut to 300 characters. An error without a message gives its class name."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return the (at most three) `names` most similar to `name`, separated by commas, for a message that `name` is unknown."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))
