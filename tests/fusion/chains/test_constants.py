"""What a network computes from its own parameters is one constant, so that chains go on behind it, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

import fastentropy as fe
from fastentropy.fusion.chains.constants import CONSTANT_PREFIX, MAX_ELEMENTS, PARAMETER_PREFIX, fold_constants
from fastentropy.fusion.chains.nodes import weight_owner
from tests._helpers.networks import Holder, Reads
from tests._helpers.operators import SEEDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attribute"),  # a pruning mask sets its weight in each call
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated"),
]

IMAGES = torch.randn(2, 4, 7, 5, generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """A convolution whose weight has the mean 0 and the variance 1 in each channel, as in big transfer's ResNets."""

    def forward(self, x):
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scale(nn.Module):
    """Scale each channel by a parameter that is reshaped in each call, as LayerScale does."""

    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x):
        return x * self.gamma.exp().view(1, -1, 1, 1)


class Blur(nn.Module):
    """Blur each channel with one kernel that is made in each call."""

    def forward(self, x):
        taps = torch.tensor([1.0, 2.0, 1.0])
        kernel = (torch.outer(taps, taps) / 16).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


def masked(layer):
    return prune.random_unstructured(layer, "weight", 0.4)


WRAPS = {
    "plain": lambda layer: layer,
    "weight norm": parametrizations.weight_norm,
    "old weight norm": torch.nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "pruning mask": masked,
}


@st.composite
def networks(draw):
    """Draw a network that is one chain, the names of its layers, and a number of spatial positions."""
    torch.manual_seed(draw(SEEDS))
    channels, layers, names = 4, [], []
    for _ in range(draw(st.integers(2, 4))):
        out = draw(st.sampled_from([1, 3, 4, 8]))
        kernel = draw(st.sampled_from([1, 1, 3]))
        kind = draw(st.sampled_from([nn.Conv2d, Standardised]))
        wraps = ["plain"] if kind is Standardised else list(WRAPS)
        layer = kind(channels, out, kernel, padding=kernel // 2, bias=draw(st.booleans()))
        names.append(str(len(layers)))
        layers.append(WRAPS[draw(st.sampled_from(wraps))](layer))
        between = draw(st.sampled_from(["nothing", "frozen batch norm", "scale", "blur"]))
        if between == "frozen batch norm":
            norm = FrozenBatchNorm2d(out)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.bias.normal_()
            layers.append(norm)
        elif between == "scale":
            layers.append(Scale(out))
        elif between == "blur":
            names.append(str(len(layers)))
            layers.append(Blur())
        channels = out
    return nn.Sequential(*layers).eval(), tuple(names)


def operators_of(fused):
    return [str(node.target) for node in fused.graph_module.graph.nodes if node.op == "call_function"]


def assert_equal(fused, model, *shape):
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@settings(max_examples=12)
@given(networks(), st.integers(3, 9), st.integers(3, 9))
def test_drawn_networks_are_one_chain(drawn, height, width):
    model, names = drawn
    fused = fe.fuse(model, (torch.randn(2, 4, height, width),), measure=False)
    assert [chain.names for chain in fused.report.chains] == [names]
    allowed = {"conv2d", "add", "add_", "addcmul", "slice", "copy_", "constant_pad_nd", "flatten", "linear", "unflatten"}
    assert {name.split(".")[1] for name in operators_of(fused)} <= allowed
    assert_equal(fused, model, 4, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRAPS, "standardised"])
def test_batch_norm_is_folded_into_a_computed_weight(name):
    torch.manual_seed(0)
    layer = Standardised(4, 6, 3) if name == "standardised" else WRAPS[name](nn.Conv2d(4, 6, 3))
    model = nn.Sequential(layer, nn.BatchNorm2d(6), nn.ReLU()).eval()
    fused = fe.fuse(model, (IMAGES,), measure=False)
    assert [name.split(".")[1].rstrip("_") for name in operators_of(fused)] == ["conv2d", "relu"]
    assert_equal(fused, model, 4, 7, 5)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.b(F.linear(x, m.a.weight.mul(2), m.a.bias)), ("a", "b")),
        (lambda m, x: m.b(x @ m.a.weight.t()), ("a", "b")),
        (lambda m, x: m.b(F.linear(x, m.a.weight + (m.b.weight @ m.a.weight)[:1])), ("a", "b")),
        (lambda m, x: m.b(F.linear(x, torch.ones(5, 4) / 4)), ("div", "b")),
        (lambda m, x: m.b(F.linear(x, torch.eye(5, 4) * 2.0)), ("mul", "b")),
        (lambda m, x: m.b(m.a(x) * m.a.bias.mean().item()), ("a", "b")),
        (lambda m, x: m.b(m.a(x) * m.a.bias.sigmoid()), ("a", "b")),
    ],
)
def test_a_chain_is_named_after_the_module_of_its_weight(forward, expected):
    model = Reads(forward, a=nn.Linear(4, 5), b=nn.Linear(5, 3)).eval()
    fused = fe.fuse(model, (torch.randn(2, 4),), measure=False)
    assert [chain.names for chain in fused.report.chains] == [expected]
    assert operators_of(fused) == ["aten.linear.default"]
    assert_equal(fused, model, 4)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a.b.weight", "a.b"),
        ("weight", "weight"),
        ("a.kernel", "a.kernel"),
        ("a.parametrizations.weight.original0", "a"),
        ("a.parametrizations.weight.0._u", "a"),
        ("a.parametrizations.kernel.original", "a.kernel"),
        ("parametrizations.weight.original", "weight"),
        ("a.weight_orig", "a"),
        ("a.weight_v", "a"),
        ("a.weights", "a.weights"),
    ],
)
def test_owner_of_a_weight(name, path):
    assert weight_owner(name) == path


def folded(function, x, **constants):
    """Return the graph of a function of the constants `v` and `w` after the folding, and the function."""
    constants = {"v": torch.randn(4, generator=torch.Generator().manual_seed(1)), **constants}
    model = Holder(function, **constants)
    free = {"x": {0: torch.export.Dim("batch", min=2)}}
    module = torch.export.export(model, (x,), dynamic_shapes=free).module(check_guards=False)
    fold_constants(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, model


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda m, x: x + m.v.exp().cumsum(0), ["add"]),
        (lambda m, x: x + m.v.split(2)[0].repeat(2), ["add"]),
        (lambda m, x: x * torch.arange(4) * torch.full((4,), 2.0).sqrt(), ["mul", "mul"]),
        (lambda m, x: x * m.v.max().item(), ["mul"]),
        (lambda m, x: [x * (w := m.v.neg()), x + w.neg()], ["mul", "add"]),
        (lambda m, x: x * m.v.neg().expand(x.shape[0], 4), ["expand", "mul"]),
        (lambda m, x: [x * (w := m.v.neg()), w], ["neg", "mul"]),
        (lambda m, x: [x * (w := m.v.neg()), w.expand(x.shape[0], 4)], ["neg", "mul", "expand"]),
        (lambda m, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), ["add"]),
        (lambda m, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]).add_(1), ["lift_fresh_copy", "detach", "add_", "add"]),
        (lambda m, x: x + torch.zeros(4).add_(m.v.neg()), ["zeros", "add_", "add"]),
        (lambda m, x: [x + (w := m.v.neg()), w.view(2, 2).mul_(2)][0], ["neg", "add", "view", "mul_"]),
        (lambda m, x: [w := m.v.neg(), w.view(2, 2).mul_(2), x + w][-1], ["neg", "view", "mul_", "add"]),
        (lambda m, x: x + m.v * torch.arange(x.shape[0])[:, None], ["arange", "unsqueeze", "mul", "add"]),
    ],
)
def test_only_what_is_constant_is_folded(function, left):
    module, model = folded(function, torch.randn(3, 4))
    names = [str(node.target).removeprefix("aten.").split(".")[0] for node in module.graph.nodes if node.op == "call_function"]
    assert [name for name in names if name not in ("slice", "sym_size")] == left
    for batch in (2, 5):
        x = torch.randn(batch, 4)
        for _ in range(2):  # a second call must not read what the first one has overwritten
            torch.testing.assert_close(module(x), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x + torch.randn(4) * m.v,
        lambda m, x: x + torch.rand_like(m.v),
        lambda m, x: x + F.dropout(m.v, 0.5, training=True),
        lambda m, x: x + F.alpha_dropout(m.v, 0.5, training=True),
        lambda m, x: x + torch.bernoulli(m.v.sigmoid()),
        lambda m, x: x + torch.normal(m.v, 1.0),
        lambda m, x: x + F.rrelu(-m.v.abs(), training=True),
        lambda m, x: x + m.v[torch.randperm(4)],
    ],
)
def test_random_values_stay_random(function):
    module, _ = folded(function, torch.randn(3, 4))
    x = torch.zeros(2, 4)
    assert not torch.equal(torch.cat([module(x) for _ in range(3)]), module(x).repeat(3, 1))


def test_uninitialised_memory_is_not_read():
    module, _ = folded(lambda m, x: x + torch.empty(4) * 0 + m.v.new_empty(4) * 0, torch.randn(3, 4))
    assert module.graph.find_nodes(op="call_function", target=torch.ops.aten.empty.memory_format)
    assert not [name for name, _ in module.named_buffers() if name.startswith(CONSTANT_PREFIX)]


def test_expanded_constants_stay_small():
    large = 2 * MAX_ELEMENTS // 4
    module, model = folded(lambda m, x: x + m.v.neg().expand(large, 4).sum(0), torch.randn(3, 4))
    names = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    assert names == ["aten.expand.default", "aten.sum.dim_IntList", "aten.add.Tensor"]
    assert sum(value.numel() for name, value in module.named_buffers() if name != "v") == 4
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), model(x))


def test_constants_have_their_own_memory():
    module, _ = folded(
        lambda m, x: x @ m.w.t() + x[:, :1] * m.w[0, :2].expand(3, 2).mean(0).sum(), torch.randn(3, 4), w=torch.randn(4, 4)
    )
    made = {name: value for name, value in module.named_buffers() if name.startswith(CONSTANT_PREFIX)}
    assert made
    storages = {value.untyped_storage().data_ptr() for value in module.buffers()}
    assert len(storages) == len(list(module.buffers()))
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in made.values())


def test_a_tensor_that_the_model_returns_is_new_in_each_call():
    model = Reads(lambda m, x: (m.a(x), m.a.weight.exp()), a=nn.Linear(4, 3)).eval()
    fused = fe.fuse(model, (torch.randn(2, 4),), measure=False)
    x = torch.randn(3, 4)
    fused(x)[1].fill_(7)
    torch.testing.assert_close(fused(x)[1], model.a.weight.exp())


def test_computed_weights_are_trained():
    """With borders="train", what is computed from parameters is trained, and what is computed from statistics is not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.Sigmoid(), FrozenBatchNorm2d(4), nn.Sigmoid()
    ).eval()
    fused = fe.fuse(model, (IMAGES,), measure=False, borders="train")
    trained = {name for name, _ in fused.graph_module.named_parameters()}
    assert {name for name in trained if name.startswith(PARAMETER_PREFIX)}
    assert not {name for name in trained if name.startswith(CONSTANT_PREFIX)}
    fused(IMAGES).sum().backward()
    assert all(value.grad is not None for value in fused.graph_module.parameters())


def test_saved_and_loaded(tmp_path):
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.ReLU(), Blur(), Scale(6), nn.Conv2d(6, 2, 1)
    ).eval()
    fused = fe.fuse(model, (IMAGES,), measure=False)
    fused.save(tmp_path / "model.pt2")
    loaded = fe.load(tmp_path / "model.pt2")
    x = torch.randn(5, 4, 7, 5)
    assert torch.equal(loaded(x), fused(x))


def test_the_model_is_not_changed():
    model = nn.Sequential(masked(nn.Linear(4, 4)), parametrizations.spectral_norm(nn.Linear(4, 4))).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fe.fuse(model, (torch.randn(2, 4),), measure=False)
    with torch.no_grad():
        for value in fused.graph_module.buffers():
            value.fill_(3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
