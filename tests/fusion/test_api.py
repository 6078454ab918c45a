"""A fused model is the model, faster, and the model itself is never touched."""

import copy
import json
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastentropy import FusionReport, fuse, linearize, load
from fastentropy.fusion import api, planner, serialization, verification
from fastentropy.fusion.chains import finding
from fastentropy.fusion.chains.elements import BorderCorrected, operators
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot


@pytest.fixture(autouse=True)
def counted_times(request, monkeypatch):
    """Without measuring: the fewer operators the better, and the fused form before the others."""
    if "measured" in request.keywords:
        return
    price = {"original": 3.0, "folded": 2.0, "fused": 1.0}
    monkeypatch.setattr(api, "measure_times", lambda functions: {key: price[key[0]] for key in functions})
    monkeypatch.setattr(planner, "measured", lambda forms, inputs: {key: len(operators(f)) for key, f in forms.items()})


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
    assert sum("conv2d" in name or "linear" in name for name in called) == 1
    assert not any("batch_norm" in name for name in called)


@pytest.mark.parametrize("slowest", ["original", "folded", "fused"])
def test_what_is_slower_is_not_kept(network, images, monkeypatch, slowest):
    times = {"original": 1.0, "folded": 1.1, "fused": 1.2, slowest: 9.0}
    monkeypatch.setattr(api, "measure_times", lambda functions: {key: times[key[0]] for key in functions})
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


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)), (16,)),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)), (3, 6, 6)),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 5, 3)), (1, 6, 6)),
        (nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 2)), (1, 4, 4)),
    ],
)
def test_inputs_without_a_batch(model, shape):
    x = torch.randn(shape)
    assert_equal(fuse(model.eval(), (x,)), model, x)


def test_a_batch_size_that_the_model_refuses_is_not_asked_of_it():
    model = Reads(lambda m, x: m.b(m.a(x.view(-1, 4, 3).mean(1))), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    fused = fuse(model.eval(), (torch.randn(8, 3),))
    assert_equal(fused, model, torch.randn(8, 3))


def test_a_size_that_it_was_not_fused_for_is_refused():
    model = Reads(lambda m, x: m.b(m.a(x)) * (2 if x.shape[-1] > 16 else 1), a=nn.Conv2d(2, 2, 1), b=nn.Conv2d(2, 2, 1))
    fused = fuse(model.eval(), (torch.randn(2, 2, 32, 32),))
    with pytest.raises(ValueError, match=r"has shape \[2, 2, 8, 8\], but this model was fused for \['any', 2, 32, 32\]"):
        fused(torch.randn(2, 2, 8, 8))


def layers(forward):
    """Two linear layers and what the forward does with them."""
    torch.manual_seed(0)
    return Reads(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()


@pytest.mark.parametrize(
    ("forward", "example", "other"),
    [
        (lambda m, x, k: m.b(m.a(x)) * k, 2.0, 3.0),
        (lambda m, x, flip: -m.b(m.a(x)) if flip else m.b(m.a(x)), False, True),
        (lambda m, x, mask: m.b(m.a(x)) if mask is None else m.b(m.a(x)) * mask, None, torch.ones(8)),
        (lambda m, x, k: m.b(m.a(x)) * k, torch.ones(8), 2.0),
    ],
)
def test_another_constant_is_refused_also_after_loading(forward, example, other, tmp_path):
    model, x = layers(forward), torch.randn(2, 8)
    fused = fuse(model, (x, example))
    assert_equal(fused, model, x, example)
    fused.save(tmp_path / "model.pt2")
    for each in (fused, load(tmp_path / "model.pt2")):
        with pytest.raises(ValueError, match="fuse it again"):
            each(x, other)


@pytest.mark.parametrize(
    ("forward", "dynamic", "other"),
    [
        (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] % 4 == 0 else 1), False, (4, 6, 8)),
        (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] > 1 else 1), False, (1, 6, 8)),
        (lambda m, x: m.b(m.a(x)) * (2 if x.shape[0] == x.shape[1] else 1), True, (5, 5, 8)),
        (lambda m, x: m.b(m.a(x)) * (2 if x.shape[1] > 1 else 1), True, (3, 1, 8)),
        (lambda m, x: m.b(m.a(x)) if x.shape[0] > 1 else m.b(m.a(x))[0], False, (1, 6, 8)),
        (lambda m, x: m.b(m.a(x)).argmax(-1) * (-1 if x.shape[0] == 1 else 1), False, (1, 6, 8)),
    ],
)
def test_a_size_at_which_the_model_goes_another_way_is_refused_also_after_loading(forward, dynamic, other, tmp_path):
    model, x = layers(forward), torch.randn(3, 6, 8)
    fused = fuse(model, (x,), dynamic_sizes=dynamic)
    fused.save(tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(fused(x), model(x)) or (fused(x) - model(x)).abs().max() < 1e-5
    for each in (fused, load(tmp_path / "model.pt2")):
        with pytest.raises(ValueError, match="fuse it again"):
            each(torch.randn(other))


@pytest.mark.parametrize(
    ("layer", "forward", "shape"),
    [
        (nn.Conv2d, lambda m, x: m.b(m.a(x / 255.0 - 0.5)), (2, 4, 19, 19)),
        (nn.Conv2d, lambda m, x: m.b(m.a(F.avg_pool2d(x, 2))), (2, 4, 19, 19)),
        (nn.Linear, lambda m, x: m.b(m.a(x * 2.0)), (2, 7, 4)),
    ],
)
def test_scales_before_what_fixes_the_channels_may_have_free_sizes(layer, forward, shape):
    options = (4, 4, 3) if layer is nn.Conv2d else (4, 4)
    model = Reads(forward, a=layer(*options), b=layer(*options)).eval()
    fused = fuse(model, (torch.randn(shape),), dynamic_sizes=True)
    for size in (20, 23):
        assert_equal(fused, model, torch.randn([size if n > 6 else n for n in shape]))


@pytest.mark.parametrize("size", [9, 10, 11, 12, 15])
def test_a_border_that_only_some_sizes_have_is_seen(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 2, padding="same"), nn.Conv1d(4, 4, 1, stride=3)).eval()
    fused = fuse(model, (torch.randn(2, 4, 10),), dynamic_sizes=True)
    assert_equal(fused, model, torch.randn(2, 4, size))


def test_more_padding_than_a_transposed_kernel_has_taps():
    model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, padding=3), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)).eval()
    assert_equal(fuse(odd(model), (torch.randn(2, 4, 12),)), model, torch.randn(3, 4, 12))


def test_a_tensor_that_the_code_has_in_reach_is_not_shared():
    scale = torch.randn(8)
    model = layers(lambda m, x: torch.relu(m.b(m.a(x))) * scale)
    fused, x = fuse(model, (torch.randn(2, 8),)), torch.randn(3, 8)
    expected = fused(x)
    scale.mul_(2)
    assert torch.equal(fused(x), expected)


def test_a_base_that_is_written_over_while_its_view_is_read():
    def forward(m, x):
        left, right = x.clone().relu().chunk(2, 1)
        base = left._base if left._base is not None else left
        hidden = m.a(left)
        base.neg_()
        return torch.cat([m.b(hidden), right], 1)

    model = layers(forward)
    fused = fuse(model, (torch.randn(2, 16),))
    assert_equal(fused, model, torch.randn(3, 16))


def test_constants_are_read_in_float64():
    model = layers(lambda m, x: m.b(m.a(x) * 0.1)).double()
    fused = fuse(model, (torch.randn(2, 8).double(),))
    assert fused.report.choice == "fused"
    assert fused.report.max_relative_error < 1e-12


def test_a_copy_is_saved_like_the_model(network, images, tmp_path):
    fused = copy.deepcopy(fuse(network.eval(), (images,)))
    fused.save(tmp_path / "model.pt2")
    assert_equal(load(tmp_path / "model.pt2"), network, images)


def test_a_model_that_was_converted_after_fusing_is_not_saved(network, images, tmp_path):
    fused = fuse(network.eval(), (images,)).double()
    with pytest.raises(ValueError, match=r"was converted from torch\.float32 on cpu to torch\.float64 on cpu after fusing"):
        fused.save(tmp_path / "model.pt2")


def test_fused_in_inference_mode_it_may_be_differentiated(network, images):
    with torch.inference_mode():
        fused = fuse(network.eval(), (images,))
    x = images.clone().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (None, {}, "model must be a torch.nn.Module, not a NoneType"),
        (nn.Linear(2, 2).eval(), {"tolerance": "a"}, "tolerance must be a relative error of 0 or more, not 'a'"),
        (nn.Linear(2, 2).eval(), {"tolerance": -1.0}, "tolerance must be a relative error of 0 or more, not -1.0"),
        (nn.Linear(2, 2).eval(), {"tolerance": float("nan")}, "tolerance must be a relative error of 0 or more, not nan"),
    ],
)
def test_what_is_no_model_and_no_tolerance_is_refused(model, options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        fuse(model, (torch.randn(2, 2),), **options)


def test_a_model_that_updates_its_buffers_is_refused_and_left_alone():
    def forward(m, x):
        m.calls += 1
        return m.b(m.a(x))

    model = Reads(forward, a=nn.Linear(2, 2), b=nn.Linear(2, 2)).eval()
    model.register_buffer("calls", torch.zeros(()))
    with pytest.raises(ValueError, match="the model updates calls as it runs"):
        fuse(model, (torch.zeros(3, 2),))
    assert model.calls == 0


def test_a_value_written_through_a_view_is_read_in_time():
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


def test_a_value_written_through_one_half_of_it_is_read_in_time():
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


def test_adding_a_size_is_not_adding_a_branch():
    model = Reads(lambda m, x: m.b(m.a(x) + x.shape[0]), a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    assert_equal(fuse(model.eval(), (torch.randn(8, 3),)), model, torch.randn(5, 3))


def test_several_and_nested_inputs():
    model = Reads(lambda m, x, pair: m.b(m.a(x)) + pair["bias"], a=nn.Linear(3, 4), b=nn.Linear(4, 5))
    inputs = (torch.randn(2, 3), {"bias": torch.randn(2, 5)})
    assert_equal(fuse(model.eval(), inputs), model, torch.randn(4, 3), {"bias": torch.randn(4, 5)})


@pytest.mark.parametrize("others", [(None,), (3,), (2.5, False), (torch.tensor(2.0),), (None, "negated")])
def test_inputs_that_are_not_tensors(others, tmp_path):
    def forward(m, x, factor, sign=True):
        y = m.b(m.a(x)) if factor is None else m.b(m.a(x)) * factor
        return y if sign is True else -y

    model = Reads(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).eval()
    fused = fuse(model, (torch.randn(2, 3), *others))
    assert fused.report.choice == "fused"
    assert_equal(fused, model, torch.randn(5, 3), *others)
    fused.save(tmp_path / "model.pt2")
    assert_equal(load(tmp_path / "model.pt2"), model, torch.randn(5, 3), *others)


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_inputs_is_refused(network, images, count):
    fused = fuse(network.eval(), (images,))
    with pytest.raises(ValueError, match=f"fused for 1 input, but is called with {count}"):
        fused(*[images] * count)


@pytest.mark.parametrize(
    "arrange", [lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.mT, lambda x: x[::2]]
)
def test_images_in_any_layout(arrange):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 3, 1)).eval()
    x = arrange(torch.randn(4, 3, 6, 6))
    assert_equal(fuse(model, (x,)), model, x)


def test_operators_may_share_their_weights():
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2)), nn.Conv2d(3, 3, 3)).eval()
    model[1].weight = model[0].weight
    fused = fuse(model, (torch.randn(2, 3, 5, 5),))
    assert fused.report.chains[0].choice == "merge"
    assert_equal(fused, model, torch.randn(3, 3, 5, 5))


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


def inverted_residual(channels=3, size=9):
    """A network whose merged chain has a bias that depends on the position, and its input."""
    torch.manual_seed(0)
    expand, depthwise = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
    model = Reads(
        lambda m, x: m.relu(m.project(m.depthwise(m.expand(x))) + x).mean((2, 3)),
        expand=expand,
        depthwise=depthwise,
        project=nn.Conv2d(8, channels, 1),
        relu=nn.ReLU(),
    )
    return model.eval(), torch.randn(3, channels, size, size)


def ringed():
    """A network whose merged chain has a border that is recomputed, and its input."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers).eval(), torch.randn(3, 2, 11, 12)


@pytest.fixture
def merged(monkeypatch):
    """One operator is taken wherever there is one, however many operators its border needs."""

    def price(form):
        return sum(1 if isinstance(element, BorderCorrected) else len(operators((element,))) for element in form)

    monkeypatch.setattr(planner, "measured", lambda forms, inputs: {key: price(form) for key, form in forms.items()})


@pytest.mark.parametrize("build", [inverted_residual, ringed])
def test_a_fused_model_exports_again(build, merged):
    model, x = build()
    fused = fuse(model, (x,))
    assert fused.report.chains[0].choice == "merge"
    batch = torch.export.Dim.AUTO
    again = torch.export.export(fused, (x,), dynamic_shapes={"inputs": ({0: batch},)}).module()
    assert_equal(again, model, torch.randn(5, *x.shape[1:]))


@pytest.mark.parametrize("build", [inverted_residual, ringed])
def test_a_fused_model_compiles(build, merged):
    model, x = build()
    compiled = torch.compile(fuse(model, (x,)), backend="aot_eager", fullgraph=True)
    for batch in (3, 5):
        assert_equal(compiled, model, torch.randn(batch, *x.shape[1:]))


def test_a_package_for_this_machine_computes_the_same(tmp_path):
    model, x = inverted_residual()
    fuse(model, (x,)).save_package(tmp_path / "model.pt2")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    assert_equal(loaded, model, torch.randn(5, *x.shape[1:]))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("build", [inverted_residual, ringed])
def test_onnx_computes_the_same(build, tmp_path, merged):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = build()
    fuse(model, (x,)).save_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    name = session.get_inputs()[0].name
    run = lambda y: torch.from_numpy(session.run(None, {name: y.numpy()})[0])  # noqa: E731
    assert_equal(run, model, torch.randn(5, *x.shape[1:]))


def test_a_name_without_the_suffix_is_refused(network, images, tmp_path):
    with pytest.raises(ValueError, match=r"model\.pt: the name of a fused model must end in \.pt2"):
        fuse(network.eval(), (images,)).save(tmp_path / "model.pt")


@pytest.mark.gpu
@pytest.mark.measured
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_among_the_forms_on_a_gpu(dtype):
    model, x = inverted_residual(channels=32, size=28)
    model, x = model.to("cuda", dtype), x.to("cuda", dtype)
    fused = fuse(model, (x,))
    assert {"keep", "merge", "kernel", "masked"} <= set(fused.report.chains[0].candidates)
    assert_equal(fused, model, x, tolerance=1e-5 if dtype == torch.float32 else 5e-2)


def test_onnx_without_its_packages_is_refused_in_one_line(tmp_path, monkeypatch):
    model, x = inverted_residual()
    fused = fuse(model, (x,))
    monkeypatch.setattr(serialization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"^onnx, onnxscript, onnxruntime: not installed; pip install"):
        fused.save_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("save", ["save", "save_onnx"])
def test_a_file_that_computes_something_else_is_not_kept(save, tmp_path, monkeypatch):
    if save == "save_onnx":
        pytest.importorskip("onnxscript")
    model, x = inverted_residual()
    fused = fuse(model, (x,))
    (tmp_path / "model.pt2").write_bytes(b"old")
    monkeypatch.setattr(serialization, "largest_error", lambda actual, expected: 1.0)
    with pytest.raises(RuntimeError, match="was not kept"):
        getattr(fused, save)(tmp_path / "model.pt2")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_branches_whose_sizes_only_happen_to_agree_are_kept():
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


@pytest.mark.parametrize(("height", "width"), [(9, 9), (2, 5), (30, 17)])
def test_images_of_other_sizes(height, width):
    model, x = inverted_residual()
    fused = fuse(model, (x,), dynamic_sizes=True)
    assert fused.report.chains[0].choice == "merge"
    for batch in (1, 2, 4):
        assert_equal(fused, model, torch.randn(batch, 3, height, width))


def test_sequences_of_other_lengths(tmp_path):
    model = nn.Sequential(nn.Linear(4, 16), nn.Identity(), nn.Linear(16, 4), nn.ReLU()).eval()
    fused = fuse(model, (torch.randn(2, 7, 4),), dynamic_sizes=True)
    assert fused.report.chains[0].choice == "merge"
    assert_equal(fused, model, torch.randn(3, 19, 4))
    fused.save(tmp_path / "model.pt2")
    assert_equal(load(tmp_path / "model.pt2"), model, torch.randn(3, 5, 4))


def test_a_border_whose_place_is_not_known_is_left_to_the_chain():
    model, x = ringed()
    fused = fuse(model, (x,), dynamic_sizes=True)
    assert fused.report.chains[0].choice == "keep"
    assert "depends on the size" in fused.report.chains[0].note
    assert_equal(fused, model, torch.randn(2, 2, 5, 30))


def test_borders_to_be_trained_differ_and_the_rest_does_not(merged):
    model, x = ringed()
    fused = fuse(model, (x,), borders="train")
    with torch.no_grad():
        actual, expected = fused(x), model(x)
    torch.testing.assert_close(actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-5)
    assert fused.report.max_relative_error > 1e-3
    assert "differs at the border" in fused.report.chains[0].note
    first, second = model[0], model[1]
    with torch.no_grad():
        moved = F.conv2d(F.conv2d(x, first.weight, first.bias, padding=2), second.weight, second.bias).relu()
    torch.testing.assert_close(actual, moved, rtol=1e-4, atol=1e-5)


def test_borders_are_trained_and_saved(merged, tmp_path):
    model, x = ringed()
    fused = fuse(model, (x,), borders="train")
    target = model(x).detach()
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(fused(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    fused.save(tmp_path / "model.pt2")
    torch.testing.assert_close(load(tmp_path / "model.pt2")(x), fused(x))


def test_other_borders_are_refused(network, images):
    with pytest.raises(ValueError, match=r"^borders must be 'exact' or 'train', not 'near'$"):
        fuse(network.eval(), (images,), borders="near")


def test_without_measuring_nothing_is_timed(monkeypatch):
    model, x = inverted_residual()
    for module in (planner, api):
        monkeypatch.setattr(module, "measure_times", lambda *args, **options: raises(AssertionError("timed")))
    fused = fuse(model, (x,), measure=False)
    assert (fused.report.choice, fused.report.speedup, fused.report.milliseconds) == ("fused", None, {})
    (chain,) = fused.report.chains
    assert chain.choice == "merge"
    assert all(candidate.milliseconds is None for candidate in chain.candidates.values())
    assert "not measured" in str(fused.report)
    assert_equal(fused, model, x)


@pytest.mark.parametrize("fastest", ["contiguous", "channels_last"])
def test_everybody_gets_the_memory_format_in_which_they_are_fastest(network, images, monkeypatch, fastest, tmp_path):
    price = {"original": 3.0, "folded": 2.0, "fused": 1.0}
    prices = lambda functions: {key: price[key[0]] + (key[1] != fastest) / 2 for key in functions}  # noqa: E731
    monkeypatch.setattr(api, "measure_times", prices)
    fused = fuse(network.eval(), (images,))
    assert fused.report.milliseconds == price
    assert set(fused.report.memory_formats.values()) == {fastest}
    images = torch.randn(4, 1, 5, 5)
    assert_equal(fused, network, images)
    fused.save(tmp_path / "model.pt2")
    weights = [w for m in (fused, load(tmp_path / "model.pt2")) for w in m.buffers() if w.ndim == 4 and min(w.shape[1:]) > 1]
    assert all(w.is_contiguous() == (fastest == "contiguous") for w in weights)


def test_a_model_whose_views_need_contiguous_values_stays_contiguous():
    model = Reads(lambda m, x: m.c(m.b(m.relu(m.a(x))).view(x.shape[0], -1)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3))
    model.c, model.relu = nn.Linear(4 * 5 * 5, 3), nn.ReLU()
    x = torch.randn(2, 3, 9, 9)
    fused = fuse(model.eval(), (x,))
    assert_equal(fused, model, x)


def test_layers_of_two_chains_may_share_their_weights():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.ReLU(), shared, nn.Linear(4, 4)).eval()
    fused = fuse(model, (torch.randn(2, 4),))
    assert [chain.choice for chain in fused.report.chains] == ["merge", "merge"]
    assert_equal(fused, model, torch.randn(3, 4))


def test_sparse_weights_are_refused_in_one_line_or_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight = nn.Parameter(model[1].weight.detach().to_sparse(), requires_grad=False)
    x, before = torch.randn(2, 4), model[1].weight.to_dense()
    assert_equal_or_refused(model, x)
    assert model[1].weight.layout is torch.sparse_coo
    assert torch.equal(model[1].weight.to_dense(), before)


def test_quantised_layers_are_refused_in_one_line_or_left_alone():
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


def test_an_archive_with_pickled_inputs_is_refused(network, images, tmp_path):
    torch.export.save(torch.export.export(network.eval(), (images,)), tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match="may hold a pickle"):
        load(tmp_path / "plain.pt2")


class Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize(
    "entry", ["model/data/weights/model.pt", "model/data/constants/model.pt", "model/data/weights/weight_0.pt"]
)
def test_a_pickle_slipped_into_an_archive_is_never_read(network, images, tmp_path, entry):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    torch.save(Mark(tmp_path / "executed"), tmp_path / "pickle")
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(tmp_path / "pickle", entry)
    with pytest.raises(ValueError, match="may hold a pickle"):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_weights_that_are_called_pickles_are_never_read(network, images, tmp_path):
    path = tmp_path / "model.pt2"
    fuse(network.eval(), (images,)).save(path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "forged.pt2", "w") as forged:
        for name in archive.namelist():
            forged.writestr(name, archive.read(name).replace(b'"use_pickle": false', b'"use_pickle": true'))
    with pytest.raises(ValueError, match="is a pickled object"):
        load(tmp_path / "forged.pt2")


def test_a_file_stays_as_it_was_where_saving_fails(network, images, tmp_path, monkeypatch):
    fused, path = fuse(network.eval(), (images,)), tmp_path / "model.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch.export, "save", lambda *args, **options: raises(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fused.save(path)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_an_archive_in_an_older_layout_is_never_read(tmp_path):
    torch.save(Mark(tmp_path / "executed"), tmp_path / "pickle")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.15")
        archive.writestr("serialized_exported_program.json", "{}")
        for name in ("state_dict", "constants", "example_inputs"):
            archive.write(tmp_path / "pickle", f"serialized_{name}.pt")
    with pytest.raises(ValueError, match="may hold a pickle"):
        load(tmp_path / "old.pt2")
    assert not (tmp_path / "executed").exists()


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
        (lambda m: m, (torch.zeros(0, 1, 5, 5),), "a batch of no samples"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_the_model_left_alone(network, change, inputs, text):
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
        (lambda m, x: raises(TypeError("first\nsecond")), "does not run on example_inputs: first second$"),
        (lambda m, x: raises(AssertionError()), "does not run on example_inputs: AssertionError"),
    ],
)
def test_a_model_that_cannot_be_traced_is_refused_in_one_line_and_left_alone(forward, text):
    model = Reads(forward, a=nn.Linear(3, 3)).eval()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text) as raised:
        fuse(model, (torch.ones(2, 3),))
    assert "\n" not in str(raised.value)
    assert_unchanged(model, before)


def test_a_model_that_is_not_a_function_of_its_inputs_is_refused():
    model = Reads(lambda m, x: m.b(m.a(x)) + torch.rand_like(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="differs from the model by"):
        fuse(model.eval(), (torch.ones(2, 3),))


def doubled(chain):
    """A chain with another function."""
    return tuple(replace(element, weight=2 * element.weight) if hasattr(element, "weight") else element for element in chain)


@pytest.mark.parametrize("wrong", [["fc1"], ["conv1"], ["conv1", "fc1"]])
def test_a_chain_that_would_change_the_outputs_is_left_as_it_was_and_reported(network, images, monkeypatch, wrong):
    linearize(network.eval(), ["relu1", "gelu"])
    plan_chain = api.plan_chain

    def plan_wrongly(chain, *arguments, **options):
        form, report = plan_chain(chain, *arguments, **options)
        return doubled(chain.elements) if chain.names[0] in wrong else form, report

    monkeypatch.setattr(api, "plan_chain", plan_wrongly)
    fused = fuse(network, (images,))
    assert_equal(fused, network, images)
    left = {chain.names[0]: chain.note.startswith("left as it was") for chain in fused.report.chains}
    assert left == {name: name in wrong for name in ("conv1", "fc1")}


def test_a_wrong_fold_is_not_kept(network, images, monkeypatch):
    linearize(network.eval(), ["gelu"])
    fold = finding.fold
    monkeypatch.setattr(finding, "fold", lambda chain: doubled(fold(chain)))
    assert_equal(fuse(network, (images,)), network, images)


@pytest.mark.parametrize("error", [1.0, float("inf"), float("nan")])
def test_nothing_is_returned_that_is_not_proven_equal(network, images, monkeypatch, error):
    monkeypatch.setattr(verification, "relative_error", lambda actual, expected: error)
    with pytest.raises(RuntimeError, match="differs from the model by"):
        fuse(network.eval(), (images,))


def test_a_fold_that_overflows_is_not_kept():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=1e-12)).half().eval()
    model[1].running_var.fill_(1e-6)
    with torch.no_grad():
        model[0].weight.mul_(2000)
        model[1].weight.fill_(1e-3)
        model[1].weight.mul_(100)
    x = torch.randn(2, 2, 4, 4).half() * 1e-3
    fused = fuse(model, (x,))
    assert torch.isfinite(fused(x)).all()


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
