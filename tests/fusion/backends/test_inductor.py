"""A compiled network computes what the graph computes, at every batch size, and gives gradients where they are needed."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastentropy import fuse, load
from fastentropy.fusion import choosing
from fastentropy.fusion.backends import inductor, make_runner
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.traced_inputs import TracedInputs
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.fusing import assert_equal, inverted_residual

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.fixture
def compiled_by(monkeypatch):
    """torch.compile with another backend than Inductor, which needs no compiler; the list of the graphs it compiled."""
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append((graph, torch._inductor.config.freezing))
        return graph

    monkeypatch.setattr(inductor.torch, "compile", lambda model, **options: compile_(model, fullgraph=True, backend=backend))
    return graphs


@pytest.mark.slow
def test_inductor_in_earnest():
    model, x = inverted_residual()
    fused = fuse(model, (x,), backend="inductor")
    assert (fused.report.choice, fused.report.backend) == ("fused", "inductor") or fused.report.backend == "eager"
    assert set(fused.report.times) == {"eager", "inductor"}
    for batch in (3, 1, 5):
        assert_equal(fused, model, torch.randn(batch, *x.shape[1:]))


class BorderAndReLU6(nn.Module):
    """A convolution with another bias in the first row, as in merged chains, and one that Inductor joins with its ReLU6."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.row = (
            nn.Conv2d(3, 3, 3, padding=1),
            nn.Conv2d(3, 3, 1),
            nn.Parameter(torch.randn(3, 1, 5)),
        )

    def forward(self, x):
        y = self.first(x)
        torch.ops.aten.slice.Tensor(y, 2, 0, 1).add_(self.row)
        return nn.functional.relu6(self.second(y))


@pytest.mark.slow
@torch.no_grad()
def test_convolution_with_relu6_behind_a_border():
    model, x = BorderAndReLU6(), torch.randn(2, 3, 5, 5)
    program = export(model, Inputs((x,), {}))
    run = make_runner("inductor", inference_module(program), TracedInputs.of(program))
    torch.testing.assert_close(run(x), model(x))


def fuse_compiled(monkeypatch, backend="inductor"):
    """Return a model, its input, and the model fused and compiled. Compiled forms count as faster, the fused one most."""
    price = {"original": 3.0, "folded": 2.0, "fused": 1.0}
    samples = lambda functions, **options: {key: [price[key[0]] + 3 * (key[2] == "eager")] for key in functions}  # noqa: E731
    monkeypatch.setattr(choosing, "measure_samples", samples)
    model, x = inverted_residual()
    return model, x, fuse(model, (x,), backend=backend)


@pytest.mark.parametrize("backend", ["inductor", "auto"])
def test_weights_are_frozen_whenever_it_compiles(compiled_by, monkeypatch, backend):
    model, x, fused = fuse_compiled(monkeypatch, backend)
    assert (fused.report.choice, fused.report.backend) == ("fused", "inductor")
    for batch in (3, 5, 7):
        assert_equal(fused, model, torch.randn(batch, *x.shape[1:]))
    assert compiled_by
    assert all(frozen for _, frozen in compiled_by)


def test_call_that_needs_gradients(compiled_by, monkeypatch):
    model, x, fused = fuse_compiled(monkeypatch)
    given = [x.clone().requires_grad_() for _ in range(2)]
    for module, each in zip((fused, model), given, strict=True):
        module(each).sum().backward()
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-4, atol=1e-5)
    assert not fused(x).requires_grad


@pytest.mark.slow
def test_copies_and_files_are_compiled_again(compiled_by, monkeypatch, tmp_path):
    model, x, fused = fuse_compiled(monkeypatch)
    fused.save(tmp_path / "model.pt2")
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), load(tmp_path / "model.pt2")):
        before = len(compiled_by)
        assert other.report == fused.report
        assert_equal(other, model, x)
        assert len(compiled_by) > before


def laid_out(x):
    """Return an image batch in four layouts: dense, channels-last, with swapped rows and columns, and part of a larger one."""
    return (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        torch.cat([x, x], 3)[..., : x.shape[3]],
    )


def test_every_layout_and_mode(compiled_by, monkeypatch):
    model, x, fused = fuse_compiled(monkeypatch)
    for batch in (3, 2, 5):
        for given in laid_out(torch.randn(batch, *x.shape[1:])):
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert_equal(fused, model, given)
    assert all(frozen for _, frozen in compiled_by)


def test_float64_is_compiled_without_freezing(compiled_by):
    model, x = inverted_residual()
    model, x = model.double(), x.double()
    fused = fuse(model, (x,), backend="inductor", measure=False)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    assert compiled_by
    assert not any(frozen for _, frozen in compiled_by)


def test_compiled_network_in_another_trace(compiled_by, monkeypatch):
    model, x, fused = fuse_compiled(monkeypatch)
    again = fuse(fused, (x,), measure=False)
    assert_equal(again, model, torch.randn(5, *x.shape[1:]))
    program = torch.export.export(fused, (x,), dynamic_shapes=(({0: torch.export.Dim.AUTO},),))
    assert_equal(program.module(), model, torch.randn(5, *x.shape[1:]))


def test_compiled_weights_are_not_replaced(compiled_by, monkeypatch):
    model, x, fused = fuse_compiled(monkeypatch)
    weights = {name: 2 * value for name, value in fused.state_dict().items()}
    uncalled = copy.deepcopy(fused)
    uncalled.load_state_dict(weights)
    with pytest.raises(ValueError, match=r"^the weights are compiled into this model, which runs in inductor"):
        nn.Sequential(fused).load_state_dict({f"0.{name}": value for name, value in weights.items()})
    assert_equal(fused, model, x)
    assert_equal(uncalled, uncalled.network, x)


def test_converted_weights_are_compiled_again(compiled_by, monkeypatch):
    _, x, fused = fuse_compiled(monkeypatch)
    before = len(compiled_by)
    fused.half().float()  # which rounds the weights
    assert_equal(fused, fused.network, x)
    assert len(compiled_by) > before


def test_form_that_cannot_be_compiled(compiled_by, monkeypatch):
    compile_, networks = inductor.torch.compile, []

    def fail(*inputs):
        raise RuntimeError("a bug of the compiler")

    def compile_first(network, **options):
        """Compile the original form only, which comes first. The folded one is the same, since there is no batch norm."""
        networks.append(network)
        return compile_(network, **options) if len(networks) == 1 else fail

    monkeypatch.setattr(inductor.torch, "compile", compile_first)
    model, x, fused = fuse_compiled(monkeypatch)
    assert (fused.report.choice, fused.report.backend) == ("original", "inductor")
    assert set(fused.report.times["inductor"]) == {"original", "folded"}
    assert fused.report.notes == ("inductor cannot run the fused form: a bug of the compiler",)
    assert_equal(fused, model, x)


def test_network_that_cannot_be_compiled(monkeypatch, images, network):
    def fail(*given, **options):
        raise RuntimeError("no compiler\nwas found")

    monkeypatch.setattr(inductor.torch, "compile", fail)
    with pytest.raises(ValueError, match=r"^backend='inductor': inductor cannot run this network: no compiler was found$"):
        fuse(network.eval(), (images,), backend="inductor")
    fused = fuse(network, (images,), backend="auto")
    assert fused.report.backend == "eager"
    assert fused.report.notes == ("inductor cannot run this network: no compiler was found",)
    assert fused.report.notes[0] in str(fused.report)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "tvm"}, "backend must be 'eager', 'inductor', 'auto' or 'onnxruntime', not 'tvm'"),
        (
            {"backend": "auto", "measure": False},
            "backend='auto' chooses by measured times, but measure is False",
        ),
        (
            {"backend": "inductor", "borders": "train"},
            "borders='train' makes a network to be trained, which backend",
        ),
    ],
)
def test_options_that_do_not_fit(options, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        fuse(nn.Linear(2, 2).eval(), (torch.randn(2, 2),), **options)


def test_backend_without_measurement(compiled_by):
    model, x = inverted_residual()
    fused = fuse(model, (x,), backend="inductor", measure=False)
    assert (fused.report.choice, fused.report.backend, fused.report.times) == ("fused", "inductor", {})
    assert_equal(fused, model, x)
    assert compiled_by
