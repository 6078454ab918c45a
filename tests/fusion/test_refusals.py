"""Models, inputs and options that `fuse` refuses, in one line, leaving the model alone."""

import pytest
import torch
from torch import nn

from fastentropy import fuse
from tests._helpers.fusing import assert_equal
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (nn.Linear(2, 2).eval(), {"tolerance": "a"}, "tolerance must be a relative error of 0 or more, not 'a'"),
        (nn.Linear(2, 2).eval(), {"tolerance": -1.0}, "tolerance must be a relative error of 0 or more, not -1.0"),
        (nn.Linear(2, 2).eval(), {"tolerance": float("nan")}, "tolerance must be a relative error of 0 or more, not nan"),
    ],
)
def test_bad_model_or_tolerance(model, options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        fuse(model, (torch.randn(2, 2),), **options)


@pytest.mark.parametrize("part", [False, True])
def test_model_compiled_by_torchscript(part):
    scripted = torch.jit.script(nn.Linear(2, 2))
    model = nn.Sequential(scripted, nn.ReLU()).eval() if part else scripted.eval()
    with pytest.raises(ValueError, match=r"^the model is compiled by TorchScript; fuse the model before torch\.jit$"):
        fuse(model, (torch.randn(3, 2),))


def test_unknown_borders(network, images):
    with pytest.raises(ValueError, match=r"^borders must be 'exact' or 'train', not 'near'$"):
        fuse(network.eval(), (images,), borders="near")


def test_model_that_updates_buffers():
    def forward(m, x):
        m.calls += 1
        return m.b(m.a(x))

    model = Reads(forward, a=nn.Linear(2, 2), b=nn.Linear(2, 2)).eval()
    model.register_buffer("calls", torch.zeros(()))
    with pytest.raises(ValueError, match="the model updates calls as it runs"):
        fuse(model, (torch.zeros(3, 2),))
    assert model.calls == 0


def test_sparse_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse(), requires_grad=False)
    x, before = torch.randn(2, 4), model[1].weight.to_dense()
    assert_equal_or_refused(model, x)
    assert model[1].weight.layout is torch.sparse_coo
    assert torch.equal(model[1].weight.to_dense(), before)


def test_quantised_layers():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {"3": torch.ao.quantization.default_dynamic_qconfig})
    x = torch.randn(2, 4)
    before = quantised(x)
    assert_equal_or_refused(quantised, x)
    assert torch.equal(quantised(x), before)


def assert_equal_or_refused(model, x):
    try:
        fused = fuse(model, (x,))
    except ValueError as error:
        text = str(error)
    else:
        text = ""
        assert_equal(fused, model, x)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "inputs", "text"),
    [
        (lambda m: m.train(), (torch.zeros(2, 1, 5, 5),), r"training mode.*call model\.eval\(\) first"),
        (lambda m: m, (torch.zeros(2, 3, 5, 5),), "does not run on example_inputs"),
        (lambda m: m, (), r"does not run on example_inputs: got 0 positional inputs, but Residual takes \(x\): missing"),
        (lambda m: m, {"y": torch.zeros(2, 1, 5, 5)}, r"example_inputs: got the keywords y, but Residual takes \(x\): missing"),
        (lambda m: m, (torch.zeros(0, 1, 5, 5),), "a batch of no samples"),
    ],
)
def test_bad_inputs_leave_the_model_alone(network, change, inputs, text):
    change(network.eval())
    before = snapshot(network)
    with pytest.raises(ValueError, match=text) as raised:
        fuse(network, inputs)
    assert "\n" not in str(raised.value)
    assert_unchanged(network, before)


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda m, x: m.a(x) if x.sum() > 0 else x, r"torch\.export cannot trace Reads: .*data-dependent"),
        (lambda m, x: raises(AssertionError()) if torch.compiler.is_exporting() else x, "cannot trace Reads: AssertionError"),
        (lambda m, x: raises(TypeError("first\nsecond")), "does not run on example_inputs: first$"),
        (lambda m, x: raises(AssertionError()), "does not run on example_inputs: AssertionError"),
    ],
)
def test_untraceable_model_is_left_alone(forward, text):
    model = Reads(forward, a=nn.Linear(3, 3)).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text) as raised:
        fuse(model, (torch.ones(2, 3),))
    assert "\n" not in str(raised.value)
    assert_unchanged(model, before)


@pytest.mark.slow
def test_random_model():
    model = Reads(lambda m, x: m.b(m.a(x)) + torch.rand_like(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="differs from the model by"):
        fuse(model.eval(), (torch.ones(2, 3),))
