"""The recipe `images`: data, networks, training, and one line for what the user can mend."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastentropy.recipes.image_files import hold_out
from fastentropy.recipes.images import Images
from fastentropy.recipes.images_data import Pictures, Source, read_image_set, read_square
from fastentropy.recipes.training import Schedule, classification_loss, draw_crops, random_crops
from tests.recipes.image_cases import draw_images, image_file, write_parquet

CPU = torch.device("cpu")
SMALL = "tests.recipes.image_networks:Small"


@pytest.fixture(scope="module")
def arrays():
    """60 training and 21 test images of three classes."""
    return {"train": draw_images(60), "test": draw_images(21, seed=1)}


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, (pixels, labels) in arrays.items():
        write_parquet(folder / f"{split}.parquet", pixels, labels)
    return folder


def make(folder, **options):
    given = {"model": SMALL, "image_size": 12, "batch_size": 8, "precision": "float32", **options}
    return Images(CPU, data=str(folder), **given)


# Data


def test_parquet_round_trip(arrays, folder):
    found = read_image_set(folder)
    training, validation = hold_out(torch.tensor(arrays["train"][1]), 3)
    expected = {
        "train": tuple(array[training] for array in arrays["train"]),
        "validation": tuple(array[validation] for array in arrays["train"]),
        "test": arrays["test"],
    }
    assert found.held_out == ("validation",)
    for split, (pixels, labels) in expected.items():
        images = found.splits[split]
        assert images.labels.tolist() == labels.tolist()
        for source, image in zip(images.sources, pixels, strict=True):
            assert np.array_equal(read_square(source, 12).permute(1, 2, 0), image)


def test_squares_are_cut_from_the_middle():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    square = read_square(Source("file", image_file(pixels)), 10)
    assert square.shape == (3, 10, 10)
    assert square[:, :, 1:-1].min() == 255  # at its edges the interpolation reads what lies beside it


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_images_change_nothing(folder, workers):
    sources = read_image_set(folder).splits["train"].sources
    kept, decoded = (Pictures(sources, 16, workers=workers, device=CPU) for _ in range(2))
    assert sum(kept.keep()) == len(sources)
    order = torch.randperm(len(sources)).split(7)
    state = torch.get_rng_state()
    for one, other in zip(kept.batches(order), decoded.batches(order), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


# Training


def test_crops_of_the_whole_image_are_the_image():
    images = torch.randint(256, (4, 3, 9, 9), dtype=torch.uint8)
    whole = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, 2, 3)
    torch.testing.assert_close(random_crops(images, whole), images.float(), atol=1e-3, rtol=0)
    mirrored = whole * torch.tensor([[-1.0], [1]])
    torch.testing.assert_close(random_crops(images, mirrored), images.float().flip(3), atol=1e-3, rtol=0)


def test_crops_lie_in_the_image():
    crops = draw_crops(1000, CPU)
    sizes, centres = torch.stack([crops[:, 0, 0].abs(), crops[:, 1, 1]]), crops[:, :, 2].T
    assert ((centres.abs() + sizes) <= 1 + 1e-6).all()
    assert 0.4 < (crops[:, 0, 0] < 0).double().mean() < 0.6
    assert sizes.prod(0).min() > 0.4
    assert sizes.prod(0).max() > 0.9


def test_epochs_go_through_all_images():
    schedule = Schedule(available=50, images_per_epoch=20, batch_size=8, epochs=6)
    order = schedule.draw_order()
    assert len(order) == schedule.steps == 12
    assert {len(batch) for batch in order} == {8}
    seen = torch.cat(order)
    assert sorted(seen[:50].tolist()) == list(range(50))
    assert len(set(seen[50:].tolist())) == 46


@pytest.mark.parametrize(("epochs", "per_epoch"), [(1, 8), (1, 80), (7, 80)])
def test_learning_rate_rises_and_falls(epochs, per_epoch):
    schedule = Schedule(100, per_epoch, 8, epochs)
    rates = [schedule.share_of_rate(step) for step in range(schedule.steps)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) <= 1


def test_distillation_loss():
    logits, taught = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0])
    ordinary = F.cross_entropy(logits.float(), labels)
    assert classification_loss(logits, labels, 0.0) == ordinary
    softened, target = ((each / 3).softmax(1) for each in (logits, taught))
    divergence = (target * (target / softened).log()).sum(1).mean()
    expected = 0.5 * ordinary.double() + 0.5 * 9 * divergence
    torch.testing.assert_close(classification_loss(logits, labels, 0.0, taught, 3.0).double(), expected, rtol=1e-5, atol=1e-6)


def test_training_is_reproducible_and_learns(folder):
    recipe = make(folder, images_per_epoch=32)

    def train():
        torch.manual_seed(3)
        model = recipe.build_model().train()
        steps = list(recipe.train(model, 12))
        return [float(step.loss) for step in steps], steps[-1], recipe.evaluate(model.eval(), "test")

    (losses, last, accuracy), again = train(), train()
    assert losses == again[0]
    assert (last.done, last.total) == (12 * 32, 12 * 32)
    assert accuracy == again[2] > 0.6


def test_batch_norm_follows_short_schedules(folder):
    recipe = make(folder)
    model = recipe.build_model().train()
    seen = []
    model.stem[1].register_forward_pre_hook(lambda module, inputs: seen.append(module.momentum))
    list(recipe.train(model, 1))
    assert set(seen) == {0.1}
    assert model.stem[1].momentum == 0.01
