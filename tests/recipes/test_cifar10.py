import copy
import functools
import io
import itertools
import re

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import fastentropy as fe
from fastentropy.recipes import cifar10, load_recipe
from fastentropy.recipes.cifar10 import MEAN, STD, Cifar10, learning_rate
from fastentropy.recipes.cifar10_data import augment, read_images
from fastentropy.recipes.cifar10_models import MODELS
from fastentropy.recipes.image_files import hold_out

CPU = torch.device("cpu")


def image_file(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def random_pixels(labels, seed=0):
    """Return noise around a brightness that depends on the class, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    return (20 * labels[:, None, None, None] + rng.integers(0, 60, (len(labels), 32, 32, 3))).astype(np.uint8)


def table(files, labels, column="img"):
    return pa.table({column: [{"bytes": file, "path": None} for file in files], "label": labels})


def write(path, pixels, labels, column="img"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table([image_file(image) for image in pixels], labels, column), path)


@pytest.fixture(scope="module")
def arrays():
    """60 training and 20 test images [n, 32, 32, 3] with their labels."""
    labels = np.arange(60) % 10
    return {"train": (random_pixels(labels), labels), "test": (random_pixels(labels[:20], 1), labels[:20])}


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    """A folder like the Hub's, with the training images in two files."""
    folder = tmp_path_factory.mktemp("data")
    pixels, labels = arrays["train"]
    write(folder / "plain_text" / "train-00000-of-00002.parquet", pixels[:40], labels[:40])
    write(folder / "plain_text" / "train-00001-of-00002.parquet", pixels[40:], labels[40:])
    write(folder / "plain_text" / "test-00000-of-00001.parquet", *arrays["test"])
    return folder


@pytest.fixture
def recipe(folder, monkeypatch):
    """A recipe with a smaller last batch: 50 images for training, 10 for validation, 20 for the test."""
    monkeypatch.setattr(cifar10, "BATCH_SIZE", 16)
    return Cifar10(CPU, model="resnet8", data=str(folder))


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def as_images(arrays):
    """Return the images as the input of a network."""
    pixels = torch.tensor(arrays).permute(0, 3, 1, 2)
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


# Data


@pytest.mark.parametrize("split", ["train", "test"])
def test_read_images_round_trip(split, arrays, folder):
    images, labels = read_images(folder, split)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert np.array_equal(images.permute(0, 2, 3, 1), arrays[split][0])
    assert np.array_equal(labels, arrays[split][1])


def test_read_images_from_column_image_and_jpeg(arrays, tmp_path):
    pixels, labels = arrays["test"]
    write(tmp_path / "test.parquet", pixels, labels, column="image")
    assert np.array_equal(read_images(tmp_path, "test")[0].permute(0, 2, 3, 1), pixels)
    flat = np.full((1, 32, 32, 3), 77, np.uint8)  # which JPEG preserves exactly
    pq.write_table(table([image_file(flat[0], "JPEG")], [0]), tmp_path / "train.parquet")
    assert np.array_equal(read_images(tmp_path, "train")[0].permute(0, 2, 3, 1), flat)


def test_hold_out_a_tenth_of_each_class():
    labels = torch.randperm(1000, generator=torch.Generator().manual_seed(0)) % 10
    state = torch.get_rng_state()
    training, validation = hold_out(labels, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert labels[validation].bincount().tolist() == [10] * 10
    assert torch.cat([training, validation]).sort().values.tolist() == list(range(1000))
    torch.manual_seed(5)
    assert all(torch.equal(*pair) for pair in zip(hold_out(labels, 10), (training, validation), strict=True))


def test_held_out_images_are_not_used_for_training(recipe, arrays):
    pixels, labels = arrays["train"]
    _, validation = hold_out(torch.tensor(labels), 10)
    seen = []
    assert len(list(recipe.calibrate(seen.append))) == recipe.calibration_batches == 4
    training = np.delete(np.arange(60), validation)
    torch.testing.assert_close(torch.cat(seen), as_images(pixels[training]))
    assert torch.equal(recipe._data["train"][1], torch.tensor(labels[training]))


def test_example_inputs(recipe, arrays):
    (images,) = recipe.example_inputs()
    torch.testing.assert_close(images, as_images(arrays["test"][0]))
    assert images.is_contiguous(memory_format=torch.channels_last)
    recipe._data["test"] = tuple(tensor.repeat(5, *[1] * (tensor.ndim - 1)) for tensor in recipe._data["test"])
    assert len(recipe.example_inputs()[0]) == 64


# Augmentation


def test_augment_shifts_and_flips():
    generator = torch.Generator().manual_seed(0)
    cases = list(itertools.product(range(9), range(9), (False, True)))
    images = torch.randint(1, 256, (len(cases), 3, 32, 32), generator=generator, dtype=torch.uint8)
    shifts, flips = torch.tensor([case[:2] for case in cases]), torch.tensor([case[2] for case in cases])
    augmented = augment(images, shifts, flips)
    assert augmented.dtype == torch.uint8
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    for image, result, (top, left, flip) in zip(images, augmented, cases, strict=True):
        padded = np.zeros((3, 40, 40), np.uint8)
        padded[:, 4:36, 4:36] = image
        window = padded[:, top : top + 32, left : left + 32]
        assert np.array_equal(result, window[:, :, ::-1] if flip else window)


def test_training_augments_each_image_once_per_epoch(recipe, monkeypatch):
    drawn = []

    def record(images, shifts, flips):
        drawn.append((images, shifts, flips))
        return augment(images, shifts, flips)

    monkeypatch.setattr(cifar10, "augment", record)
    torch.manual_seed(0)
    list(recipe.train(linear(), 2))
    assert [len(images) for images, *_ in drawn] == [16, 16, 16, 2] * 2
    first, second = (torch.cat([images for images, *_ in epoch]) for epoch in (drawn[:4], drawn[4:]))
    assert not torch.equal(first, second)
    for images in (first, second):
        assert {image.numpy().tobytes() for image in images} == {x.numpy().tobytes() for x in recipe._data["train"][0]}
    rows, columns = torch.cat([shifts for _, shifts, _ in drawn]).unbind(1)
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9))
    assert not torch.equal(rows, columns)
    flips = torch.cat([flips for *_, flips in drawn])
    assert 0.3 < flips.double().mean() < 0.7


# Training


@pytest.mark.parametrize(
    ("model", "first"),
    [
        ("resnet18", 0.1),
        ("resnet18_wide_map", 0.1),
        ("mobilenet_v2", 0.1),
        ("vgg16_bn", 0.01),
        ("swin_t", 0.001),
        ("resnet8", 0.1),
    ],
)
def test_published_learning_rates(model, first):
    expected = [first] * 80 + [first / 10] * 40 + [first / 100] * 40
    assert [learning_rate(model, epoch, Cifar10.epochs) for epoch in range(160)] == pytest.approx(expected)


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.01], [0.1, 0.1, 0.01], [0.1, 0.1, 0.01, 0.001]])
def test_short_schedules_start_at_the_first_rate(rates, recipe):
    used = []

    def record(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        used.append((group["lr"], group["momentum"], group["weight_decay"], len(group["params"])))

    handle = register_optimizer_step_pre_hook(record)
    try:
        for _ in range(2):
            list(recipe.train(model := linear(), len(rates)))
    finally:
        handle.remove()
    expected = [(pytest.approx(rate), 0.9, 1e-4, len(list(model.parameters()))) for rate in rates for _ in range(4)]
    assert used == expected * 2


def test_networks_of_another_width(folder):
    model = load_recipe("cifar10", CPU, model="resnet8", data=str(folder), width=0.5).build_model()
    assert [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)][:2] == [8, 8]


@pytest.mark.slow
def test_training_is_reproducible(folder):
    recipe = Cifar10(CPU, model="resnet8", data=str(folder))

    def train(seed):
        torch.manual_seed(seed)
        model = recipe.build_model().train()
        return list(recipe.train(model, 6)), model.state_dict()

    (losses, weights), again, other = train(1), train(1), train(2)
    assert losses == again[0] != other[0]
    assert all(torch.equal(weights[name], again[1][name]) for name in weights)
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.2


def test_epoch_loss_is_the_mean_over_images(recipe, monkeypatch):
    monkeypatch.setattr(cifar10, "augment", lambda images, shifts, flips: images)
    monkeypatch.setitem(cifar10.LEARNING_RATES, "resnet8", 0.0)
    model = linear()
    images, labels = recipe._data["train"]
    expected = F.cross_entropy(model(recipe._normalize(images)), labels).item()
    assert list(recipe.train(model, 1)) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_accuracy(split, recipe, arrays):
    pixels, labels = arrays["test" if split == "test" else "train"]
    if split == "validation":
        indices = hold_out(torch.tensor(labels), 10)[1]
        pixels, labels = pixels[indices], labels[indices]
    known, answers = as_images(pixels), torch.tensor(labels)
    answers[::3] += 1  # every third is wrong

    def model(batch):
        distances, nearest = torch.cdist(batch.flatten(1), known.flatten(1)).min(1)
        assert distances.max() < 1  # no other image
        return F.one_hot(answers[nearest] % 10, 10)

    assert recipe.evaluate(model, split) == 1 - len(labels[::3]) / len(labels)


class _ValuesRead(TorchDispatchMode):
    """Counts how often Python reads the value of a tensor, which would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_one_synchronization_per_epoch_and_evaluation(recipe):
    model = linear()
    with _ValuesRead() as read:
        for losses in range(1, 4):
            next(training := recipe.train(model, 1))
            training.close()
            assert read.count == losses
        recipe.evaluate(model, "test")
        assert read.count == 4


@pytest.mark.slow
def test_compiled_training(folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=(counter := CompileCounter())))
    torch.manual_seed(0)
    model = MODELS["resnet8"]().train()
    models, losses = [model, copy.deepcopy(model)], []
    before = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    for compile, each in enumerate(models):
        recipe = Cifar10(CPU, model="resnet8", data=str(folder), compile=bool(compile))
        torch.manual_seed(1)
        losses.append(list(recipe.train(each, 2)))
        assert counter.frame_count == compile
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [(name, sorted(vars(module))) for name, module in models[1].named_modules()] == before
    recipe.evaluate(models[1].eval(), "test")
    assert counter.frame_count == 1


@pytest.mark.slow
def test_recompiles_after_each_removal(folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=(counter := CompileCounter())))
    recipe = Cifar10(CPU, model="resnet8", data=str(folder), compile=True)
    removals = torch._dynamo.config.recompile_limit + 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), *(nn.ReLU() for _ in range(removals)))
    for step in range(removals):
        list(recipe.train(model, 1))
        assert counter.frame_count == step + 1
        fe.linearize(model, [str(step + 2)])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_training_in_bfloat16_and_channels_last(folder):
    recipe = Cifar10(torch.device("cuda"), model="resnet8", data=str(folder))
    model, seen = recipe.build_model().train(), []
    model.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    losses = list(recipe.train(model, 6))
    assert losses[-1] < losses[0]
    assert all(x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


# Errors of the user


def broken(files=None, labels=None, column="img"):
    """Return a table of two images in which something is wrong."""
    good = image_file(np.zeros((32, 32, 3), np.uint8))
    return table([good, good] if files is None else [good, files], [0, 1] if labels is None else labels, column)


def pixels(*shape):
    return image_file(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "FILE cannot be read as parquet: "),
        (b"PAR1 and no more", "FILE cannot be read as parquet: "),
        (broken().slice(0, 0), "FILE holds no images"),
        (broken(column="picture"), "FILE has the columns picture, label; expected img or image, and label"),
        (broken().drop_columns(["label"]), "FILE has the columns img; expected img or image, and label"),
        (
            pa.table({"img": [b"x"], "label": [0]}),
            "the images of FILE are of type binary; expected a struct with bytes: binary",
        ),
        (pa.table({"img": [{"path": "x"}], "label": [0]}), "the images of FILE are of type struct<path: string>; expected a"),
        (pa.table({"img": [{"bytes": "x"}], "label": [0]}), "the images of FILE are of type struct<bytes: string>; expected a"),
        (broken(labels=["cat", "dog"]), "the labels of FILE are of type string; expected integers from 0 to 9"),
        (broken(labels=[0.0, 1.0]), "the labels of FILE are of type double; expected integers from 0 to 9"),
        (broken(labels=[0, 10]), "FILE, row 1: the label is 10; expected an integer from 0 to 9"),
        (broken(labels=[-1, 0]), "FILE, row 0: the label is -1; expected an integer from 0 to 9"),
        (broken(labels=[0, None]), "FILE, row 1: the label is nan; expected an integer from 0 to 9"),
        (broken(b""), "FILE, row 1: the image cannot be decoded; expected a PNG or JPEG file"),
        (broken(b"\x80\x04]\x94."), "FILE, row 1: the image cannot be decoded; expected a PNG or JPEG file"),
        (broken(pixels(32, 32, 3)[:-60]), "FILE, row 1: the image cannot be decoded; expected a PNG or JPEG file"),
        (broken(pixels(28, 30, 3)), "FILE, row 1: the image is 30×28 RGB; expected 32×32 RGB"),
        (broken(pixels(32, 32)), "FILE, row 1: the image is 32×32 L; expected 32×32 RGB"),
        (broken(pixels(32, 32, 4)), "FILE, row 1: the image is 32×32 RGBA; expected 32×32 RGB"),
    ],
)
def test_damaged_file(damaged, message, tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    if isinstance(damaged, bytes):
        path.write_bytes(damaged)
    else:
        pq.write_table(damaged, path)
    with pytest.raises(ValueError, match=re.escape(message.replace("FILE", str(path)))) as caught:
        load_recipe("cifar10", CPU, data=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_missing_image(tmp_path):
    pq.write_table(pa.table({"img": [None, {"bytes": b""}], "label": [0, 0]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet, row 0: the image cannot be decoded"):
        read_images(tmp_path, "train")


def test_incomplete_folder(tmp_path, arrays):
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match=re.escape(f"{missing} is not a folder; --data FOLDER must hold the parquet files")):
        Cifar10(CPU, data=str(missing))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no parquet file whose name begins with train")):
        Cifar10(CPU, data=str(tmp_path))
    few = slice(0, 19)  # one image of class 9
    write(tmp_path / "train.parquet", arrays["train"][0][few], arrays["train"][1][few])
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds no parquet file whose name begins with test")):
        Cifar10(CPU, data=str(tmp_path))
    write(tmp_path / "test.parquet", *arrays["test"])
    with pytest.raises(ValueError, match="the training images hold 1 of class 9; expected at least 2 of each class"):
        Cifar10(CPU, data=str(tmp_path))


def test_no_data_and_unknown_model():
    message = (
        "the recipe cifar10 needs its data: --data FOLDER with the parquet files of the Hub's cifar10, "
        "or --data cifar10 to download them"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_recipe("cifar10", CPU)
    names = "resnet18, resnet18_wide_map, mobilenet_v2, vgg16_bn, swin_t, resnet8"
    with pytest.raises(ValueError, match=f"^unknown model 'resnet9'; the models of the recipe cifar10 are {names}$"):
        load_recipe("cifar10", CPU, model="resnet9")


def test_download_of_parquet_files_only(folder, monkeypatch):
    calls = []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load_recipe("cifar10", CPU, data=str(folder))._data["test"][1]) == 20
    assert not calls
    assert len(load_recipe("cifar10", CPU, data="cifar10")._data["test"][1]) == 20
    assert calls == [(("uoft-cs/cifar10",), {"repo_type": "dataset", "allow_patterns": "*.parquet"})]


def test_failed_download_is_one_line(monkeypatch):
    def download(*args, **kwargs):
        raise RuntimeError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = "cifar10 could not be downloaded (no connection); name a folder that holds it with --data"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_recipe("cifar10", CPU, data="cifar10")
