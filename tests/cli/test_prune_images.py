"""`fastentropy prune images`: whole runs with a network and images of the user's own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastentropy.cli import app
from fastentropy.recipes import run
from fastentropy.recipes.images_data import read_image_set
from tests._helpers.command_line import assert_one_line
from tests.recipes.image_cases import draw_images, write_folders

FACTORIES = "tests.recipes.image_networks"
SMALL = ["--model", f"{FACTORIES}:Small", "--image-size", "12", "--batch-size", "8", "--precision", "float32"]
SHORT = ["--epochs", "1", "--epochs-dense", "4", "--max-removed", "1", "--max-drop", "1", "--device", "cpu"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread, as a child of this process must. Leave out the report, and the times of the last networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run, "write_report", lambda history, path: None)
        monkeypatch.setattr(run, "final_latencies", lambda *networks: {})
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_folders(folder, *draw_images(60))
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A finished run, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = invoke("images", *SMALL, *SHORT, "--data", data, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def outcome(folder):
    """Return what a resumed run must reproduce: scores, entropies, and the weights of the pruned network."""
    history = json.loads((folder / "history.json").read_text())
    steps = [{key: step[key] for key in ("removed", "layer_entropy", "validation", "test")} for step in history["steps"]]
    weights = {name: value.tolist() for name, value in load_file(folder / "pruned.safetensors").items()}
    return history["options"], steps, history["kept_step"], weights


@pytest.mark.slow
def test_run_says_what_it_has_found_and_chosen(finished):
    folder, output = finished
    assert "image_networks:Small begins with the weights that its factory sets" in output
    assert "3 classes, 48 for train, 6 for test, 6 for validation; held out of the training images: test, validation" in output
    options, steps, kept_step, _ = outcome(folder)
    assert (options["precision"], options["epochs_dense"], options["image_size"]) == ("float32", 4, 12)
    assert kept_step == 1
    assert [len(step["removed"]) for step in steps] == [0, 1]
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.slow
def test_dense_network_of_a_run_is_taken_as_it_is(finished, data, tmp_path):
    weights = finished[0] / "dense.safetensors"
    options = ["--data", data, "--weights", weights, "--epochs-dense", "0", "--max-removed", "0", "--output", tmp_path / "run"]
    result = invoke("images", *SMALL, *options)
    assert result.exit_code == 0, result.output
    assert f"begins with the weights of {weights}" in result.output
    assert outcome(tmp_path / "run")[1] == outcome(finished[0])[1][:1]
    taken, given = load_file(tmp_path / "run" / "dense.safetensors"), load_file(weights)
    assert taken.keys() == given.keys()
    assert all(torch.equal(taken[name], given[name]) for name in given)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_run_killed_at_any_moment_ends_like_an_undisturbed_one(finished, data, tmp_path, drawn):
    folder = tmp_path / "run"
    options = ["images", *SMALL, *SHORT, "--data", data, "--output", folder]
    moments = [0, drawn.randrange(1, 16), drawn.randrange(16), drawn.randrange(16)]
    job = json.dumps({"folder": str(folder), "options": [*map(str, options)], "moments": moments})
    command = [sys.executable, "-m", "tests.cli.killed_runs", job]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == 0, killed.stderr
    assert set(json.loads(killed.stdout)) <= {0, -signal.SIGKILL}, killed.stderr
    assert invoke(*["--resume", folder] if (folder / "history.json").exists() else options).exit_code == 0
    assert outcome(folder) == outcome(finished[0])


@pytest.mark.slow
def test_run_stopped_by_a_broken_image_goes_on_when_it_is_mended(data, tmp_path):
    copied, folder = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    broken = Path(read_image_set(copied).splits["train"].sources[0].place)
    content = broken.read_bytes()
    broken.write_bytes(content[:50])
    options = ["--data", copied, "--epochs", "1", "--max-removed", "0", "--cache-gb", "0", "--output", folder]
    assert_one_line(invoke("images", *SMALL, *options), f"^Error: {broken}: the image cannot be decoded; expected a PNG")
    broken.write_bytes(content)
    result = invoke("--resume", folder)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--model", ""], "needs a network: --model efficientnet_lite0"),
        (["--data", ""], "needs its data: --data FOLDER"),
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--data", "empty"], "empty holds no images; expected a folder for each class, or parquet files"),
        (["--data", "empty class"], "class 1 holds no images"),
        (["--data", "broken"], "class 0/000.png: the image cannot be decoded"),
        (["--data", "other classes"], "has other classes than .*: class 2"),
        (["--model", f"{FACTORIES}:fails"], f"the factory {FACTORIES}:fails fails: RuntimeError: no such checkpoint"),
        (["--model", f"{FACTORIES}:LoopedOnly"], "none of its activations can be isolated"),
        (["--weights", "nowhere.safetensors"], "nowhere.safetensors cannot be read"),
        (
            ["--weights", "unfit.pth"],
            "unfit.pth does not fit .*: 12 missing, such as expand.bias; 1 unknown, such as conv.weight",
        ),
        (
            ["--epochs-dense", "0", "--model", f"{FACTORIES}:seven_classes"],
            "needs a trained network, but its last layer fc is new",
        ),
        (["--epochs-dense", "-1"], "--epochs-dense"),
        (["--epochs-dense", "0", "--statistics", "published"], "--statistics published needs the last epoch of a training"),
        (["--protect", "gelu"], "protect names 'gelu', which is not a site"),
        (["--image-size", "4"], "image_size is 4; expected an int from 8"),
        (["--batch-size", "1"], "batch_size is 1; expected"),
        (["--optimizer", "adam"], "optimizer is 'adam'; expected one of sgd, adamw"),
        (["--precision", "float16"], "precision is 'float16'; expected one of float32, bfloat16"),
        (["--learning-rate", "0"], "learning_rate is 0"),
        (["--label-smoothing", "2"], "label_smoothing is 2"),
        (["--ema", "-1"], "ema is -1"),
        (["--distill", "0"], "distill is 0"),
        (["--cache-gb", "-1"], "cache_gb is -1"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given = (
        dict(zip(SMALL[::2], SMALL[1::2], strict=True))
        | {"--data": "good"}
        | dict(zip(options[::2], options[1::2], strict=True))
    )
    assert_one_line(invoke("images", *(part for option in given.items() if option[1] for part in option)), text)
    assert sorted(tmp_path.rglob("*")) == before


def prepare(folder):
    """Write a few good images and several kinds of unusable data."""
    pixels, labels = draw_images(9)
    for name in ("good", "empty class", "broken", "other classes/train"):
        write_folders(folder / name, pixels, labels)
    write_folders(folder / "other classes" / "val", pixels[:2], labels[:2])
    (folder / "empty").mkdir()
    shutil.rmtree(folder / "empty class" / "class 1")
    (folder / "empty class" / "class 1").mkdir()
    (folder / "broken" / "class 0" / "000.png").write_bytes(b"no image")
    torch.save({"conv.weight": torch.zeros(2)}, folder / "unfit.pth")
