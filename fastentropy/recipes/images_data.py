"""Find and read the user's images: a folder for each class, or parquet files in the schema of the Hugging Face Hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastentropy.recipes.image_files import decode, hold_out, read_table

#: The formats that Pillow may decode. Others are excluded, because some of their decoders start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
#: The endings of the names of image files, in lower case.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
#: How the folder of a split may be called. The names of parquet files outside of such folders begin so.
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test",)}
#: How many batches each worker process decodes ahead, and how many images a batch has when all are decoded to be kept.
PREFETCHED, DECODED = 2, 128


class Source(NamedTuple):
    """Where an image comes from.

    Attributes:
        place: the path of its file, with the row in a parquet file, for messages.
        data: the content of its image file; None if it is read from `place`.
    """

    place: str
    data: bytes | None


class Labelled(NamedTuple):
    """Images of a split with their labels.

    Attributes:
        sources: where each image comes from.
        labels: int64 [n], the class of each, from 0.
    """

    sources: list[Source]
    labels: Tensor

    def at(self, indices: Tensor) -> "Labelled":
        """Return the images with these indices."""
        return Labelled([self.sources[index] for index in indices.tolist()], self.labels[indices])


@dataclass(frozen=True)
class ImageSet:
    """The images of a data set, in three splits.

    Attributes:
        classes: the number of classes. The labels are below it.
        splits: the images for "train", "validation" and "test".
        held_out: which of these splits were held out of the training images.
    """

    classes: int
    splits: dict[str, Labelled]
    held_out: tuple[str, ...]


class Pictures:
    """The images of a split in one size, as uint8 tensors: decoded for each batch, or once if they are kept.

    Both ways give the same pixels.
    """

    def __init__(self, sources: Sequence[Source], size: int, *, workers: int, device: torch.device) -> None:
        """Store how to read images.

        Args:
            sources: where the images come from.
            size: their height and width in pixels.
            workers: how many processes decode many images; 0 decodes them in this process.
            device: where the images are placed.
        """
        self._images: _Decoded | Tensor = _Decoded(sources, size)
        self._workers, self._device = workers, device

    def keep(self) -> Iterator[int]:
        """Decode all images and keep them on the device. Yield how many images have been added.

        Raises:
            ValueError: an image cannot be decoded. The message names it.
        """
        assert isinstance(self._images, _Decoded)
        kept = self._images.empty(self._device)
        order = torch.arange(len(kept), device="cpu").split(DECODED)
        for indices, images in zip(order, self.batches(order), strict=True):
            kept[indices.to(self._device)] = images
            yield len(images)
        self._images = kept

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images with the given indices, batch by batch.

        Args:
            indices: for each batch an int64 tensor [n] on the CPU.

        Yields:
            uint8 [n, 3, size, size] on the device.

        Raises:
            ValueError: an image cannot be decoded. The message names it.
        """
        if isinstance(self._images, Tensor):
            for batch in indices:
                yield self._images[batch.to(self._device)]
            return
        workers = min(self._workers, len(indices) // PREFETCHED)  # a process starts slower than it decodes few batches
        loader = DataLoader(
            self._images,
            batch_sampler=[batch.tolist() for batch in indices],
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # not the default one: its numbers must be the same for images that are kept
        )
        for images in loader:
            if isinstance(images, str):
                raise ValueError(images)
            yield images.to(self._device, non_blocking=True)


class _Decoded(Dataset[Tensor]):
    """Images that are decoded when they are asked for, in batches."""

    def __init__(self, sources: Sequence[Source], size: int) -> None:
        """Store where the images come from, and their height and width in pixels."""
        self._sources, self._size = sources, size

    def empty(self, device: torch.device) -> Tensor:
        """Return memory for all images, uint8 [images, 3, size, size], not initialised."""
        return torch.empty((len(self._sources), 3, self._size, self._size), dtype=torch.uint8, device=device)

    def __getitems__(self, indices: Sequence[int]) -> Tensor | str:
        """Return the images with these indices, uint8 [n, 3, size, size], or what is wrong with one of them.

        An exception of a worker process would reach the user with the traceback of that process.
        """
        try:
            return torch.stack([read_square(self._sources[index], self._size) for index in indices])
        except ValueError as error:
            return str(error)


def _unchanged(batch: Any) -> Any:
    """Return a batch as it is."""
    return batch


def read_image_set(folder: Path) -> ImageSet:
    """Find the images in a folder, and split them.

    The folder holds

    - parquet files, whose names or folders are called after their split (train, val, test), or
    - folders for the splits with a folder for each class, or
    - a folder for each class only.

    Where images for the test or for the validation are missing, 10 % of the training images of each class are held out in
    their place. If there is one further split beside the training images, the test uses it.

    Args:
        folder: the folder.

    Returns:
        The images. They are not decoded yet. Classes with folders are numbered in the order of their names.

    Raises:
        ValueError: there are no images, a class has none or too few, a file cannot be read, or the splits have other classes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; --data FOLDER must hold a folder for each class, or parquet files")
    found = _read_parquet(folder) or _read_folders(folder)
    if "train" not in found:
        raise ValueError(f"{folder} holds no training images; expected a folder train, or parquet files train*.parquet")
    classes = _count_classes(folder, found)
    if "test" not in found and "validation" in found:
        found["test"] = found.pop("validation")
    held_out = tuple(name for name in ("test", "validation") if name not in found)
    for name in held_out:
        training, held = hold_out(found["train"].labels, classes)
        found[name], found["train"] = found["train"].at(held), found["train"].at(training)
    return ImageSet(classes, found, held_out)


def list_images(folder: Path) -> list[Source]:
    """List the images in a folder, whatever their classes are.

    Args:
        folder: a folder with parquet files or image files, in it or in its folders. If there are several splits, the images for
            the training are listed.

    Returns:
        The images, at least one, in the order of their files.

    Raises:
        ValueError: there is no such folder, it holds no images, or a parquet file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; --data FOLDER must hold image files or parquet files")
    if found := _read_parquet(folder):
        return found.get("train", next(iter(found.values()))).sources
    paths = sorted(path for path in _split_folders(folder)["train"].rglob("[!.]*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise ValueError(f"{folder} holds no images; expected parquet files, or files with {', '.join(ENDINGS)}")
    return [Source(str(path), None) for path in paths]


def read_square(source: Source, size: int) -> Tensor:
    """Read an image, resize it so that its shorter side has `size` pixels, and cut out the square in its middle.

    Args:
        source: where the image comes from.
        size: height and width of the square in pixels.

    Returns:
        uint8 [3, size, size], red, green and blue.

    Raises:
        ValueError: the image cannot be read or decoded.
    """
    data = source.data
    if data is None:
        try:
            data = Path(source.place).read_bytes()
        except OSError as error:
            raise ValueError(f"{source.place} cannot be read: {error.strerror}") from error
    image = decode(data, source.place, FORMATS).convert("RGB")
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def _read_parquet(folder: Path) -> dict[str, Labelled]:
    """Read the parquet files in and below a folder. Return the splits; none if there are no such files."""
    paths = sorted(folder.rglob("*.parquet"))
    found: dict[str, Labelled] = {}
    for split, names in SPLIT_NAMES.items():
        files = [path for path in paths if path.name.startswith(names) or path.relative_to(folder).parent.name in names]
        sources: list[Source] = []
        labels: list[int] = []
        for path in files:
            images, numbers = read_table(path)
            sources += [Source(f"{path}, row {row}", data or b"") for row, data in enumerate(images)]
            labels += numbers.tolist()
        if files:
            found[split] = Labelled(sources, torch.tensor(labels, device="cpu"))
    return found


def _read_folders(folder: Path) -> dict[str, Labelled]:
    """List the images in a folder for each class, or in folders for the splits. Return the splits."""
    splits = _split_folders(folder)
    names = {split: [path.name for path in _folders(path)] for split, path in splits.items()}
    classes = names["train"]
    for split, others in names.items():
        if differing := sorted(set(classes) ^ set(others)):
            raise ValueError(f"{splits[split]} has other classes than {splits['train']}: {', '.join(differing)}")
    if not classes:
        raise ValueError(f"{splits['train']} holds no images; expected a folder for each class, or parquet files")
    return {split: _list_images(path, classes) for split, path in splits.items()}


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each split. Without such folders, all images are in the folder for the training.

    A class may be called "train" too; its folder holds no folders, and lies beside those of other classes.
    """
    inner = _folders(folder)
    splits = {split: path for split, names in SPLIT_NAMES.items() for path in inner if path.name.lower() in names}
    if "train" in splits and (_folders(splits["train"]) or len(splits) == len(inner)):
        return splits
    return {"train": folder}


def _list_images(folder: Path, classes: Sequence[str]) -> Labelled:
    """List the images of a split whose folder has a folder for each class. Raise ValueError if a class has none."""
    sources: list[Source] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (folder / name).rglob("[!.]*") if path.suffix.lower() in ENDINGS and path.is_file())
        if not paths:
            raise ValueError(f"{folder / name} holds no images; expected files with {', '.join(ENDINGS)}")
        sources += [Source(str(path), None) for path in paths]
        labels += [label] * len(paths)
    return Labelled(sources, torch.tensor(labels, device="cpu"))


def _count_classes(folder: Path, splits: Mapping[str, Labelled]) -> int:
    """Return the number of classes of the training images. Raise ValueError if the labels cannot be used."""
    labels = {split: set(images.labels.tolist()) for split, images in splits.items()}
    classes, highest = len(labels["train"]), max(labels["train"])
    if classes < 2:
        raise ValueError(f"{folder}: all training images are of one class; expected two classes or more")
    if highest >= classes:
        raise ValueError(
            f"{folder}: the labels of the training images go up to {highest}, but there are only {classes} different ones; "
            f"number them from 0 to {classes - 1}"
        )
    for split, others in labels.items():
        if more := sorted(others - labels["train"]):
            raise ValueError(f"{folder}: the {split} images have the label {more[0]}, which no training image has")
    return classes


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, in the order of their names, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
