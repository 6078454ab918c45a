"""Import optional packages at the point of use, because they may not be installed."""

import importlib
from typing import Any


def require(name: str, purpose: str) -> Any:
    """Import a module of an optional package.

    Args:
        name: the full name of the module, such as "pyarrow.parquet".
        purpose: what needs the module, as the subject of the error message, such as "reading parquet".

    Returns:
        The module.

    Raises:
        ValueError: the module cannot be imported. The message holds the purpose and the command that installs the package.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ValueError(f'{purpose} needs {package}: pip install "fastentropy[calibrate]"') from error
