"""Small sets of images for the tests of the recipe `images`."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIZE = 12
CLASSES = 3


def image_file(image, kind="PNG"):
    """Return the content of an image file, of an image of Pillow or an array of pixels."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind)
    return buffer.getvalue()


def draw_images(count, seed=0):
    """Return images and their labels: noise around a brightness that depends on the class, which can be learned."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % CLASSES
    return (60 * labels[:, None, None, None] + rng.integers(0, 60, (count, SIZE, SIZE, 3))).astype(np.uint8), labels


def write_parquet(path, pixels, labels):
    """Write a parquet file in the schema of the Hugging Face Hub."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [{"bytes": image_file(image), "path": None} for image in pixels]
    pq.write_table(pa.table({"img": files, "label": labels}), path)


def write_folders(folder, pixels, labels):
    """Write a folder for each class. The name of a file tells the place of the image in `pixels`."""
    for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        path = Path(folder) / f"class {label}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_file(image))
