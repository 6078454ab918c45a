"""Write files so that a reader sees the old one or the new one, never a half-written one."""

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
    """Call write(temporary path), then put that file in the place of `path` in one step.

    The temporary file lies in a folder of its own, with whatever `write` makes beside it, as safetensors does.
    """
    path = Path(path)
    folder = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary = folder / path.name
    folder.mkdir(exist_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors lets nobody but the owner read what it writes
        _put_on_disk(temporary)
        temporary.replace(path)
        _put_on_disk(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_on_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder: after a power cut a new name must not be of an empty file."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what `replace_file` left in a folder in processes that were killed; nobody may be writing there."""
    for path in folder.glob(".tmp-[0-9]*-*"):
        shutil.rmtree(path, ignore_errors=True)


def save_json(values: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write JSON, complete or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def save_tensors(tensors: Mapping[str, Tensor], path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all. Tensors may be views and may share memory."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        replace_file(path, lambda temporary: safetensors.torch.save_file(own, temporary, dict(metadata or {})))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
