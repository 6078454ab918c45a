"""Atomic writes: a reader sees the old file or the new one, never a half-written one."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor


def replace_file(path: str | PathLike[str], write: Callable[[Path], object]) -> None:
    """Let a function write a temporary file, then move this file to `path` in one step.

    The temporary file is in a new folder next to `path`, because some writers, such as safetensors, create further files next
    to their output. The folder is removed at the end, also after an error.

    Args:
        path: the file to create or to replace.
        write: called with the path of the temporary file, which exists and is empty. It writes the content.

    Raises:
        OSError: the file cannot be written. The error names `path`, not the temporary file.
    """
    path = Path(path)
    folder = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files readable for the owner only
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if not str(error.filename).startswith(str(folder)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file is on disk, or the list of names in a folder.

    Without this wait, a power cut could leave a file that has its new name but no content.
    """
    if os.name == "posix":  # other systems cannot open a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder. No other process may be writing to the folder."""
    for path in folder.glob(".tmp-[0-9]*-*"):
        shutil.rmtree(path, ignore_errors=True)


def save_json(values: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write a dict as a JSON file atomically: a reader sees the old file or the new one."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def save_tensors(tensors: Mapping[str, Tensor], path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically: a reader sees the old file or the new one.

    Args:
        tensors: tensors by name, on any device. They may be views and may share memory, because copies of them are written.
        path: the file to create or to replace.
        metadata: texts by name, stored in the header of the file.

    Raises:
        OSError: the file cannot be written.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        replace_file(path, lambda temporary: safetensors.torch.save_file(own, temporary, dict(metadata or {})))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
