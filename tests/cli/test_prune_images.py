"""`fastentropy prune images`: whole runs with a network and images of the user's own."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastentropy.cli import app
from fastentropy.recipes import run
from tests._helpers.kill_points import die_at
from tests.recipes.image_cases import draw_images, write_folders

SMALL = ["--model", "tests.recipes.image_networks:Small", "--image-size", "12", "--batch-size", "8", "--precision", "float32"]
SHORT = ["--epochs", "1", "--epochs-dense", "4", "--max-removed", "1", "--max-drop", "1", "--device", "cpu"]

pytestmark = pytest.mark.slow


def invoke(*arguments):
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread, as a child of this process must. Leave out the report, and the times of the last networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run, "write_report", lambda history, path: None)
        monkeypatch.setattr(run, "_latency", lambda *networks: {})
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


def test_run_says_what_it_has_found_and_chosen(finished):
    folder, output = finished
    assert "image_networks:Small begins with the weights that its factory sets" in output
    assert "3 classes, 48 for train, 6 for test, 6 for validation; held out of the training images: test, validation" in output
    options, steps, kept_step, _ = outcome(folder)
    assert (options["precision"], options["epochs_dense"], options["image_size"]) == ("float32", 4, 12)
    assert kept_step == 1
    assert [len(step["removed"]) for step in steps] == [0, 1]
    assert not list(folder.rglob(".tmp-*"))


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_run_killed_three_times_ends_like_an_undisturbed_one(finished, data, tmp_path, drawn):
    folder = tmp_path / "run"
    options = ["images", *SMALL, *SHORT, "--data", data, "--output", folder]
    for moment in (drawn.randrange(1, 16), drawn.randrange(16), drawn.randrange(16)):
        if not (child := os.fork()):
            die_at(moment)
            os._exit(invoke(*options).exit_code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL)
        options = ["--resume", folder]
    assert invoke(*options).exit_code == 0
    assert outcome(folder) == outcome(finished[0])
