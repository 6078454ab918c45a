import re
import sys

import pytest
import torch

from fastentropy import find_sites
from fastentropy._utils.optional import install_command
from fastentropy.recipes import RECIPES, load_recipe
from fastentropy.recipes.digits import BATCH_SIZE, Digits


@pytest.fixture(scope="module")
def recipe():
    return Digits(torch.device("cpu"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_loads(name):
    with pytest.raises(ValueError, match=f"^the recipe {name} takes no --colour; leave it out$"):
        load_recipe(name, torch.device("cpu"), colour="red")


def test_unknown_recipe():
    with pytest.raises(ValueError, match="unknown recipe 'digit'; the recipes are digits, cifar10"):
        load_recipe("digit", torch.device("cpu"))


@pytest.mark.parametrize("option", ["model", "data", "compile"])
def test_option_that_the_recipe_does_not_take(option):
    assert load_recipe("digits", torch.device("cpu"), **{option: None}).epochs == Digits.epochs
    with pytest.raises(ValueError, match=f"^the recipe digits takes no --{option}; leave it out$"):
        load_recipe("digits", torch.device("cpu"), **{option: "x"})


@pytest.mark.parametrize(
    ("recipe", "package", "extra"),
    [("digits", "sklearn", "cli"), ("cifar10", "pyarrow", "cifar10"), ("images", "pyarrow", "images")],
)
def test_missing_package(recipe, package, extra, monkeypatch):
    ours = tuple(f"fastentropy.recipes.{name}" for name in (recipe, "image"))
    for module in [name for name in sys.modules if name.startswith((f"{package}.", *ours))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    message = f"the recipe {recipe} needs {package}; install it with: {install_command(extra)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_recipe(recipe, torch.device("cpu"))


def test_splits_hold_every_image_once(recipe):
    images = torch.cat([images for images, _ in recipe._data.values()])
    assert images.shape == (1797, 1, 8, 8)
    assert images.max() == 1
    sizes = {name: len(labels) for name, (_, labels) in recipe._data.items()}
    assert sizes == {"train": 898, "validation": 449, "test": 450}
    assert len({image.numpy().tobytes() for image in images}) == 1797


def test_splits_are_reproducible(recipe):
    again = Digits(torch.device("cpu"))
    assert all(torch.equal(recipe._data[name][0], again._data[name][0]) for name in recipe._data)


def test_activations_of_the_network(recipe):
    sites = find_sites(recipe.build_model(), recipe.example_inputs())
    assert len(sites) >= 8
    assert not any(":" in site.name for site in sites)


def test_calibration_visits_each_training_image_once(recipe):
    seen = []

    def model(batch):
        seen.append(len(batch))

    assert len(list(recipe.calibrate(model))) == recipe.calibration_batches
    assert (sum(seen), max(seen)) == (898, BATCH_SIZE)


@pytest.mark.slow
def test_training_is_reproducible(recipe):
    def train():
        torch.manual_seed(4)
        model = recipe.build_model().train()
        losses = list(recipe.train(model, 2))
        return losses, recipe.evaluate(model.eval(), "validation")

    (losses, score), again = train(), train()
    assert (losses, score) == again
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert score > 0.5
