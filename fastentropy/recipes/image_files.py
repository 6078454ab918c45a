"""Read labelled images from parquet files in the schema of the Hugging Face Hub, and hold out a part of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fastentropy._utils.errors import one_line

#: The seed of the split into training and validation. It is not the seed of the run, so all runs have the same split.
SPLIT_SEED = 0


def read_table(path: Path, classes: int | None = None) -> tuple[list[bytes | None], NDArray[np.int64]]:
    """Read the encoded images and the labels of one parquet file.

    The file must have the columns of an image data set on the Hugging Face Hub: `img` (or `image`), a struct whose field
    `bytes` holds an image file, and `label`, an integer.

    Args:
        path: the file.
        classes: the number of classes, or None if it is not known. Labels must be from 0 to this number less one.

    Returns:
        The content of the image files, None where it is missing, and the labels.

    Raises:
        ValueError: the file cannot be read or has other contents. The message names it.
    """
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
    return _image_files(path, table.column(name)), _labels(path, table.column("label"), classes)


def decode(data: bytes | None, place: str, formats: tuple[str, ...]) -> Image.Image:
    """Decode an image file.

    Args:
        data: its content; None if it is missing.
        place: where it comes from, which begins the message of an error.
        formats: the names that Pillow has for the formats that are expected.

    Returns:
        The image, upright by its EXIF data, in the mode of the file.

    Raises:
        ValueError: it is no image, it is broken, it has another format, or its values have more than 8 bits.
    """
    try:
        with Image.open(io.BytesIO(data or b""), formats=formats) as file:
            image = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        expected = f"{', '.join(formats[:-1])} or {formats[-1]}"
        raise ValueError(f"{place}: the image cannot be decoded; expected a {expected} file") from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{place}: the image has the mode {image.mode}; expected 8 bits for each value")
    return image


def hold_out(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Split images in two: hold out 10 % of each class, rounded up.

    The split depends on `labels` alone, so it is the same in every run.

    Args:
        labels: int64 [n], the class of each image, from 0.
        classes: the number of classes.

    Returns:
        The indices of the images that are left for training, and of those that are held out; both int64 and in ascending order.

    Raises:
        ValueError: a class has fewer than two images.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    training, held_out = [], []
    for label in range(classes):
        indices = (labels == label).nonzero()[:, 0]
        if len(indices) < 2:
            raise ValueError(f"the training images hold {len(indices)} of class {label}; expected at least 2 of each class")
        indices = indices[torch.randperm(len(indices), generator=generator, device="cpu")]
        count = -(-len(indices) // 10)
        held_out.append(indices[:count])
        training.append(indices[count:])
    return torch.cat(training).sort().values, torch.cat(held_out).sort().values


def _image_files(path: Path, column: Any) -> list[bytes | None]:
    """Return the encoded image files in a column of pyarrow structs; None for a missing one. `path` is for error messages."""
    is_struct = pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0
    files = pyarrow.compute.struct_field(column, "bytes") if is_struct else None
    if files is None or files.type not in (pyarrow.binary(), pyarrow.large_binary()):
        raise ValueError(f"the images of {path} are of type {column.type}; expected a struct with bytes: binary")
    return list(files.to_pylist())


def _labels(path: Path, column: Any, classes: int | None) -> NDArray[np.int64]:
    """Return the labels in a pyarrow column. Raise ValueError if one is out of range. `path` is for error messages."""
    expected = "from 0" if classes is None else f"from 0 to {classes - 1}"
    if not pyarrow.types.is_integer(column.type):
        raise ValueError(f"the labels of {path} are of type {column.type}; expected integers {expected}")
    labels = column.to_numpy()  # floating, with NaN, if some are missing
    below = float("inf") if classes is None else classes
    if len(wrong := np.flatnonzero(~((labels >= 0) & (labels < below)))):
        raise ValueError(f"{path}, row {wrong[0]}: the label is {labels[wrong[0]]}; expected an integer {expected}")
    return np.asarray(labels, np.int64)
