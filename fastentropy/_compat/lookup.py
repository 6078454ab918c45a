"""Look private names of PyTorch up. If a name is missing, an error says so; there is no default."""

import functools
import importlib
from typing import Any

import torch


@functools.cache
def named(module: str, name: str) -> Any:
    """Return what a module of PyTorch holds under a private name, and import the module if necessary.

    Raises:
        RuntimeError: this release has no such module or no such name.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError) as error:
        raise unknown_release(f"{module}.{name}") from error


def attribute(owner: object, name: str) -> Any:
    """Return a private attribute of an object of PyTorch.

    Raises:
        RuntimeError: the object has no such attribute in this release.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise unknown_release(f"{type(owner).__name__}.{name}") from error


def unknown_release(name: str) -> RuntimeError:
    """Return the error for a release of PyTorch in which a private name is missing."""
    return RuntimeError(
        f"PyTorch {torch.__version__} has no {name}, which fastentropy needs; install a release that the CHANGELOG of "
        "fastentropy names"
    )
