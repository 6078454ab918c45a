"""Packages that only some corpora need, imported where they are used."""

import importlib
from typing import Any


def require(name: str, purpose: str) -> Any:
    """The module of that name. Raises ValueError, which says what it is for and how it is installed, where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f'{purpose} needs {package}: pip install "fastentropy[calibrate]"') from error
