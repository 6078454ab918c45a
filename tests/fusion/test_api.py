"""A fused model computes what the model computes, faster, and the model itself is never touched."""

import json
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastentropy import FusionReport, fuse, linearize
from fastentropy.fusion import choosing, pricing
from tests._helpers.fusing import assert_equal, inverted_residual, randomize_batch_norm, two_layers
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot

pytestmark = pytest.mark.usefixtures("counted_times")


@st.composite
def networks(draw):
    """Two to five convolutions with batch norm, some activations, some blocks with a residual."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels, layers = 4, []
    for _ in range(draw(st.integers(2, 5))):
        kind = draw(st.sampled_from(["plain", "depthwise", "residual", "strided"]))
        if kind == "residual":
            layers.append(Residual(channels, draw(st.booleans())))
            continue
        groups = channels if kind == "depthwise" else draw(st.sampled_from([1, 2]))
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 1)]))
        padding = tuple(k // 2 for k in kernel) if draw(st.booleans()) else 0
        stride = 2 if kind == "strided" else 1
        bias = draw(st.booleans())
        layers.append(nn.Conv2d(channels, channels, kernel, stride, padding, groups=groups, bias=bias))
        layers += [nn.BatchNorm2d(channels)] * draw(st.integers(0, 1))
        layers += [nn.ReLU(inplace=draw(st.booleans()))] * draw(st.integers(0, 1))
    return randomize_batch_norm(nn.Sequential(*layers)), draw(st.tuples(st.integers(5, 9), st.integers(5, 9)))


class Residual(nn.Module):
    def __init__(self, channels, active):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(channels, 8, 1), nn.BatchNorm2d(8)
        self.act = nn.ReLU() if active else nn.Identity()
        self.depthwise, self.project = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, channels, 1)

    def forward(self, x):
        y = self.project(self.depthwise(self.act(self.bn1(self.expand(x)))))
        y += x
        return y


@pytest.mark.slow
@settings(max_examples=12)
@given(networks(), st.sampled_from([1, 2, 3]))
def test_network_at_every_batch_size(drawn, batch):
    model, size = drawn
    try:
        model(torch.randn(1, 4, *size))
    except RuntimeError:
        return  # too small for its kernels
    fused = fuse(model, (torch.randn(batch, 4, *size),))
    assert fused.report.choice == "fused"
    for other in (1, 2, 5):
        assert_equal(fused, model, torch.randn(other, 4, *size))


@pytest.mark.slow
@pytest.mark.measured
def test_linearised_network_is_merged_and_measured(network, images):
    linearize(network.eval(), ["relu1", "gelu"])
    fused = fuse(network, (images,))
    assert_equal(fused, network, images)
    assert [chain.names for chain in fused.report.chains] == [("conv1", "conv2"), ("fc1", "fc2")]
    assert set(fused.report.milliseconds) == {"original", "folded", "fused"}
    assert fused.report.max_relative_error <= 1e-5


def test_fewer_operators_are_left(network, images):
    linearize(network.eval(), ["relu1", "relu2", "gelu"])
    graph = fuse(network, (images,)).graph_module.graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("conv2d" in name or "linear" in name for name in called) == 1
    assert not any("batch_norm" in name for name in called)


@pytest.mark.parametrize("slowest", ["original", "folded", "fused"])
def test_slower_forms_are_not_kept(network, images, monkeypatch, slowest):
    times = {"original": 1.0, "folded": 1.1, "fused": 1.2, slowest: 9.0}
    monkeypatch.setattr(choosing, "measure_samples", lambda functions, **options: {key: [times[key[0]]] for key in functions})
    linearize(network.eval(), ["gelu"])
    fused = fuse(network, (images,))
    assert fused.report.choice == min(times, key=times.get)
    assert_equal(fused, network, images)


def test_model_is_unchanged_and_shares_no_memory(network, images):
    before, given_images, random = snapshot(network.eval()), images.clone(), torch.get_rng_state()
    before = snapshot(network)
    fused = fuse(network, (images,))
    assert_unchanged(network, before)
    assert torch.equal(images, given_images)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.requires_grad for parameter in network.parameters())
    expected = fused(images)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7)
    assert torch.equal(fused(images), expected)


def test_model_that_overwrites_its_input():
    model = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).eval()
    x = torch.randn(3, 2, 4, 4)
    before = x.clone()
    fused = fuse(model, (x,))
    assert torch.equal(x, before)
    assert_equal(lambda y: fused(y.clone()), lambda y: model(y.clone()), before)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: {"a": (y := m.a(x)), "b": [m.b(y), m.c(m.b(y))]},
        lambda m, x: (m.c(m.b(m.a(x))), x),
        lambda m, x: m.b(m.relu(m.a(y := m.b(m.c(x)))) + y),
        lambda m, x: m.a(m.a(m.relu(m.a(x)))),
        lambda m, x: m.b(m.a(x)).relu_() + m.c(x),
        lambda m, x: m.c(m.b(m.a(x)).flatten(2).transpose(1, 2).reshape_as(x)),
    ],
)
def test_graphs_of_every_shape(forward):
    model = Reads(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 3, padding=1), c=nn.Conv2d(4, 4, 1), relu=nn.ReLU())
    x = torch.randn(2, 4, 6, 6)
    fused = fuse(model.eval(), (x,))
    leaves = [torch.utils._pytree.tree_leaves(each(x)) for each in (fused, model)]
    for actual, expected in zip(*leaves, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_transposed_convolution_padded_beyond_its_taps():
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, padding=3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)).eval()
    assert_equal(fuse(randomize_batch_norm(model), (torch.randn(2, 4, 12),)), model, torch.randn(3, 4, 12))


def test_closed_over_tensor_is_copied():
    scale = torch.randn(8)
    model = two_layers(lambda m, x: torch.relu(m.b(m.a(x))) * scale)
    fused, x = fuse(model, (torch.randn(2, 8),)), torch.randn(3, 8)
    expected = fused(x)
    scale.mul_(2)
    assert torch.equal(fused(x), expected)


def test_overwritten_base_of_a_view():
    def forward(m, x):
        left, right = x.clone().relu().chunk(2, 1)
        base = left._base if left._base is not None else left
        hidden = m.a(left)
        base.neg_()
        return torch.cat([m.b(hidden), right], 1)

    model = two_layers(forward)
    fused = fuse(model, (torch.randn(2, 16),))
    assert_equal(fused, model, torch.randn(3, 16))


def test_value_overwritten_through_a_slice():
    def forward(m, x):
        y = m.relu(m.a(x))
        z = m.b(y)
        y[:, :2].add_(1)
        return m.c(z) + y.sigmoid()

    model = Reads(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1), relu=nn.ReLU())
    x = torch.randn(2, 4, 5, 5)
    fused = fuse(model.eval(), (x,))
    assert fused.report.choice == "fused"
    assert_equal(fused, model, x)


def test_value_overwritten_through_a_chunk():
    def forward(m, x):
        y = m.relu(x)
        z = m.a(y)
        left, _ = y.chunk(2, dim=1)
        left.add_(1)
        return m.b(z) + y

    model = Reads(forward, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), relu=nn.ReLU()).eval()
    x = torch.randn(2, 4, 5, 5)
    fused = fuse(model, (x,))
    assert fused.report.choice == "fused"
    assert_equal(fused, model, x)


def test_constants_are_read_in_float64():
    model = two_layers(lambda m, x: m.b(m.a(x) * 0.1)).double()
    fused = fuse(model, (torch.randn(2, 8).double(),))
    assert fused.report.choice == "fused"
    assert fused.report.max_relative_error < 1e-12


def test_added_size_is_no_branch():
    model = Reads(lambda m, x: m.b(m.a(x) + x.shape[0]), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert_equal(fuse(model.eval(), (torch.randn(8, 3),)), model, torch.randn(5, 3))


@pytest.mark.parametrize(
    "arrange", [lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.mT, lambda x: x[::2]]
)
def test_images_in_any_layout(arrange):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 3, 1)).eval()
    x = arrange(torch.randn(4, 3, 6, 6))
    assert_equal(fuse(model, (x,)), model, x)


def test_shared_weights_within_a_chain():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2)), nn.Conv2d(3, 3, 3)).eval()
    model[1].weight = model[0].weight
    fused = fuse(model, (torch.randn(2, 3, 5, 5),))
    assert fused.report.chains[0].choice == "merge"
    assert_equal(fused, model, torch.randn(3, 3, 5, 5))


def test_shared_weights_across_chains():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared, nn.Linear(4, 4)).eval()
    fused = fuse(model, (torch.randn(2, 4),))
    assert [chain.choice for chain in fused.report.chains] == ["merge", "merge"]
    assert_equal(fused, model, torch.randn(3, 4))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 5e-2)])
def test_other_dtypes(network, images, dtype, tolerance):
    linearize(network.eval(), ["relu1", "gelu"])
    fused = fuse(network.to(dtype), (images.to(dtype),))
    assert fused(images.to(dtype)).dtype == dtype
    assert_equal(fused, network, images.to(dtype), tolerance=tolerance)


@pytest.mark.slow
def test_branches_of_coincidentally_equal_size_are_kept():
    model = Reads(
        lambda m, x: m.c(m.b(m.a(x) + m.d(x))),
        a=nn.Conv2d(3, 4, 2, stride=2),
        d=nn.Conv2d(3, 4, 1, stride=2),
        b=nn.Conv2d(4, 9, 1),
        c=nn.Conv2d(9, 2, 1),
    )
    x = torch.randn(2, 3, 8, 8)
    fused = fuse(model.eval(), (x,))
    assert "different sizes" in fused.report.chains[0].note
    assert fused.report.chains[0].choice == "split"
    assert_equal(fused, model, x)


@pytest.mark.gpu
@pytest.mark.measured
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_candidates_on_a_gpu(dtype):
    model, x = inverted_residual(channels=32, size=28)
    model, x = model.to("cuda", dtype), x.to("cuda", dtype)
    fused = fuse(model, (x,))
    assert {"keep", "merge", "kernel", "masked"} <= set(fused.report.chains[0].candidates)
    assert_equal(fused, model, x, tolerance=1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.slow
def test_nothing_is_timed_without_measure(monkeypatch):
    model, x = inverted_residual()
    monkeypatch.setattr(pricing, "measure_times", Mock(side_effect=AssertionError("timed")))
    monkeypatch.setattr(choosing, "measure_samples", Mock(side_effect=AssertionError("timed")))
    fused = fuse(model, (x,), measure=False)
    assert (fused.report.choice, fused.report.speedup, fused.report.milliseconds) == ("fused", None, {})
    (chain,) = fused.report.chains
    assert chain.choice == "merge"
    assert all(candidate.milliseconds is None for candidate in chain.candidates.values())
    assert "not measured" in str(fused.report)
    assert_equal(fused, model, x)


def test_model_without_chains(images):
    model = Reads(lambda m, x: F.relu(x) * 2)
    fused = fuse(model.eval(), (images,))
    assert torch.equal(fused(images), model(images))
    assert fused.report.chains == ()


def test_report_through_json(network, images):
    linearize(network.eval(), ["relu1", "gelu"])
    report = fuse(network, (images,)).report
    assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.to_dict()["speedup"] == 3.0


def test_printed_report_marks_the_choice(network, images):
    linearize(network.eval(), ["gelu"])
    text = str(fuse(network, (images,)).report)
    assert "fc1 … fc2" in text
    assert "* merge" in text
    assert "kept: fused, 3.00×" in text
    assert max(map(len, text.splitlines())) <= 100
