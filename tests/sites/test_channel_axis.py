"""Which axis holds the channels, against tensors whose entries say which channel they belong to."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from fastentropy.sites.axes import CHANNEL, OTHER, Factor, Note, channel_axis_of, reshaped
from fastentropy.sites.channel_axis import NO_AXIS, AxisTracker
from fastentropy.sites.observer import NoObserver
from fastentropy.sites.watcher import SiteWatcher
from tests._helpers.networks import Reads


def reshaped_axis(shape, axis, new_shape):
    """The channel axis after a reshape of a tensor of which only the channel axis is known; None if there is none."""
    axes = tuple((Factor(CHANNEL if place == axis else OTHER, size),) for place, size in enumerate(shape))
    found = channel_axis_of(reshaped(Note(axes), new_shape).axes)
    return None if found == NO_AXIS else found


def axes_along_which_labels_vary(shape, axes, new_shape):
    """Number the entries of some axes of a tensor, reshape it, and see along which of the new axes the numbers change."""
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    labels = torch.arange(math.prod(sizes)).view(sizes).expand(shape).reshape(new_shape)
    return {axis for axis in range(len(new_shape)) if (labels != labels.narrow(axis, 0, 1)).any()}


def oracle(shape, axis, new_shape):
    """The last axis that tells channels apart and nothing that lies before the channels; None if there is none."""
    channels = axes_along_which_labels_vary(shape, {axis}, new_shape)
    before = axes_along_which_labels_vary(shape, set(range(axis)), new_shape)
    return max(channels - before, default=None)


@st.composite
def groupings(draw, factors):
    """A shape that multiplies neighbouring factors, with axes of size 1 anywhere."""
    shape, start = [], 0
    while start < len(factors):
        stop = draw(st.integers(start + 1, len(factors)))
        shape += [1] * draw(st.integers(0, 1)) + [math.prod(factors[start:stop])]
        start = stop
    return shape + [1] * draw(st.integers(0, 1))


FACTORS = st.lists(st.sampled_from([2, 3, 4, 5]), min_size=1, max_size=5)


@given(st.data(), FACTORS)
def test_axes_that_are_merged_and_split(data, factors):
    shape, new_shape = data.draw(groupings(factors)), data.draw(groupings(factors))
    axis = data.draw(st.sampled_from([axis for axis, size in enumerate(shape) if size > 1]))
    assert reshaped_axis(shape, axis, new_shape) == oracle(shape, axis, new_shape)


@given(st.data(), FACTORS)
def test_any_reshape_gives_an_axis_of_the_channels_alone_or_none(data, factors):
    shape = data.draw(groupings(factors))
    new_shape = data.draw(groupings(data.draw(st.permutations(factors))))
    axis = data.draw(st.sampled_from([axis for axis, size in enumerate(shape) if size > 1]))
    found = reshaped_axis(shape, axis, new_shape)
    assume(found is not None)
    assert found in axes_along_which_labels_vary(shape, {axis}, new_shape)
    assert found not in axes_along_which_labels_vary(shape, set(range(axis)), new_shape)


@given(st.data(), FACTORS)
def test_the_same_shape_keeps_the_axis(data, factors):
    shape = data.draw(groupings(factors))
    axis = data.draw(st.sampled_from([axis for axis, size in enumerate(shape) if size > 1]))
    assert reshaped_axis(shape, axis, shape) == axis


@given(st.data(), FACTORS)
def test_a_single_channel_stays_an_axis_of_one(data, factors):
    """Every axis of size 1 holds it, or none."""
    shape, new_shape = data.draw(groupings(factors)), data.draw(groupings(factors))
    assume(1 in shape)
    found = reshaped_axis(shape, shape.index(1), new_shape)
    assert found is None or new_shape[found] == 1


@pytest.mark.parametrize("new_shape", [(0, 5, 7), (0, 35), (5, 7, 0), (0,), (7, 5, 0, 1)])
def test_an_empty_batch(new_shape):
    found = reshaped_axis((0, 5, 7), 1, new_shape)
    assert found is None or new_shape[found] in (5, 35)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode, torch.enable_grad])
def axis_of(request):
    """The neuron axis and its size where a function that a model computes goes into an activation, in each of the modes."""

    def find(function, *inputs, **modules):
        model = Reads(lambda m, *x: m.relu(function(m, *x)), relu=nn.ReLU(), **modules)
        watcher = SiteWatcher(model, NoObserver())
        watcher.attach()
        with request.param():
            model(*inputs)
        watcher.detach()
        (site,) = watcher.sites.values()
        return site.channel_axis, site.neurons

    return find


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda y: torch.stack([y, y]), (2, 5)),
        (lambda y: torch.stack([y, y], 1), (2, 5)),
        (lambda y: torch.stack([y, y], 2), (1, 5)),
        (lambda y: torch.stack([y, y], dim=-1), (1, 5)),
        (lambda y: torch.stack([y, y], dim=-4), (2, 5)),
        (lambda y: y.unbind(0)[1], (0, 5)),
        (lambda y: torch.unbind(y)[0], (0, 5)),
        (lambda y: y.unbind(2)[1], (1, 5)),
        (lambda y: y.unbind(-1)[1], (1, 5)),
        (lambda y: y[0], (0, 5)),
        (lambda y: y.select(0, 1), (0, 5)),
        (lambda y: y[:, :, 3], (1, 5)),
        (lambda y: y[..., -1], (1, 5)),
        (lambda y: y[:, :, 1, 2], (1, 5)),
        (lambda y: y.mean((2, 3)), (1, 5)),
        (lambda y: y.mean((-2, -1), keepdim=True), (1, 5)),
        (lambda y: y.mean(0), (0, 5)),
        (lambda y: y.sum(dim=[0, 2]), (0, 5)),
        (lambda y: y.amax(3), (1, 5)),
        (lambda y: y.max(dim=2).values, (1, 5)),
        (lambda y: y.max(2, keepdim=True)[0], (1, 5)),
        (lambda y: y.amin((0, -1)), (0, 5)),
        (lambda y: y.logsumexp(-1), (1, 5)),
        (lambda y: y.std(dim=3), (1, 5)),
        (lambda y: y.prod(2), (1, 5)),
        (lambda y: y.norm(dim=3), (1, 5)),
        (lambda y: y.chunk(2, dim=2)[1], (1, 5)),
        (lambda y: y.chunk(2, dim=1)[0], (1, 3)),
        (lambda y: y.split([2, 3], dim=1)[1], (1, 3)),
        (lambda y: y.tensor_split(3, dim=0)[1], (1, 5)),
        (lambda y: y.narrow(1, 1, 3), (1, 3)),
        (lambda y: y[:, [0, 2, 4]], (1, 3)),
        (lambda y: y.flip(1), (1, 5)),
        (lambda y: y.roll(1, 2), (1, 5)),
        (lambda y: F.pad(y, (1, 1, 2, 2)), (1, 5)),
        (lambda y: F.adaptive_avg_pool2d(y, 1), (1, 5)),
        (lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), (1, 5)),
        (lambda y: y.mT, (1, 5)),
        (lambda y: y.transpose(-3, -1), (3, 5)),
        (lambda y: y.flatten(2).transpose(1, 2), (2, 5)),
        (lambda y: y.unflatten(0, (1, 2)), (2, 5)),
        (lambda y: y.expand(2, 5, 6, 7), (1, 5)),
        (lambda y: y.repeat(1, 1, 2, 1), (1, 5)),
        (lambda y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)), (1, 5)),
        (lambda y: torch.where(y > 0, y, -y), (1, 5)),
        (lambda y: torch.zeros_like(y).copy_(y), (1, 5)),
        (lambda y: y.softmax(1), (1, 5)),
    ],
)
def test_after_a_convolution(axis_of, after, expected):
    assert axis_of(lambda m, x: after(m.conv(x)), torch.randn(2, 3, 6, 7), conv=nn.Conv2d(3, 5, 1)) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda y: y[0], (1, 6)),
        (lambda y: y[:, 0], (1, 6)),
        (lambda y: y.mean(1), (1, 6)),
        (lambda y: y.unbind(1)[0], (1, 6)),
        (lambda y: y.chunk(2, -1)[1], (2, 3)),
        (lambda y: torch.stack([y, y], -1), (2, 6)),
        (lambda y: y.view(2, 5, 3, 2), (3, 2)),
        (lambda y: y.view(2, 5, 3, 2).transpose(1, 2), (3, 2)),
        (lambda y: y.view(2, 5, 3, 2).transpose(1, 2).transpose(1, 2).reshape(2, 5, 6), (2, 6)),
        (lambda y: y.transpose(1, 2).unflatten(2, (1, 5)), (1, 6)),
        (lambda y: y.transpose(1, 2), (1, 6)),
        (lambda y: y.cumsum(1), (2, 6)),
        (lambda y: F.normalize(y, dim=-1), (2, 6)),
    ],
)
def test_after_a_linear_layer_on_tokens(axis_of, after, expected):
    assert axis_of(lambda m, x: after(m.fc(x)), torch.randn(2, 5, 3), fc=nn.Linear(3, 6)) == expected


@pytest.mark.parametrize(
    ("product", "shape", "expected"),
    [
        (lambda w, x: w @ x, (3, 7), (0, 5)),
        (lambda w, x: w @ x, (2, 3, 7), (1, 5)),
        (lambda w, x: w @ x, (2, 4, 3, 7), (2, 5)),
        (lambda w, x: torch.bmm(w.expand(2, 5, 3), x), (2, 3, 7), (1, 5)),
        (lambda w, x: torch.addmm(torch.zeros(7), w, x), (3, 7), (0, 5)),
        (lambda w, x: x @ w.t(), (7, 3), (1, 5)),
        (lambda w, x: x @ w.t(), (2, 7, 3), (2, 5)),
        (lambda w, x: x @ w.mT, (2, 4, 7, 3), (3, 5)),
        (lambda w, x: F.linear(x, w), (2, 4, 7, 3), (3, 5)),
        (lambda w, x: torch.einsum("oi,bin->bon", w, x), (2, 3, 7), (1, 5)),
        (lambda w, x: torch.einsum("bin,oi->bon", x, w), (2, 3, 7), (1, 5)),
        (lambda w, x: torch.einsum("oi,bni->bno", w, x), (2, 7, 3), (2, 5)),
        (lambda w, x: torch.einsum("bni,oi->bno", x, w), (2, 7, 3), (2, 5)),
        (lambda w, x: torch.einsum("bni,oi->obn", x, w), (2, 7, 3), (0, 5)),
        (lambda w, x: torch.einsum("oi,bihw->bohw", w, x), (2, 3, 6, 7), (1, 5)),
        (lambda w, x: torch.tensordot(x, w, dims=([1], [1])), (2, 3, 7), (2, 5)),
        (lambda w, x: w.mul(2).to(torch.float32) @ x, (2, 3, 7), (1, 5)),
        (lambda w, x: w.t().contiguous().t() @ x, (2, 3, 7), (1, 5)),
    ],
)
def test_a_product_has_the_channels_of_its_weight(axis_of, product, shape, expected):
    fc = nn.Linear(3, 5, bias=False)
    assert axis_of(lambda m, x: product(m.fc.weight, x), torch.randn(shape), fc=fc) == expected


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.GroupNorm(2, 6), (1, 6)),
        (nn.InstanceNorm2d(6), (1, 6)),
        (nn.InstanceNorm2d(6, affine=True), (1, 6)),
        (nn.LocalResponseNorm(2), (1, 6)),
        (nn.LayerNorm([6, 4, 5]), (1, 6)),
        (nn.LayerNorm([4, 5]), (1, 6)),
        (nn.RMSNorm([6, 4, 5]), (1, 6)),
        (nn.Sequential(nn.BatchNorm2d(6), nn.ChannelShuffle(3)), (1, 6)),
        (nn.Sequential(nn.Conv2d(6, 4, 1), nn.PixelShuffle(2)), (1, 1)),
        (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.AvgPool2d(2)), (1, 6)),
    ],
    ids=str,
)
def test_norms_after_a_convolution(axis_of, norm, expected):
    modules = {"conv": nn.Conv2d(3, 6, 1), "norm": norm.eval()}
    assert axis_of(lambda m, x: m.norm(m.conv(x)), torch.randn(2, 3, 4, 5), **modules) == expected


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_of_an_unknown_input_makes_the_last_axis(axis_of, norm):
    assert axis_of(lambda m, x: m.norm(x), torch.randn(2, 3, 4, 6), norm=norm(6)) == (3, 6)


def test_a_norm_of_channels_that_were_moved_to_the_end(axis_of):
    def permuted(m, x):
        return m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    assert axis_of(permuted, torch.randn(2, 3, 4, 5), conv=nn.Conv2d(3, 6, 1), norm=nn.LayerNorm(6)) == (1, 6)


def test_an_embedding_with_positions_has_the_last_axis(axis_of):
    modules = {"tokens": nn.Embedding(11, 6), "positions": nn.Embedding(7, 6)}
    tokens = torch.randint(11, (2, 7))
    assert axis_of(lambda m, x: m.tokens(x) + m.positions(torch.arange(7)), tokens, **modules) == (2, 6)


def test_channels_shuffled_by_hand(axis_of):
    def shuffled(m, x):
        y = m.conv(x)
        return y.view(2, 3, 2, 4, 5).transpose(1, 2).contiguous().view(2, 6, 4, 5)

    assert axis_of(shuffled, torch.randn(2, 3, 4, 5), conv=nn.Conv2d(3, 6, 1, groups=3)) == (1, 6)


def test_patches_and_a_class_token(axis_of):
    def tokens(m, x):
        y = m.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([m.norm.weight.expand(2, 1, 6), y], dim=1)

    assert axis_of(tokens, torch.randn(2, 3, 4, 5), conv=nn.Conv2d(3, 6, 2), norm=nn.LayerNorm(6)) == (2, 6)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_the_last_axis(axis_of, layer):
    assert axis_of(lambda m, x: m.rnn(x)[0], torch.randn(2, 5, 3), rnn=layer(3, 6, batch_first=True)) == (2, 6)


def test_attention_has_the_last_axis(axis_of):
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    assert axis_of(lambda m, x: m.attention(x, x, x)[0], torch.randn(2, 5, 6), attention=attention) == (2, 6)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_interpolation_gives_the_same_bits_while_it_is_followed(mode, context):
    x = torch.randn(2, 5, 7, 9)
    with context():
        expected = F.interpolate(x, size=(13, 11), mode=mode)
        with AxisTracker():
            actual = F.interpolate(x, size=(13, 11), mode=mode)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 6, 3),
        nn.GroupNorm(1, 3),
        nn.LayerNorm([3, 8, 8]),
        nn.RMSNorm([3, 8, 8]),
        nn.BatchNorm2d(3),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 16, batch_first=True)),
        nn.Sequential(nn.Flatten(2), nn.LSTM(64, 5)),
        nn.Softmax(1),
    ],
    ids=lambda module: type(module).__name__ if not isinstance(module, nn.Sequential) else type(module[1]).__name__,
)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_outputs_are_the_same_bits_while_they_are_followed(module, context):
    x = torch.randn(2, 3, 8, 8)
    module.eval()
    with context():
        expected = module(x)
        with AxisTracker(module.parameters()):
            actual = module(x)
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(left, right) for left, right in zip(leaves(actual), leaves(expected), strict=True))


def test_unknown_tensors():
    tracker = AxisTracker()
    assert [tracker.axis_of(torch.zeros([2] * ndim)) for ndim in (1, 2, 3, 4, 5)] == [None] * 5


def test_a_view_is_known_by_its_place_in_memory():
    conv = nn.Conv2d(3, 5, 1)
    with torch.no_grad(), AxisTracker(conv.parameters()) as tracker:
        y = conv(torch.randn(2, 3, 4, 6)).permute(0, 2, 3, 1)
    assert tracker.axis_of(y) == 3
    assert tracker.axis_of(y.detach()) == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_discovery_changes_no_bit_of_a_composed_operator(mode):
    import torch._decomp  # registers decompositions in Python that round differently

    model = Reads(lambda m, x: m.relu(F.interpolate(x, size=(11, 13), mode="bilinear")), relu=nn.ReLU())
    x = torch.randn(1, 3, 7, 9)
    with mode():
        expected = model(x)
        watcher = SiteWatcher(model, NoObserver())
        watcher.attach()
        assert torch.equal(model(x), expected)
        watcher.detach()
