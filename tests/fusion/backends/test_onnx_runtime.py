"""A network in ONNX Runtime computes what the model computes, with the structure of the model's outputs."""

from unittest.mock import Mock

import pytest
import torch
from torch import nn

from fastentropy import fuse
from fastentropy.fusion import choosing
from fastentropy.fusion.backends import onnx_runtime
from fastentropy.fusion.choosing import further_backends
from tests._helpers.fusing import assert_equal, inverted_residual
from tests._helpers.networks import Reads

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.mark.slow
def test_network_in_a_session():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, x = inverted_residual()
    fused = fuse(model, (x,), backend="onnxruntime", measure=False)
    assert fused.report.backend == "onnxruntime"
    for batch in (3, 1, 5):
        assert_equal(fused, model, torch.randn(batch, *x.shape[1:]))
    with torch.enable_grad():
        fused(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    traced = torch.jit.trace(fused, (x.detach(),), check_trace=False)
    exported = torch.export.export(fused, (x.detach(),)).module()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    y = torch.randn_like(x)
    for seen in (traced, exported, compiled, lambda x: torch.func.vmap(fused)(x.unsqueeze(0)).squeeze(0)):
        assert_equal(seen, model, y)
    with pytest.raises(ValueError, match=r"was converted from torch\.float32 on cpu to torch\.float64 on cpu after fusing"):
        fused.double()(x.detach().double())


@pytest.mark.slow
def test_auto_measures_the_session_too(monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    prices = {"eager": 3.0, "inductor": 2.0, "onnxruntime": 1.0}
    monkeypatch.setattr(choosing, "measure_samples", lambda functions, **options: {key: [prices[key[2]]] for key in functions})
    model, x = inverted_residual()
    fused = fuse(model, (x,), backend="auto")
    assert fused.report.backend == "onnxruntime"
    assert fused.report.times.keys() == prices.keys()
    assert_equal(fused, model, torch.randn(5, *x.shape[1:]))


def test_auto_needs_no_onnx_runtime(monkeypatch):
    monkeypatch.setattr(onnx_runtime, "find_spec", lambda name: None)
    assert further_backends("auto", nn.Linear(2, 2)) == ("inductor",)
    assert further_backends("auto", nn.Linear(2, 2, device="meta")) == ("inductor",)


@pytest.mark.slow
def test_structure_of_the_outputs():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = Reads(lambda m, x: {"a": (y := m.a(x)), "b": [m.b(y), x]}, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).eval()
    fused, x = fuse(model, (torch.randn(2, 3),), backend="onnxruntime", measure=False), torch.randn(5, 3)
    actual, expected = fused(x), model(x)
    assert actual.keys() == expected.keys()
    torch.testing.assert_close(actual["b"], expected["b"], rtol=1e-4, atol=1e-5)


def test_missing_packages(monkeypatch, network, images):
    monkeypatch.setattr(onnx_runtime, "find_spec", Mock(return_value=None))
    with pytest.raises(ImportError, match=r"^onnx, onnxscript, onnxruntime: not installed; pip install "):
        fuse(network.eval(), (images,), backend="onnxruntime")


@pytest.mark.parametrize(("dtype", "operator"), [(torch.float64, "Conv"), (torch.bfloat16, "Gemm")])
def test_operators_that_onnx_runtime_has_in_float32_only(dtype, operator, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    layers, shape = {
        "Conv": ([nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)], (2, 2, 4, 4)),
        "Gemm": ([nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)], (2, 4)),
    }[operator]
    fused = fuse(nn.Sequential(*layers).to(dtype).eval(), (torch.randn(shape, dtype=dtype),), measure=False)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ValueError, match=rf"^ONNX Runtime has no {operator} in {name} on a CPU; convert the model with model\.float\(\)"
    ):
        fused.save_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda m, x: {"y": m.a(x), "n": None, "k": 3}, "returns values that are not tensors"),
        (lambda m, x: m.a(x.add_(1)), "overwrites its inputs"),
    ],
)
def test_what_onnx_cannot_express(forward, text):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model = Reads(forward, a=nn.Linear(3, 3)).eval()
    with pytest.raises(ValueError, match=f"^backend='onnxruntime': .*the model {text}, which ONNX cannot"):
        fuse(model, (torch.randn(2, 3),), backend="onnxruntime", measure=False)
