"""The user's images for the recipe `images`: layouts of folders, splits, decoding, and what is wrong with them."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastentropy.recipes.image_files import hold_out
from fastentropy.recipes.images_data import Pictures, Source, read_image_set, read_square
from tests.recipes.image_cases import SIZE, draw_images, image_file, write_folders, write_parquet

CPU = torch.device("cpu")
TRAIN, VALIDATION, TEST = draw_images(60), draw_images(12, seed=1), draw_images(21, seed=2)


def squares(images):
    """Return the pixels of all images of a split, [n, height, width, 3]."""
    return np.stack([read_square(source, SIZE).permute(1, 2, 0).numpy() for source in images.sources])


def by_class(pixels, labels):
    """Return images in the order in which folders are read: sorted by their class."""
    order = np.argsort(labels, kind="stable")
    return pixels[order], labels[order]


def assert_split(images, pixels, labels):
    assert images.labels.tolist() == labels.tolist()
    assert np.array_equal(squares(images), pixels)


def test_parquet_files(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000.parquet", *(array[:40] for array in TRAIN))
    write_parquet(tmp_path / "data" / "train-00001.parquet", *(array[40:] for array in TRAIN))
    write_parquet(tmp_path / "test" / "0000.parquet", *TEST)
    found = read_image_set(tmp_path)
    training, validation = hold_out(torch.tensor(TRAIN[1]), 3)
    assert (found.classes, found.held_out) == (3, ("validation",))
    assert_split(found.splits["train"], *(array[training] for array in TRAIN))
    assert_split(found.splits["validation"], *(array[validation] for array in TRAIN))
    assert_split(found.splits["test"], *TEST)


@pytest.mark.parametrize("validation", ["val", "Valid", "validation"])
def test_folders_of_splits(validation, tmp_path):
    for name, images in (("train", TRAIN), (validation, VALIDATION), ("test", TEST)):
        write_folders(tmp_path / name, *images)
    found = read_image_set(tmp_path)
    assert found.held_out == ()
    for split, images in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        assert_split(found.splits[split], *by_class(*images))


def test_only_further_split_is_the_test(tmp_path):
    write_folders(tmp_path / "train", *TRAIN)
    write_folders(tmp_path / "val", *VALIDATION)
    found = read_image_set(tmp_path)
    assert found.held_out == ("validation",)
    assert_split(found.splits["test"], *by_class(*VALIDATION))


def test_folder_for_each_class(tmp_path):
    write_folders(tmp_path, *TRAIN)
    (tmp_path / "class 1").rename(tmp_path / "train")  # as in CIFAR-100
    (tmp_path / "class 0" / "._000.png").write_bytes(b"left by a file manager")
    (tmp_path / "class 0" / "notes.txt").write_text("no image")
    found = read_image_set(tmp_path)
    assert found.held_out == ("test", "validation")
    assert {split: len(images.labels) for split, images in found.splits.items()} == {"train": 48, "test": 6, "validation": 6}
    places = [source.place for images in found.splits.values() for source in images.sources]
    assert len(set(places)) == 60
    order = ["class 0", "class 2", "train"]
    for images in found.splits.values():
        assert [order.index(source.place.split("/")[-2]) for source in images.sources] == images.labels.tolist()


def test_squares_are_cut_from_the_middle():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    square = read_square(Source("file", image_file(pixels)), 10)
    assert square.shape == (3, 10, 10)
    assert square[:, :, 1:-1].min() == 255  # at its edges the interpolation reads what lies beside it


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_all_images_become_rgb(mode):
    image = Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).convert(mode)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert read_square(Source("file", image_file(image, kind)), 9).eq(255).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_images_change_nothing(workers):
    sources = [Source(str(index), image_file(pixels)) for index, pixels in enumerate(TRAIN[0])]
    kept, decoded = (Pictures(sources, 16, workers=workers, device=CPU) for _ in range(2))
    assert sum(kept.keep()) == len(sources)
    order = torch.randperm(len(sources)).split(7)
    state = torch.get_rng_state()
    for one, other in zip(kept.batches(order), decoded.batches(order), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "cannot be decoded; expected a PNG, JPEG"),
        (image_file(TRAIN[0][0])[:-50], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "cannot be decoded"),
        (image_file(Image.fromarray(np.zeros((9, 9), np.uint16))), "mode I;16; expected 8 bits"),
    ],
)
def test_broken_image_is_named(data, text, workers):
    sources = [Source("good", image_file(TRAIN[0][0]))] * 4 + [Source("photos/7.png", data)]
    pictures = Pictures(sources, SIZE, workers=workers, device=CPU)
    with pytest.raises(ValueError, match=f"^photos/7.png: the image.*{text}"):
        list(pictures.batches(torch.arange(5).split(1)))


def test_missing_image_file_is_named():
    with pytest.raises(ValueError, match=r"^nowhere/1\.png cannot be read: No such file"):
        read_square(Source("nowhere/1.png", None), SIZE)


def without_a_class(folder):
    write_folders(folder / "train", *TRAIN)
    write_folders(folder / "val", *VALIDATION)
    shutil.rmtree(folder / "val" / "class 1")


def with_an_empty_class(folder):
    write_folders(folder, *TRAIN)
    shutil.rmtree(folder / "class 1")
    (folder / "class 1").mkdir()


def with_another_label(folder):
    write_parquet(folder / "train.parquet", *TRAIN)
    write_parquet(folder / "test.parquet", TEST[0], TEST[1] + 1)


WRONG = {
    "nothing": (lambda folder: None, "holds no images; expected a folder for each class, or parquet files"),
    "no class": (lambda folder: (folder / "train").mkdir(), "train holds no images"),
    "empty class": (with_an_empty_class, "class 1 holds no images; expected files with .png"),
    "class missing in a split": (without_a_class, "val has other classes than .*train: class 1"),
    "label of no training image": (with_another_label, "the test images have the label 3, which no training image has"),
    "no training images": (lambda folder: write_parquet(folder / "test.parquet", *TEST), "holds no training images"),
    "labels with a gap": (
        lambda folder: write_parquet(folder / "train.parquet", TRAIN[0], TRAIN[1] * 10**12),
        "go up to 2000000000000, but there are only 3 different ones; number them from 0 to 2",
    ),
    "one class": (lambda folder: write_parquet(folder / "train.parquet", TRAIN[0], TRAIN[1] * 0), "all .* of one class"),
    "one image of a class": (lambda folder: write_folders(folder, *draw_images(4)), "hold 1 of class 1; expected at least 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unusable_images(case, tmp_path):
    write, text = WRONG[case]
    write(tmp_path)
    with pytest.raises(ValueError, match=f"{text}") as error:
        read_image_set(tmp_path)
    assert "\n" not in str(error.value)
    assert re.search(rf"{re.escape(str(tmp_path))}|training images", str(error.value))
