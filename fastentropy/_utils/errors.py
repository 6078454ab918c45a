"""Error messages in one line."""

import difflib
import textwrap
from collections.abc import Iterable


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks and cut to 300 characters, or its class where it has none."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__


def nearest_names(name: str, names: Iterable[str]) -> str:
    """Return the three names that are most like one that does not exist, separated by commas."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))
