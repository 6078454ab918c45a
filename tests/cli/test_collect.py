"""`fastentropy collect`: the statistics of an image classifier over a folder of images."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fastentropy as fe
from fastentropy.cli import app
from fastentropy.recipes.images_data import Source, list_images, read_square
from fastentropy.recipes.images_models import IMAGENET
from tests._helpers.command_line import assert_one_line
from tests.recipes.image_cases import draw_images, image_file, write_folders, write_parquet
from tests.recipes.image_networks import Small

NETWORK = "tests.recipes.image_networks:Small"
OPTIONS = ["--image-size", "12", "--batch-size", "8", "--device", "cpu"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["collect", *map(str, arguments)])


@pytest.fixture
def data(tmp_path):
    write_folders(tmp_path / "images", *draw_images(20))
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path):
    """A file with the weights of a small network, and the network."""
    torch.manual_seed(5)
    model = Small().eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", model


def expected(model, data):
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in IMAGENET)
    images = torch.stack([read_square(source, 12) for source in list_images(data)])
    with torch.no_grad(), fe.collect(model) as collector:
        model((images - mean) / std)
    return collector.compute()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Small calls 2 of its activations as functions")
def test_counts_are_those_of_the_images(data, weights, tmp_path):
    path, model = weights
    result = invoke(NETWORK, "--data", data, "--weights", path, *OPTIONS, "--output", tmp_path / "s.safetensors")
    assert result.exit_code == 0, result.output
    statistics, plain = fe.Statistics.load(tmp_path / "s.safetensors"), expected(model, data)
    assert list(statistics) == list(plain)
    assert all(torch.equal(statistics[name].counts, site.counts) for name, site in plain.items())
    assert result.stdout == f"{statistics}\n\nimages   20\nwritten  {tmp_path / 's.safetensors'}\n"
    assert result.stderr.strip() == f"{NETWORK} begins with the weights of {path}"


@pytest.mark.slow
def test_json_and_plot(data, tmp_path):
    result = invoke(NETWORK, "--data", data, *OPTIONS, "--max-images", "7", "--plot", tmp_path / "a.png", "--json", "-q")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["images"] == 7
    assert [site["activation"] for site in values["sites"].values()] == ["relu"] * 3
    assert not result.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_images_are_found_in_folders_and_tables(tmp_path, data):
    assert len(list_images(data)) == 20
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(image_file(draw_images(1)[0][0]))
    assert list_images(flat) == [Source(str(flat / "a.png"), None)]
    for split, count in (("test", 3), ("train", 4)):
        write_parquet(tmp_path / "tables" / f"{split}-0.parquet", *draw_images(count))
    assert len(list_images(tmp_path / "tables")) == 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--data", "none"], "none is not a folder; --data FOLDER must hold image files or parquet files"),
        (["--data", "empty"], "empty holds no images; expected parquet files, or files with .png"),
        (["--data", "torn"], r"torn/a\.png"),
        (["--output", "a.txt"], r"a\.txt cannot be written; name a file that ends in \.safetensors"),
        (["--plot", "a.gif"], r"a\.gif: a plot is saved as \.png, \.svg, \.pdf"),
        (["--weights", "none.safetensors"], r"none\.safetensors cannot be read: No such file or directory"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
    ],
)
def test_bad_input_is_one_line(arguments, text, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"torn")
    given = [] if "--data" in arguments else ["--data", data]
    assert_one_line(invoke(NETWORK, *given, *OPTIONS, *arguments), text)


def test_unknown_network_is_one_line(data):
    assert_one_line(invoke("resnet19", "--data", data, *OPTIONS), "unknown model 'resnet19'; the nearest are ")
