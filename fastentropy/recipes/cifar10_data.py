"""Find the images of CIFAR-10, read them from parquet files, split and augment them. No pickle file is read."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastentropy._utils.errors import one_line

#: Height and width of an image in pixels.
SIZE = 32
#: How many black pixels the augmentation adds on each side of an image.
PADDING = 4
#: The seed of the split into training and validation. It is not the seed of the run, so all runs have the same split.
SPLIT_SEED = 0


def data_folder(data: str | None) -> Path:
    """Return the folder with the data.

    Args:
        data: the value of the option --data: a folder, or "cifar10" to download the data set `uoft-cs/cifar10` from the
            Hugging Face Hub. None raises an error that explains the option.

    Returns:
        The folder. If it was named by the user, it may not exist.

    Raises:
        ValueError: `data` is None, or the download fails.
    """
    if data is None:
        raise ValueError(
            "the recipe cifar10 needs its data: --data FOLDER with the parquet files of the Hub's cifar10, "
            "or --data cifar10 to download them"
        )
    if data != "cifar10":
        return Path(data)
    from huggingface_hub import snapshot_download  # not needed to read a folder

    try:
        return Path(snapshot_download("uoft-cs/cifar10", repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # includes errors of the HTTP client, which differ between versions
        message = f"cifar10 could not be downloaded ({one_line(error)}); name a folder that holds it with --data"
        raise ValueError(message) from error


def read_images(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images and labels of a split from all its parquet files in and below a folder.

    The files must have the columns of the data set on the Hugging Face Hub: `img` (or `image`), a struct whose field `bytes`
    holds a PNG or JPEG file, and `label`, an integer from 0 to 9.

    Args:
        folder: the folder to search.
        split: "train" or "test". The names of the split's files begin with it.

    Returns:
        The images, uint8 [n, 3, 32, 32], and the labels, int64 [n].

    Raises:
        ValueError: the folder holds no such file, or a file cannot be read or has other contents. The message names the file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; --data FOLDER must hold the parquet files of the Hub's cifar10")
    paths = sorted(path for path in folder.rglob("*.parquet") if path.name.startswith(split))
    if not paths:
        raise ValueError(f"{folder} holds no parquet file whose name begins with {split}")
    images, labels = zip(*(_read_file(path) for path in paths), strict=True)
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2), torch.from_numpy(np.concatenate(labels))


def hold_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split the training images: hold out 10 % of each class, rounded up, for validation.

    The split depends on `labels` alone, so it is the same in every run.

    Args:
        labels: int64 [n], the class of each image, from 0 to 9.

    Returns:
        The indices of the images for training, and of those for validation; both int64 and in ascending order.

    Raises:
        ValueError: a class has fewer than two images.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    training, validation = [], []
    for label in range(10):
        indices = (labels == label).nonzero()[:, 0]
        if len(indices) < 2:
            raise ValueError(f"the training images hold {len(indices)} of class {label}; expected at least 2 of each class")
        indices = indices[torch.randperm(len(indices), generator=generator, device="cpu")]
        held_out = -(-len(indices) // 10)
        validation.append(indices[:held_out])
        training.append(indices[held_out:])
    return torch.cat(training).sort().values, torch.cat(validation).sort().values


def augment(images: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Pad each image with 4 black pixels on each side, cut out a 32×32 window, and mirror some windows from left to right.

    Args:
        images: uint8 [batch, 3, 32, 32].
        shifts: int64 [batch, 2], the first row and the first column of each window in the padded image, from 0 to 8.
        flips: bool [batch], which windows to mirror.

    Returns:
        The windows, uint8 [batch, 3, 32, 32].
    """
    positions = torch.arange(SIZE, device=images.device)
    columns = torch.where(flips[:, None], positions.flip(0), positions)
    rows, columns = shifts[:, :1] + positions, shifts[:, 1:] + columns
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, [PADDING] * 4)
    return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _read_file(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the images [n, 32, 32, 3] and labels [n] of one parquet file. Raise ValueError if it has other contents."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {one_line(error)}") from error
    name = "image" if "image" in table.column_names else "img"
    if not {name, "label"} <= set(table.column_names):
        raise ValueError(f"{path} has the columns {', '.join(table.column_names)}; expected img or image, and label")
    if not len(table):
        raise ValueError(f"{path} holds no images")
    files, labels = _image_files(path, table.column(name)), _labels(path, table.column("label"))
    return np.stack([_decode(data, f"{path}, row {row}") for row, data in enumerate(files)]), labels


def _image_files(path: Path, column: Any) -> list[bytes | None]:
    """Return the encoded image files in a column of pyarrow structs; None for a missing one. `path` is for error messages."""
    is_struct = pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    files = pyarrow.compute.struct_field(column, "bytes") if is_struct else None
    if files is None or files.type not in (pyarrow.binary(), pyarrow.large_binary()):
        raise ValueError(f"the images of {path} are of type {column.type}; expected a struct with bytes: binary")
    return list(files.to_pylist())


def _labels(path: Path, column: Any) -> NDArray[np.int64]:
    """Return the labels in a pyarrow column; raise ValueError if one is not from 0 to 9. `path` is for error messages."""
    if not pyarrow.types.is_integer(column.type):
        raise ValueError(f"the labels of {path} are of type {column.type}; expected integers from 0 to 9")
    labels = column.to_numpy()  # floating, with NaN, if some are missing
    if len(wrong := np.flatnonzero(~((labels >= 0) & (labels <= 9)))):
        raise ValueError(f"{path}, row {wrong[0]}: the label is {labels[wrong[0]]}; expected an integer from 0 to 9")
    return np.asarray(labels, np.int64)


def _decode(data: bytes | None, place: str) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file into RGB pixels [32, 32, 3]. `place`, the file and row, begins the message of a ValueError."""
    pixels = None
    try:
        with Image.open(io.BytesIO(data or b""), formats=("PNG", "JPEG")) as image:
            found = f"{image.width}×{image.height} {image.mode}"
            if found == f"{SIZE}×{SIZE} RGB":
                pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{place}: the image cannot be decoded; expected a PNG or JPEG file") from error
    if pixels is None:
        raise ValueError(f"{place}: the image is {found}; expected {SIZE}×{SIZE} RGB")
    return pixels
