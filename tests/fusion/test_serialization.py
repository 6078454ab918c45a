"""Fused models in files: written whole or not at all, and read without running anything."""

import re
import zipfile
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from fastentropy import fuse, load
from fastentropy.fusion import serialization, verification
from fastentropy.fusion.backends import onnx_runtime
from fastentropy.fusion.binding import Signature
from tests._helpers.fusing import Amplifier, assert_equal, inverted_residual, ringed

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.mark.slow
def test_package_for_this_machine(tmp_path):
    model, x = inverted_residual()
    fuse(model, (x,)).save_package(tmp_path / "model.pt2")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    assert_equal(loaded, model, torch.randn(5, *x.shape[1:]))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.slow
def test_package_after_saving_and_loading(tmp_path):
    model, x = inverted_residual()
    fused = fuse(model, (x,))
    fused.save(tmp_path / "model.pt2")
    for name, each in {"saved": fused, "loaded": load(tmp_path / "model.pt2")}.items():
        each.save_package(tmp_path / f"{name}.pt2")
        assert_equal(torch._inductor.aoti_load_package(str(tmp_path / f"{name}.pt2")), model, x)


def test_written_program_keeps_its_sample_inputs(tmp_path):
    model, x = inverted_residual()
    fused = fuse(model, (x,), measure=False)
    program = torch.export.export(model, (x,))
    serialization.write(tmp_path / "model.pt2", program, fused.report, (), Signature())
    assert torch.equal(program.example_inputs[0][0], x)


@pytest.mark.slow
@pytest.mark.parametrize("build", [inverted_residual, ringed])
def test_onnx(build, tmp_path, merged):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = build()
    fuse(model, (x,)).save_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    run = lambda y: torch.from_numpy(session.run(None, {name: y.numpy()})[0])  # noqa: E731
    assert_equal(run, model, torch.randn(5, *x.shape[1:]))


class TwoSums(nn.Module):
    """Takes two inputs and returns two outputs."""

    def forward(self, x, y):
        return torch.relu(x + y), x - y


@pytest.mark.slow
def test_onnx_has_the_chosen_names(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fused = fuse(TwoSums().eval(), (torch.randn(2, 3), torch.randn(2, 3)), measure=False)
    # "add" is also the name of the sum inside.
    fused.save_onnx(tmp_path / "a.onnx", input_names=["left", "right"], output_names=["add", "difference"])
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    difference, total = session.run(["difference", "add"], {"right": y.numpy(), "left": x.numpy()})
    assert torch.equal(torch.from_numpy(total), torch.relu(x + y))
    assert torch.equal(torch.from_numpy(difference), x - y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"input_names": ["a"]}, ValueError, "input_names: got 1 name, expected 2, for x, y"),
        ({"output_names": ["a", "b", "c"]}, ValueError, "output_names: got 3 names, expected 2"),
        ({"input_names": ["a", "b"], "output_names": ["c", "a"]}, ValueError, "a is there twice"),
        ({"input_names": "ab"}, TypeError, "input_names: got 'ab', expected a list of names"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, error, message, tmp_path):
    pytest.importorskip("onnxscript")
    fused = fuse(TwoSums().eval(), (torch.randn(2, 3), torch.randn(2, 3)), measure=False)
    with pytest.raises(error, match=re.escape(message)):
        fused.save_onnx(tmp_path / "a.onnx", **names)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_without_its_packages(tmp_path, monkeypatch):
    model, x = inverted_residual()
    fused = fuse(model, (x,))
    monkeypatch.setattr(onnx_runtime, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^onnx, onnxscript, onnxruntime: not installed; pip install"):
        fused.save_onnx(tmp_path / "model.onnx")


@pytest.mark.slow
def test_name_without_the_suffix(network, images, tmp_path):
    with pytest.raises(ValueError, match=r"model\.pt: the name of a fused model must end in \.pt2"):
        fuse(network.eval(), (images,)).save(tmp_path / "model.pt")


@pytest.mark.slow
@pytest.mark.parametrize("save", ["save", "save_onnx"])
def test_file_with_other_outputs_is_not_kept(save, tmp_path, monkeypatch):
    if save == "save_onnx":
        pytest.importorskip("onnxscript")
    model, x = inverted_residual()
    fused = fuse(model, (x,))
    (tmp_path / "model.pt2").write_bytes(b"old")
    monkeypatch.setattr(verification, "relative_error", lambda actual, expected: 1.0)
    with pytest.raises(RuntimeError, match="was not kept"):
        getattr(fused, save)(tmp_path / "model.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.slow
def test_written_network_that_amplifies_rounding_is_kept(tmp_path):
    """ONNX Runtime rounds otherwise than PyTorch. The outputs are as far from exact as those of the network itself."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    fused = fuse(Amplifier(gain=9.0).eval(), (torch.randn(5, 16),), measure=False)
    fused.save_onnx(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_failed_save_leaves_the_old_file(network, images, tmp_path, monkeypatch):
    fused, path = fuse(network.eval(), (images,)), tmp_path / "model.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch.export, "save", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fused.save(path)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_archive_with_pickled_inputs(network, images, tmp_path):
    torch.export.save(torch.export.export(network.eval(), (images,)), tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match="may hold a pickle"):
        load(tmp_path / "plain.pt2")


class Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.slow
@pytest.mark.parametrize(
    "entry", ["model/data/weights/model.pt", "model/data/constants/model.pt", "model/data/weights/weight_0.pt"]
)
def test_pickle_slipped_into_an_archive(network, images, tmp_path, entry):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    torch.save(Mark(tmp_path / "executed"), tmp_path / "pickle")
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(tmp_path / "pickle", entry)
    with pytest.raises(ValueError, match="may hold a pickle"):
        load(path)
    assert not (tmp_path / "executed").exists()


def forge(path, change):
    """Write an archive again with its entries changed: `change` maps a name and bytes to bytes, or to None to leave it out."""
    forged = path.with_name("forged.pt2")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(forged, "w") as written:
        for name in archive.namelist():
            if (content := change(name, archive.read(name))) is not None:
                written.writestr(name, content)
    return forged


@pytest.mark.slow
def test_weights_declared_as_pickles(network, images, tmp_path):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    forged = forge(path, lambda name, content: content.replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(ValueError, match="is a pickled object"):
        load(forged)


def test_archive_without_guards(network, images, tmp_path):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    forged = forge(path, lambda name, content: None if name.endswith("extra/guards.json") else content)
    with pytest.raises(ValueError, match="is not a fused model"):
        load(forged)


@pytest.mark.slow
def test_archive_with_unreadable_guards(network, images, tmp_path):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    forged = forge(path, lambda name, content: b'["f(leaf_0)"]' if name.endswith("extra/guards.json") else content)
    with pytest.raises(ValueError, match="is not a condition on sizes"):
        load(forged)(images)


def test_archive_in_an_older_layout(tmp_path):
    torch.save(Mark(tmp_path / "executed"), tmp_path / "pickle")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.15")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.write(tmp_path / "pickle", f"serialized_{name}.pt")
    with pytest.raises(ValueError, match="may hold a pickle"):
        load(tmp_path / "old.pt2")
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda b: b"text", lambda b: b"", lambda b: b[:-100], lambda b: b[: len(b) // 2]])
def test_damaged_archive(network, images, tmp_path, damage):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.pt2 is not a fused model") as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt2")
