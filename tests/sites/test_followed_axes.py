"""Which axis holds the channels after operators that mix, move and merge axes, written down by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy.sites.channel_axis import NO_AXIS, AxisTracker

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.fixture(params=MODES, ids=lambda mode: mode.__name__)
def axis_after(request):
    """The channel axis after a function of the layer's output, and its size."""

    def find(layer, x, after):
        tracker = AxisTracker(layer.parameters())
        with request.param(), tracker.following():
            y = after(layer(x))
        axis = tracker.axis_of(y)
        return axis, None if axis in (None, NO_AXIS) else y.shape[axis]

    return find


def buffer_written(y, *index):
    """A buffer of twice the length, into a part of which `y` is written."""
    buffer = torch.zeros(2 * y.shape[0], *y.shape[1:])
    buffer[: y.shape[0]].copy_(y)
    return buffer[index] if index else buffer


def gat(y):
    source, target = nn.Linear(6, 1)(y), nn.Linear(6, 1)(y)
    return source + target.T


AFTER_CONV1D = {  # of [2, 6, 8]
    "graph right": (lambda y: y @ torch.rand(8, 8), (1, 6)),
    "graph right, other size": (lambda y: y @ torch.rand(8, 5), (1, 6)),
    "graph right, batched": (lambda y: y @ torch.rand(2, 8, 8), (1, 6)),
    "graph left": (lambda y: torch.rand(8, 8) @ y.transpose(1, 2), (2, 6)),
    "graph left, batched": (lambda y: torch.rand(2, 5, 8) @ y.mT, (2, 6)),
    "graph einsum": (lambda y: torch.einsum("ncl,lm->ncm", y, torch.rand(8, 5)), (1, 6)),
    "graph einsum, moved": (lambda y: torch.einsum("ncl,lm->nmc", y, torch.rand(8, 5)), (2, 6)),
    "graph einsum, batched": (lambda y: torch.einsum("ncl,nlm->ncm", y, torch.rand(2, 8, 5)), (1, 6)),
    "graph sparse": (lambda y: torch.sparse.mm(torch.rand(8, 8).to_sparse(), y[0].t()), (1, 6)),
    "frozen projection": (lambda y: y.mT @ torch.rand(6, 5), (2, 5)),
    "frozen projection left": (lambda y: torch.rand(5, 6) @ y, (1, 5)),
    "transpose_": (lambda y: y.transpose_(1, 2), (2, 6)),
    "swapaxes_": (lambda y: y.clone().swapaxes_(0, 1), (0, 6)),
    "t_": (lambda y: y[0].clone().t_(), (1, 6)),
    "unsqueeze_": (lambda y: y.unsqueeze_(1), (2, 6)),
    "squeeze_": (lambda y: y.unsqueeze(0).clone().squeeze_(0), (1, 6)),
    "real": (lambda y: torch.complex(y, y).real, (1, 6)),
    "imag": (lambda y: torch.complex(y, y).imag, (1, 6)),
    "view_as_real": (lambda y: torch.view_as_real(torch.complex(y, y)), (1, 6)),
    "view_as_real, one": (lambda y: torch.view_as_real(torch.polar(y.abs(), y))[..., 0], (1, 6)),
    "view_as_complex": (lambda y: torch.view_as_complex(torch.stack([y, y], -1)).abs(), (1, 6)),
    "rfft": (lambda y: torch.fft.rfft(y).abs(), (1, 6)),
    "fft of channels": (lambda y: torch.fft.fft(y, dim=1).real, (1, 6)),
    "stft": (lambda y: torch.fft.irfft(torch.fft.rfft(y, dim=2), n=8, dim=2), (1, 6)),
    "buffer": (lambda y: buffer_written(y), (1, 6)),
    "buffer, a view": (lambda y: buffer_written(y).transpose(1, 2), (2, 6)),
    "buffer, another part": (lambda y: buffer_written(y)[1:3], (1, 6)),
    "buffer, one": (lambda y: buffer_written(y)[3], (0, 6)),
    "cat": (lambda y: torch.cat([y, y, torch.rand(2, 1, 8)], 1), (1, 13)),
    "cat, unknown first": (lambda y: torch.cat([torch.rand(2, 6, 3), y], 2), (1, 6)),
    "index_select": (lambda y: y.index_select(1, torch.tensor([0, 3])), (1, 2)),
    "gather": (lambda y: y.gather(2, torch.zeros(2, 6, 3, dtype=torch.long)), (1, 6)),
    "advanced, positions": (lambda y: y[:, :, torch.tensor([0, 3])], (1, 6)),
    "advanced, batch": (lambda y: y[torch.tensor([[0, 1, 1]])], (2, 6)),
    "advanced, two": (lambda y: y[torch.tensor([0, 1]), :, torch.tensor([3, 4])], (1, 6)),
    "advanced, adjacent": (lambda y: y.mT[torch.tensor([0, 1]), torch.tensor([3, 4])], (1, 6)),
    "boolean": (lambda y: y.mT[torch.rand(2, 8) > 0.5], (1, 6)),
    "windows": (lambda y: y.unfold(2, 3, 2), (1, 6)),
    "movedim": (lambda y: y.movedim(1, -1), (2, 6)),
    "roll": (lambda y: y.roll(1, 1), (1, 6)),
    "pad": (lambda y: F.pad(y, (1, 1, 0, 2)), (1, 8)),
    "pad, circular": (lambda y: F.pad(y, (1, 2), mode="circular"), (1, 6)),
    "pad, reflect": (lambda y: F.pad(y, (1, 2), mode="reflect"), (1, 6)),
    "scatter_add": (lambda y: torch.zeros(2, 6, 3).scatter_add_(2, torch.zeros(2, 6, 8, dtype=torch.long), y), (1, 6)),
    "index_add": (lambda y: torch.zeros(9, 6).index_add_(0, torch.arange(8), y[1].t()), (1, 6)),
    "index_put": (lambda y: torch.zeros(3, 6, 8).index_put_((torch.tensor([0, 2]),), y), (1, 6)),
    "where": (lambda y: torch.where(y > 0, y, torch.zeros(())), (1, 6)),
    "sort": (lambda y: y.sort(2).values, (1, 6)),
    "topk": (lambda y: y.topk(3, 2)[0], (1, 6)),
    "glu": (lambda y: F.glu(y, 1), (1, 3)),
    "repeat_interleave": (lambda y: y.repeat_interleave(2, 0), (1, 6)),
    "max_pool1d": (lambda y: F.max_pool1d(y, 2), (1, 6)),
    "adaptive_max_pool1d": (lambda y: F.adaptive_max_pool1d(y, 1).squeeze(-1), (1, 6)),
    "lp_pool1d": (lambda y: F.lp_pool1d(y, 2, 2), (1, 6)),
    "normalize": (lambda y: F.normalize(y), (1, 6)),
    "instance_norm": (lambda y: F.instance_norm(y), (1, 6)),
    "flatten and back": (lambda y: y.reshape(12, 8).view(2, 6, 8), (1, 6)),
    "mixed and back": (lambda y: y.reshape(2, 48).view(2, 6, 8), (1, 6)),
    "batch and channels": (lambda y: y.reshape(12, 8), (None, None)),
    "heads merged into the batch": (lambda y: y.mT.reshape(2, 8, 3, 2).transpose(1, 2).reshape(6, 8, 2), (2, 2)),
    "spatial sum": (lambda y: y.sum(-1, keepdim=True), (1, 6)),
    "channel sum": (lambda y: y.sum(1), (None, None)),
    "gram matrix": (lambda y: (y @ y.mT).shape and y.mean(2), (1, 6)),
    "matrix by vector": (lambda y: y @ torch.rand(8), (1, 6)),
    "unsafe chunk": (lambda y: y.unsafe_chunk(2, 1)[1], (1, 3)),
    "as_strided": (lambda y: y.as_strided((2, 6, 4), (48, 8, 2)), (1, 6)),
    "diagonal": (lambda y: y.diagonal(0, 0, 2), (0, 6)),
    "numpy": (lambda y: y.detach().view_as(y), (1, 6)),
    "deepcopy": (lambda y: y.detach().clone(), (1, 6)),
}


@pytest.mark.parametrize("case", AFTER_CONV1D)
def test_after_a_convolution(axis_after, case):
    after, expected = AFTER_CONV1D[case]
    assert axis_after(nn.Conv1d(3, 6, 1), torch.randn(2, 3, 8), after) == expected


AFTER_CONV2D = {  # of [2, 12, 4, 6]
    "pixel_shuffle": (lambda y: F.pixel_shuffle(y, 2), (1, 3)),
    "pixel_unshuffle": (lambda y: F.pixel_unshuffle(y, 2), (1, 48)),
    "pixel_shuffle by hand": (
        lambda y: y.view(2, 3, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 8, 12),
        (1, 3),
    ),
    "depth to space, channels last": (
        lambda y: y.view(2, 2, 2, 3, 4, 6).permute(0, 3, 4, 1, 5, 2).reshape(2, 3, 8, 12),
        (1, 3),
    ),
    "channel_shuffle": (lambda y: F.channel_shuffle(y, 3), (1, 12)),
    "unfold": (lambda y: F.unfold(y, 2), (1, 48)),
    "fold": (lambda y: F.fold(F.unfold(y, 2), (4, 6), 2), (1, 12)),
    "grid_sample": (lambda y: F.grid_sample(y, torch.zeros(2, 3, 5, 2), align_corners=False), (1, 12)),
    "interpolate": (lambda y: F.interpolate(y, scale_factor=2, mode="bicubic"), (1, 12)),
    "windows": (
        lambda y: y.permute(0, 2, 3, 1).view(2, 2, 2, 3, 2, 12).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 12),
        (2, 12),
    ),
    "windows and back": (
        lambda y: (
            y.permute(0, 2, 3, 1)
            .view(2, 2, 2, 3, 2, 12)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(-1, 4, 12)
            .view(2, 2, 3, 2, 2, 12)
            .permute(0, 1, 3, 2, 4, 5)
            .reshape(2, 4, 6, 12)
        ),
        (3, 12),
    ),
    "flatten": (lambda y: y.flatten(1), (1, 288)),
    "avg_pool2d": (lambda y: F.avg_pool2d(y, 2), (1, 12)),
    "fractional_max_pool2d": (lambda y: F.fractional_max_pool2d(y, 2, output_size=2), (1, 12)),
    "channels_last": (lambda y: y.contiguous(memory_format=torch.channels_last), (1, 12)),
    "drop_path": (lambda y: y * torch.bernoulli(torch.full((2, 1, 1, 1), 0.5)), (1, 12)),
    "squeeze and excite": (lambda y: y * y.mean((2, 3), keepdim=True).sigmoid(), (1, 12)),
    "coordinates": (lambda y: torch.cat([y, torch.rand(2, 2, 4, 6)], 1), (1, 14)),
    "spatial attention": (lambda y: torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1), (1, 2)),
}


@pytest.mark.parametrize("case", AFTER_CONV2D)
def test_after_a_convolution_of_images(axis_after, case):
    after, expected = AFTER_CONV2D[case]
    assert axis_after(nn.Conv2d(3, 12, 1), torch.randn(2, 3, 4, 6), after) == expected


def attention(y, heads=2):
    q, k, v = (y.view(*y.shape[:2], heads, -1).transpose(1, 2) for _ in range(3))
    return (q @ k.mT).softmax(-1) @ v


AFTER_LINEAR = {  # of [2, 5, 6]
    "attention": (lambda y: attention(y), (3, 3)),
    "attention, merged": (lambda y: attention(y).transpose(1, 2).reshape(2, 5, 6), (2, 6)),
    "attention, one head": (lambda y: (y @ y.mT).softmax(-1) @ y, (2, 6)),
    "attention, bmm": (
        lambda y: (
            torch.bmm(
                torch.bmm(y.view(2, 5, 2, 3).transpose(1, 2).reshape(4, 5, 3), torch.rand(4, 3, 5)),
                y.view(2, 5, 2, 3).transpose(1, 2).reshape(4, 5, 3),
            )
            .view(2, 2, 5, 3)
            .transpose(1, 2)
            .reshape(2, 5, 6)
        ),
        (2, 6),
    ),
    "sdpa": (lambda y: F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None]), (3, 6)),
    "scores": (lambda y: y @ y.mT, (None, None)),
    "scores of heads": (lambda y: (q := y.view(2, 5, 2, 3).transpose(1, 2)) @ q.mT, (1, 2)),
    "linear attention": (lambda y: y.softmax(-1) @ (y.mT @ y), (2, 6)),
    "graph": (lambda y: torch.rand(5, 5) @ y, (2, 6)),
    "token shift": (lambda y: F.pad(y, (0, 0, 1, -1)), (2, 6)),
    "rotary": (lambda y: y * torch.rand(5, 6) + torch.cat([-y[..., 3:], y[..., :3]], -1) * torch.rand(5, 6), (2, 6)),
    "gated": (lambda y: y.chunk(2, -1)[0] * y.chunk(2, -1)[1].sigmoid(), (2, 3)),
    "last token": (lambda y: y[torch.arange(2), torch.tensor([3, 4])], (1, 6)),
    "tokens of experts": (lambda y: y.view(-1, 6)[torch.tensor([0, 4, 7])], (1, 6)),
    "cumsum": (lambda y: y.cumsum(1), (2, 6)),
    "outer product": (lambda y: torch.einsum("btc,btd->bcd", y, torch.rand(2, 5, 4)), (1, 6)),
    "scan": (lambda y: torch.stack([y[:, t] for t in range(5)], 1), (2, 6)),
    "list of steps": (lambda y: torch.stack(y.unbind(1)), (2, 6)),
}


@pytest.mark.parametrize("case", AFTER_LINEAR)
def test_after_a_linear_layer(axis_after, case):
    after, expected = AFTER_LINEAR[case]
    assert axis_after(nn.Linear(3, 6), torch.randn(2, 5, 3), after) == expected


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda y: y.squeeze(-1), (NO_AXIS, None)),
        (lambda y: y[..., 0], (NO_AXIS, None)),
        (lambda y: y.squeeze_(2), (NO_AXIS, None)),
        (lambda y: y.flatten(), (NO_AXIS, None)),
        (lambda y: y.view(2, 7), (NO_AXIS, None)),
        (lambda y: y.squeeze(-1) * 2 + 1, (NO_AXIS, None)),
        (lambda y: y.squeeze(-1).transpose(0, 1), (NO_AXIS, None)),
        (lambda y: y.squeeze(-1)[:, :3], (NO_AXIS, None)),
        (lambda y: y, (2, 1)),
        (lambda y: y.squeeze(-1).unsqueeze(-1), (2, 1)),
        (lambda y: y.squeeze(-1).view(2, 7, 1), (2, 1)),
        (lambda y: y + y.mT, (None, None)),
        (lambda y: y.squeeze(-1)[:, :, None] + y.squeeze(-1)[:, None], (None, None)),
        (lambda y: y.expand(2, 7, 3), (None, None)),
    ],
)
def test_a_single_channel(axis_after, after, expected):
    assert axis_after(nn.Linear(3, 1), torch.randn(2, 7, 3), after) == expected


def test_a_product_with_a_vector_of_weights_is_a_single_channel(axis_after):
    layer = nn.Linear(3, 1)
    assert axis_after(layer, torch.randn(2, 7, 3), lambda y: torch.randn(2, 7, 3) @ layer.weight[0]) == (NO_AXIS, None)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_instance_norm_of_one_channel(axis_after, batch):
    x = torch.randn(batch, 3, 8)
    assert axis_after(nn.Sequential(nn.Conv1d(3, 1, 1), nn.InstanceNorm1d(1)), x, lambda y: y) == (1, 1)
    assert axis_after(nn.InstanceNorm1d(1), x[:, :1], lambda y: y) == (1, 1)
    assert axis_after(nn.InstanceNorm1d(3), x, lambda y: y) == (1, 3)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 5, 4), (2, 3, 5, 4)])
def test_an_embedding_of_any_number_of_axes(axis_after, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    assert axis_after(nn.Embedding(9, 6), ids, lambda y: y) == (len(shape), 6)
    assert axis_after(layer := nn.Embedding(9, 6), ids, lambda y: layer.weight[ids]) == (len(shape), 6)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_logits_of_a_graph_have_no_channels(heads):
    layer, source, target = nn.Linear(3, 6), nn.Linear(6, heads), nn.Linear(6, heads)
    tracker = AxisTracker([*layer.parameters(), *source.parameters(), *target.parameters()])
    with tracker.following():
        h = layer(torch.randn(7, 3))
        logits = source(h)[:, None] + target(h)[None] if heads > 1 else source(h) + target(h).T
    assert tracker.axis_of(logits) == (2 if heads > 1 else None)


@pytest.mark.parametrize(
    "unknown",
    [
        lambda x: x,
        lambda x: x + 1,
        lambda x: x @ x.mT,
        lambda x: torch.rand(4, 5) @ x,
        lambda x: x.view(2, 15),
        lambda x: F.avg_pool1d(x, 1),
        lambda x: x[:, [0, 2]],
    ],
)
def test_no_evidence_is_none(unknown):
    tracker = AxisTracker()
    with tracker.following():
        y = unknown(torch.randn(2, 5, 3))
    assert tracker.axis_of(y) is None


@pytest.mark.parametrize(
    ("scale", "expected"),
    [((6,), 3), ((1, 1, 6), 3), ((6, 1, 1), 1), ((1, 6, 1, 1), 1), ((1,), None), ((6, 6, 6), None), ((6, 1), None)],
)
def test_a_weight_tells_the_axis_of_an_unknown_input(scale, expected):
    weight = nn.Parameter(torch.ones(scale))
    tracker = AxisTracker([weight])
    with tracker.following():
        y = torch.randn(2, 6, 6, 6) * weight
    assert tracker.axis_of(y) == expected


def test_a_buffer_that_is_written_anew_has_the_axis_of_what_was_written_last():
    convolution, linear = nn.Conv1d(6, 6, 1), nn.Linear(6, 6)
    tracker = AxisTracker([*convolution.parameters(), *linear.parameters()])
    buffer = torch.zeros(2, 6, 6)
    with torch.no_grad(), tracker.following():
        buffer.copy_(convolution(buffer))
        assert tracker.axis_of(buffer) == tracker.axis_of(buffer[1:]) == 1
        buffer.copy_(linear(buffer))
        assert tracker.axis_of(buffer) == tracker.axis_of(buffer[1:]) == 2
        torch.mm(torch.rand(6, 2), torch.rand(2, 6), out=buffer[0])
        buffer[:, 0] = 0
        assert tracker.axis_of(buffer) == 2
