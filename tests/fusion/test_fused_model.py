"""A fused model is a module like others: it is copied, saved, exported and compiled."""

import copy

import pytest
import torch

from fastentropy import fuse, linearize, load
from tests._helpers.fusing import assert_equal, inverted_residual, ringed

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.mark.slow
def test_copy_is_saved_like_the_model(network, images, tmp_path):
    fused = copy.deepcopy(fuse(network.eval(), (images,)))
    fused.save(tmp_path / "model.pt2")
    assert_equal(load(tmp_path / "model.pt2"), network, images)


def test_state_dict_holds_each_weight_once(network, images, tmp_path):
    fused = fuse(network.eval(), (images,))
    fused.save(tmp_path / "model.pt2")
    called, uncalled = load(tmp_path / "model.pt2"), load(tmp_path / "model.pt2")
    called(images)
    weights = called.state_dict()
    assert [name for name, _ in called.named_buffers()] == list(weights)
    uncalled.load_state_dict(weights)
    assert list(copy.deepcopy(called).state_dict()) == list(weights)


def test_converted_model_is_not_saved(network, images, tmp_path):
    fused = fuse(network.eval(), (images,)).double()
    with pytest.raises(ValueError, match=r"was converted from torch\.float32 on cpu to torch\.float64 on cpu after fusing"):
        fused.save(tmp_path / "model.pt2")


@pytest.mark.parametrize("path", [3, None, b"model.pt2"])
def test_path_that_is_no_file_name(network, images, path):
    fused = fuse(network.eval(), (images,))
    for call in (fused.save, fused.save_package, fused.save_onnx, load):
        with pytest.raises(TypeError, match=r"^path: got .*, expected the name of an? \.?[a-z0-9]+ (file|package) "):
            call(path)


def test_saving_and_loading(network, images, tmp_path):
    linearize(network.eval(), ["relu1"])
    fused = fuse(network, (images,))
    fused.save(tmp_path / "model.pt2")
    loaded = load(tmp_path / "model.pt2")
    assert torch.equal(loaded(images[:3]), fused(images[:3]))
    assert loaded.report == fused.report
    loaded.save(tmp_path / "again.pt2")
    assert torch.equal(load(tmp_path / "again.pt2")(images), fused(images))


@pytest.mark.slow
@pytest.mark.parametrize("build", [inverted_residual, ringed])
def test_fused_model_exports_again(build, merged):
    model, x = build()
    fused = fuse(model, (x,))
    assert fused.report.chains[0].choice == "merge"
    batch = torch.export.Dim.AUTO
    again = torch.export.export(fused, (x,), dynamic_shapes={"inputs": ({0: batch},)}).module()
    assert_equal(again, model, torch.randn(5, *x.shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("build", [inverted_residual, ringed])
def test_fused_model_compiles(build, merged):
    model, x = build()
    compiled = torch.compile(fuse(model, (x,)), backend="aot_eager", fullgraph=True)
    for batch in (3, 5):
        assert_equal(compiled, model, torch.randn(batch, *x.shape[1:]))


@pytest.mark.parametrize(
    "changed",
    [
        lambda model, x: torch.compile(model, backend="eager"),
        lambda model, x: fuse(model, (x,)),
        lambda model, x: torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module(),
    ],
    ids=["compiled", "fused", "exported"],
)
def test_other_forms_of_a_model_are_fused(changed, merged):
    model, x = ringed()
    fused = fuse(changed(model, x), (x,))
    assert not any("_orig_mod" in name for chain in fused.report.chains for name in chain.names)
    assert_equal(fused, model, torch.randn(5, *x.shape[1:]))


@pytest.mark.parametrize("path", [None, 3, torch.nn.Linear(2, 2)], ids=["None", "3", "model"])
def test_loading_something_other_than_a_file(path):
    with pytest.raises(
        TypeError, match=r"^path: got (None|3|a Linear), expected the name of a \.pt2 file that fused\.save wrote$"
    ):
        load(path)
