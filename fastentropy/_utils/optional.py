"""Optional packages, imported where they are used."""

import importlib
from typing import Any


def require(name: str, purpose: str) -> Any:
    """Import a module. If it is missing, raise ValueError with its purpose and the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f'{purpose} needs {package}: pip install "fastentropy[calibrate]"') from error
