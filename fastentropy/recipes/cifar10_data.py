"""Find the images of CIFAR-10, read them from parquet files, split and augment them. No pickle file is read."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastentropy._utils.errors import one_line
from fastentropy.recipes.image_files import decode, read_table

#: Height and width of an image in pixels.
SIZE = 32
#: How many black pixels the augmentation adds on each side of an image.
PADDING = 4
#: The number of classes.
CLASSES = 10


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
    files, labels = read_table(path, CLASSES)
    return np.stack([_pixels(data, f"{path}, row {row}") for row, data in enumerate(files)]), labels


def _pixels(data: bytes | None, place: str) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG file into RGB pixels [32, 32, 3]. `place`, the file and row, begins the message of a ValueError."""
    image = decode(data, place, ("PNG", "JPEG"))
    if (found := f"{image.width}×{image.height} {image.mode}") != f"{SIZE}×{SIZE} RGB":
        raise ValueError(f"{place}: the image is {found}; expected {SIZE}×{SIZE} RGB")
    return np.asarray(image)
