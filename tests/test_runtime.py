"""A fused model is the model, faster, and the model itself is never touched."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import Reads, assert_unchanged, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastentropy import FusionReport, fuse, linearize, load
from fastentropy.fusion import plan, runtime
from fastentropy.fusion.affine import operators


@pytest.fixture(autouse=True)
def counted_times(request, monkeypatch):
    """Without measuring: the fewer operators the better, and the fused form before the others."""
    if "measured" in request.keywords:
        return
    price = {"original": 3.0, "folded": 2.0, "fused": 1.0}
    monkeypatch.setattr(runtime, "measure_times", lambda functions: {name: price[name] for name in functions})
    monkeypatch.setattr(plan, "_time_forms", lambda forms, inputs: {key: len(operators(f)) for key, f in forms.items()})


def odd(model, seed=0):
    """Batch norm with statistics as after a long training, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def assert_equal(fused, model, *inputs, tolerance=1e-5):
    with torch.no_grad():
        actual, expected = fused(*inputs), model(*inputs)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


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
    return odd(nn.Sequential(*layers)), draw(st.tuples(st.integers(5, 9), st.integers(5, 9)))


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


@settings(max_examples=25)
@given(networks(), st.sampled_from([1, 2, 3]))
def test_a_fused_network_equals_the_network_at_every_batch_size(drawn, batch):
    model, size = drawn
    try:
        model(torch.randn(1, 4, *size))
    except RuntimeError:
        return  # too small for its kernels
    fused = fuse(model, (torch.randn(batch, 4, *size),))
    assert fused.report.choice == "fused"
    for other in (1, 2, 5):
        assert_equal(fused, model, torch.randn(other, 4, *size))


@pytest.mark.measured
def test_a_linearised_network_is_merged_and_measured(network, images):
    linearize(network.eval(), ["relu1", "gelu"])
    fused = fuse(network, (images,))
    assert_equal(fused, network, images)
    assert [chain.names for chain in fused.report.chains] == [("conv1", "conv2"), ("fc1", "fc2")]
    assert set(fused.report.milliseconds) == {"original", "folded", "fused"}
    assert fused.report.milliseconds[fused.report.choice] == min(fused.report.milliseconds.values())
    assert fused.report.max_relative_error <= 1e-5


def test_fewer_operators_are_left(network, images):
    linearize(network.eval(), ["relu1", "relu2", "gelu"])
    graph = fuse(network, (images,)).graph_module.graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("conv2d" in name for name in called) == 1
    assert sum("linear" in name for name in called) == 1
    assert not any("batch_norm" in name for name in called)


@pytest.mark.parametrize("slowest", ["original", "folded", "fused"])
def test_what_is_slower_is_not_kept(network, images, monkeypatch, slowest):
    times = {"original": 1.0, "folded": 1.1, "fused": 1.2, slowest: 9.0}
    monkeypatch.setattr(runtime, "measure_times", lambda functions: times)
    fused = fuse(network.eval(), (images,))
    assert fused.report.choice == min(times, key=times.get)
    assert_equal(fused, network, images)


def test_the_model_is_not_changed_and_shares_no_memory(network, images):
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


def test_a_model_that_writes_over_its_input_leaves_the_examples_alone():
    model = nn.Sequential(nn.Hardswish(inplace=True), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)).eval()
    x = torch.randn(3, 2, 4, 4)
    before = x.clone()
    fused = fuse(model, (x,))
    assert torch.equal(x, before)
    assert_equal(fused, lambda y: model(y.clone()), before.clone())


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


def test_several_and_nested_inputs():
    model = Reads(lambda m, x, pair: m.b(m.a(x)) + pair["bias"], a=nn.Linear(3, 4), b=nn.Linear(4, 5))
    inputs = (torch.randn(2, 3), {"bias": torch.randn(2, 5)})
    assert_equal(fuse(model.eval(), inputs), model, torch.randn(4, 3), {"bias": torch.randn(4, 5)})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 5e-2)])
def test_other_dtypes(network, images, dtype, tolerance):
    linearize(network.eval(), ["relu1", "gelu"])
    fused = fuse(network.to(dtype), (images.to(dtype),))
    assert fused(images.to(dtype)).dtype == dtype
    assert_equal(fused, network, images.to(dtype), tolerance=tolerance)


def test_saving_and_loading_give_the_same_model_and_report(network, images, tmp_path):
    linearize(network.eval(), ["relu1"])
    fused = fuse(network, (images,))
    fused.save(tmp_path / "model.pt2")
    loaded = load(tmp_path / "model.pt2")
    assert torch.equal(loaded(images[:3]), fused(images[:3]))
    assert loaded.report == fused.report
    loaded.save(tmp_path / "again.pt2")
    assert torch.equal(load(tmp_path / "again.pt2")(images), fused(images))


def test_an_archive_with_pickled_inputs_is_refused(network, images, tmp_path):
    torch.export.save(torch.export.export(network.eval(), (images,)), tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match="holds pickled inputs"):
        load(tmp_path / "plain.pt2")


@pytest.mark.parametrize("damage", [lambda b: b"text", lambda b: b"", lambda b: b[:-100], lambda b: b[: len(b) // 2]])
def test_a_damaged_archive_is_refused_in_one_line(network, images, tmp_path, damage):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.pt2 is not a fused model") as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt2")


@pytest.mark.parametrize(
    ("change", "inputs", "text"),
    [
        (lambda m: m.train(), (torch.zeros(2, 1, 5, 5),), r"training mode.*call model\.eval\(\) first"),
        (lambda m: m, torch.zeros(2, 1, 5, 5), r"must be a tuple of positional inputs, not a Tensor: \(x,\)"),
        (lambda m: m, (torch.zeros(2, 3, 5, 5),), "does not run on example_inputs"),
        (lambda m: m, (), "does not run on example_inputs"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_the_model_left_alone(network, change, inputs, text):
    change(network.eval())
    before = snapshot(network)
    with pytest.raises(ValueError, match=text) as raised:
        fuse(network, inputs)
    assert "\n" not in str(raised.value)
    assert_unchanged(network, before)


def test_a_model_that_cannot_be_traced_is_refused_in_one_line():
    model = Reads(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(3, 3)).eval()
    with pytest.raises(ValueError, match="torch.export cannot trace Reads") as raised:
        fuse(model, (torch.ones(2, 3),))
    assert "\n" not in str(raised.value)


def test_a_wrong_result_is_never_returned(network, images, monkeypatch):
    linearize(network.eval(), ["gelu"])
    monkeypatch.setattr(runtime, "plan_chain", lambda chain, x, tolerance: (tuple(chain.elements[:0]) or _wrong(chain), None))
    with pytest.raises(RuntimeError, match="differs from the original by"):
        fuse(network, (images,))


def _wrong(chain):
    first, *others = chain.elements
    return (type(first)(first.weight * 2, *list(vars(first).values())[1:]), *others)


def test_a_model_without_chains_is_itself(images):
    model = Reads(lambda m, x: F.relu(x) * 2)
    fused = fuse(model.eval(), (images,))
    assert torch.equal(fused(images), model(images))
    assert fused.report.chains == ()


def test_the_report_is_json_and_reads_back(network, images):
    linearize(network.eval(), ["relu1", "gelu"])
    report = fuse(network, (images,)).report
    assert FusionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.to_dict()["speedup"] == 3.0


def test_the_printed_report_marks_the_choice(network, images):
    linearize(network.eval(), ["gelu"])
    text = str(fuse(network, (images,)).report)
    assert "fc1 … fc2" in text
    assert "* merge" in text
    assert "kept: fused, 3.00×" in text
    assert max(map(len, text.splitlines())) <= 100
