"""`fastentropy prune`: the run folder, interruptions, and one line for every error that the user can fix."""

import inspect
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from fastentropy import Statistics, load, prune
from fastentropy.cli import app
from fastentropy.recipes import run
from fastentropy.recipes.digits import Digits, DigitsNet
from tests._helpers.command_line import assert_one_line

SHORT = ["prune", "--epochs", "2", "--max-removed", "2", "--max-drop", "1", "--seed", "3"]


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def small_network():
    return DigitsNet(channels=8, blocks=1, expansion=2)


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """Let the recipe train a network of four activations, which is fused in a third of the time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Digits, "build_model", lambda self: small_network())
        yield


@pytest.fixture
def without_pages(monkeypatch):
    """Leave out what a run shows of its result, which `finished` has: the report, and the times of the last networks."""
    monkeypatch.setattr(run, "write_report", lambda history, path: None)
    monkeypatch.setattr(run, "final_latencies", lambda *networks: {})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run the main job with a short schedule, and return its folder and its output."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    result = invoke(*SHORT, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


def outcome(history):
    """Return what the same seed must reproduce: everything but times and dates."""
    steps = [{key: step[key] for key in ("removed", "layer_entropy", "validation", "test")} for step in history["steps"]]
    return history["recipe"], history["seed"], history["options"], steps, history["kept_step"]


@pytest.mark.slow
def test_run_folder_contents(finished):
    folder, _ = finished
    history = json.loads((folder / "history.json").read_text())
    assert history["kept_step"] == 2
    for index, step in enumerate(history["steps"]):
        statistics = Statistics.load(folder / "steps" / f"{index:02d}" / "statistics.safetensors")
        assert statistics.layer_entropy() == step["layer_entropy"]
        assert step["latency_ms"]["fused"] > 0
    assert set(history["latency_ms"]) == {"dense", "dense_fused", "pruned", "fused"}
    assert (folder / "report.html").stat().st_size > 10_000
    assert not list(folder.rglob(".tmp-*"))


@pytest.mark.slow
def test_fused_network_equals_the_pruned_one(finished):
    folder, _ = finished
    history = json.loads((folder / "history.json").read_text())
    assert history["fusion"]["max_relative_error"] <= 1e-5
    with safe_open(folder / "pruned.safetensors", framework="pt") as file:
        removed = json.loads(file.metadata()["removed"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pruned = small_network().eval()
    for name in removed:
        pruned.set_submodule(name, torch.nn.Identity())
    pruned.load_state_dict(weights)
    images = torch.randn(5, 1, 8, 8)
    fused, expected = load(folder / "fused.pt2")(images), pruned(images)
    assert (fused - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_table_names_each_step_and_fits_80_columns(finished):
    _, output = finished
    history = json.loads((finished[0] / "history.json").read_text())
    for step in history["steps"]:
        assert all(name in output for name in step["removed"])
        assert f"{step['validation']:.2%}" in output
    table = [line for line in output.splitlines() if line.startswith(("│", "┃"))]
    assert len(table) == 4
    assert max(map(len, table)) <= 80


@pytest.mark.slow
def test_run_by_neuron_is_resumed(tmp_path):
    folder = tmp_path / "run"
    options = ["--granularity", "neuron", "--per-step", "60", "--max-drop", "1"]
    result = invoke("prune", "--epochs", "1", *options, "--output", folder)
    assert result.exit_code == 0, result.output
    history = json.loads((folder / "history.json").read_text())
    replaced = [sum(each["linear"] + each["constant"] for each in step["neurons"].values()) for step in history["steps"]]
    assert replaced[0] == 0
    assert replaced[1] > replaced[2] > 0
    with safe_open(folder / "pruned.safetensors", framework="pt") as file:
        neurons = json.loads(file.metadata()["neurons"])
    kept = [sum(len(each["linear"]) + len(each["constant"]) for each in step.values()) for step in neurons]
    assert kept == replaced[: history["kept_step"] + 1]
    shutil.rmtree(folder / "steps" / "02")
    reopen(folder)
    assert invoke("prune", "--resume", folder).exit_code == 0
    assert outcome(json.loads((folder / "history.json").read_text())) == outcome(history)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_json_run_with_the_same_seed_is_the_same(finished, tmp_path):
    result = CliRunner().invoke(app, [*SHORT, "--output", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0
    again = json.loads(result.stdout)
    assert again == json.loads((tmp_path / "run" / "history.json").read_text())
    assert outcome(again) == outcome(json.loads((finished[0] / "history.json").read_text()))


def test_max_drop_has_the_default_of_the_function(tmp_path, monkeypatch):
    monkeypatch.setattr(run.Run, "execute", Mock(side_effect=KeyboardInterrupt))
    assert invoke("prune", "--output", tmp_path / "run").exit_code == 130
    options = json.loads((tmp_path / "run" / "history.json").read_text())["options"]
    assert options["max_drop"] == inspect.signature(prune).parameters["max_drop"].default


@pytest.mark.usefixtures("without_pages")
@pytest.mark.slow
def test_resume_of_a_run_by_latency_with_approximations(tmp_path):
    folder = tmp_path / "run"
    options = ["--criterion", "entropy-per-latency", "--collapse", "project", "--protect", "stem.relu", "--per-step", "2"]
    result = invoke("prune", "--epochs", "1", "--max-removed", "2", "--max-drop", "1", *options, "--output", folder)
    assert result.exit_code == 0, result.output
    history = json.loads((folder / "history.json").read_text())
    assert history["options"]["protect"] == ["stem.relu"]
    assert [len(step["removed"]) for step in history["steps"]] == [0, 2]
    with safe_open(folder / "pruned.safetensors", framework="pt") as file:
        collapsed = json.loads(file.metadata()["collapsed"])
    assert collapsed == [projection for step in history["steps"] for projection in step["collapsed"]]
    shutil.rmtree(folder / "steps" / "01")
    reopen(folder)
    assert invoke("prune", "--resume", folder).exit_code == 0
    assert outcome(json.loads((folder / "history.json").read_text())) == outcome(history)


@pytest.mark.usefixtures("without_pages")
@pytest.mark.parametrize("when", ["dense training", "fine-tuning", "calibration"])
@pytest.mark.slow
def test_resumed_run_has_the_same_result(finished, tmp_path, monkeypatch, when):
    method, call = {"dense training": ("train", 1), "fine-tuning": ("train", 3), "calibration": ("calibrate", 2)}[when]
    original, calls = getattr(Digits, method), []

    def interrupted(self, *arguments):
        calls.append(arguments)
        for index, value in enumerate(original(self, *arguments)):
            if len(calls) == call and index == 1:
                raise KeyboardInterrupt
            yield value

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Digits, method, interrupted)
        result = invoke(*SHORT, "--output", folder)
    assert result.exit_code == 130
    assert f"fastentropy prune --resume {folder}" in result.output
    steps = json.loads((folder / "history.json").read_text())["steps"]
    assert len(steps) == {"dense training": 0, "fine-tuning": 2, "calibration": 1}[when]
    torch.manual_seed(99)
    resumed = invoke("prune", "--resume", folder)
    assert resumed.exit_code == 0, resumed.output
    expected = json.loads((finished[0] / "history.json").read_text())
    assert outcome(json.loads((folder / "history.json").read_text())) == outcome(expected)


@pytest.mark.usefixtures("without_pages")
def test_published_statistics_are_those_of_the_last_epoch(tmp_path):
    """They are kept for a resumed run, which trains the dense network no more."""
    folder = tmp_path / "run"
    options = ["--statistics", "published", "--max-removed", "1", "--epochs-dense", "3"]
    assert (result := invoke(*SHORT, *options, "--output", folder)).exit_code == 0, result.output
    history = json.loads((folder / "history.json").read_text())
    counted = Statistics.load(folder / "dense-statistics.safetensors")
    assert history["steps"][0]["layer_entropy"] == counted.layer_entropy(zero="on", average="batch")
    site = next(iter(counted.values()))
    assert site.counts[0].sum() == 8 * 8 * 898  # the positions of all training images
    for file in (folder / "steps").glob("0*/*"):
        file.unlink()
    reopen(folder)
    resumed = invoke("prune", "--resume", folder)
    assert resumed.exit_code == 0, resumed.output
    assert outcome(json.loads((folder / "history.json").read_text())) == outcome(history)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["prune", "--statistics", "ours"], "statistics is 'ours'; expected one of published"),
        (["prune", "--statistics", "published", "--collapse", "project"], "leave out statistics 'published'"),
        (["prune", "digit"], "unknown recipe 'digit'; the recipes are digits"),
        (["prune", "--max-drop", "-1"], "--max-drop"),
        (["prune", "--max-drop", "nan"], "max.drop"),
        (["prune", "--per-step", "0"], "--per-step"),
        (["prune", "--epochs", "many"], "--epochs"),
        (["prune", "--seed", "-4"], "--seed"),
        (["prune", "--seed", "99999999999999999999"], "--seed"),
        (["prune", "--device", "toaster"], "--device toaster cannot be used here"),
        (["prune", "--device", "meta"], "--device meta cannot be used here: expected cpu, cuda"),
        (["prune", "--resume", "no/such/run"], r"no/such/run/history\.json is missing"),
        (
            ["prune", "--criterion", "size"],
            "criterion is 'size'; expected one of entropy, entropy-per-latency",
        ),
        (["prune", "--collapse", "merge"], "collapse is 'merge'; expected 'project'"),
        (["prune", "--target-speedup", "2"], "target_speedup: give one of them, with criterion='entropy-per-latency'"),
        (["prune", "--criterion", "entropy-per-latency", "--target-speedup", "0"], "target_speedup is 0"),
        (["prune", "--data", "folder"], "the recipe digits takes no --data; leave it out"),
        (
            ["prune", "--epochs-dense", "0"],
            "--epochs-dense 0 needs a trained network, but its weights are random; leave the option",
        ),
        (["prune", "cifar10"], "needs its data: --data FOLDER"),
        (["prune", "cifar10", "--data", "nowhere"], "nowhere is not a folder"),
        (["prune", "cifar10", "--model", "resnet9"], "unknown model 'resnet9'"),
        (["prune", "--protect", "relu"], "protect names 'relu', which is not a site of the model; the nearest are"),
        (["prune", "--frobnicate"], "(?i)no such option"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(invoke(*arguments), text)
    assert not list(tmp_path.iterdir())


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(invoke("prune", "--output", tmp_path / "file" / "run"), r"cannot be written \(Not a directory\)")
    assert_one_line(invoke("prune", "--output", tmp_path / "file"), "not an empty folder")
    assert_one_line(invoke("prune", "--output", tmp_path), "not an empty folder")
    assert_one_line(invoke("prune", "--output", "/proc/run"), "/proc/run cannot be written")


def reopen(folder):
    """Turn a finished run into one that was killed after its last step."""
    path = folder / "history.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kept_step": None, "fusion": None, "latency_ms": None}))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """Return a copy of the run, killed after its last step, that a test may damage."""
    return reopen(Path(shutil.copytree(finished[0], tmp_path / "copy")))


@pytest.mark.slow
def test_resume_of_a_finished_run_leaves_it_alone(finished):
    folder, output = finished
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    again = CliRunner().invoke(app, ["prune", "--resume", str(folder)])
    assert (again.exit_code, again.stderr) == (0, f"{folder} is already finished, and was left as it is\n")
    assert again.stdout
    assert output.endswith(again.stdout)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_damaged_outcome_of_a_finished_run_is_one_line(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    history = json.loads((folder / "history.json").read_text())
    (folder / "history.json").write_text(json.dumps({**history, "fusion": {}}))
    assert_one_line(invoke("prune", "--resume", folder), r"history\.json is damaged: fusion lacks max_relative_error")


@pytest.mark.slow
def test_run_of_another_recipe_is_refused(copied, monkeypatch):
    monkeypatch.setitem(__import__("fastentropy.recipes").recipes.RECIPES, "letters", "fastentropy.recipes.digits:Digits")
    assert_one_line(invoke("prune", "letters", "--resume", copied), "a run of the recipe 'digits', not of 'letters'")


@pytest.mark.slow
def test_resume_refuses_other_options(copied):
    assert_one_line(invoke("prune", "--resume", copied, "--epochs", "5", "--max-drop", "0.2"), "leave out --max-drop, --epochs")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"recipe": "digits"}', b"\xff\xfe", pickle.dumps({"recipe": "digits"})])
@pytest.mark.slow
def test_damaged_history_is_one_line(copied, content):
    (copied / "history.json").write_bytes(content)
    assert_one_line(invoke("prune", "--resume", copied), r"history\.json is missing, damaged or not the history of a run")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_drop", "abc"),
        ("epochs", 1.5),
        ("seed", -1),
        ("device", "meta"),
        ("protect", "stem.relu"),
        ("protect", [1]),
        ("zeros_together", "yes"),
        ("model", 5),
        ("criterion", None),
        ("target_speedup", -1),
        ("collapse", 0),
    ],
)
@pytest.mark.slow
def test_impossible_option_in_a_history_is_one_line(copied, option, value):
    history = json.loads((copied / "history.json").read_text())
    (history if option == "seed" else history["options"])[option] = value
    (copied / "history.json").write_text(json.dumps(history))
    assert_one_line(invoke("prune", "--resume", copied), option)


@pytest.mark.slow
def test_step_without_metrics_is_one_line(copied):
    path = copied / "steps" / "01" / "step.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": {}}))
    assert_one_line(invoke("prune", "--resume", copied), "lacks fused_ms, pruned_ms, test")


@pytest.mark.parametrize(
    "name", ["dense.safetensors", "steps/01/statistics.safetensors", "steps/02/model.safetensors", "steps/01/step.json"]
)
@pytest.mark.slow
def test_damaged_file_of_a_run_is_named_in_one_line(copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:-20])
    assert_one_line(invoke("prune", "--resume", copied), re.escape(name))


@pytest.mark.slow
def test_no_file_of_a_run_is_unpickled(copied, monkeypatch):
    """Each file in turn is replaced by a pickle that would leave a mark. Resuming never executes it."""

    class Mark:
        def __reduce__(self):
            return os.mkdir, (str(copied / "executed"),)

    payload = pickle.dumps(Mark())
    for path in sorted(p for p in copied.rglob("*") if p.is_file()):
        kept = path.read_bytes()
        path.write_bytes(payload)
        if path.name in ("history.json", "step.json", "dense.safetensors") or "steps/02" in str(path):
            assert_one_line(invoke("prune", "--resume", copied), path.name)
        assert not (copied / "executed").exists()
        path.write_bytes(kept)
    (copied / "fused.pt2").write_bytes(payload)
    with pytest.raises(ValueError, match="is not a fused model"):
        load(copied / "fused.pt2")
    assert not (copied / "executed").exists()
