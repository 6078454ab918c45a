"""Import optional packages at the point of use, because they may not be installed, and say how to install them."""

import importlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

#: The folder that holds the packages: a clone of the repository, or the site-packages of an installed wheel.
_ROOT = Path(__file__).resolve().parents[2]


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
        raise ValueError(f"{purpose} needs {package}: {install_command('calibrate')}") from error


def install_command(extra: str) -> str:
    """Return the command that installs an extra of this package from where the package itself was installed.

    Args:
        extra: the name of the extra, such as "onnx".

    Returns:
        In a clone, `pip install -e ".[onnx]"`, with the folder of the clone if another one is current. Else
        `pip install "fastentropy[onnx]"`, followed by the address of the wheel or repository if pip was given one.
    """
    if (_ROOT / "pyproject.toml").is_file():
        return f'pip install -e "{"." if Path.cwd() == _ROOT else _ROOT}[{extra}]"'
    return f'pip install "fastentropy[{extra}]{_origin()}"'


def _origin() -> str:
    """Return " @ " and the address that pip was given to install this package (PEP 610), or an empty text if there is none."""
    try:
        origin = json.loads(metadata.distribution("fastentropy").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return ""
    if not origin:
        return ""
    system = origin.get("vcs_info")
    return f" @ {system['vcs']}+{origin['url']}@{system['commit_id']}" if system else f" @ {origin['url']}"
