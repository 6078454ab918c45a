"""Networks with selections and concatenations: their chains are merged, and the outputs are those of the model."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.fusing import assert_equal, randomize_batch_norm
from tests._helpers.networks import Reads

#: Blocks for images with an even number of channels. Each is given by the layers that it has for a number of channels, and by
#: its forward.
BLOCKS = {
    "shufflenet": (
        lambda c: (nn.Conv2d(c // 2, c // 2, 1), nn.Conv2d(c // 2, c // 2, 3, 1, 1, groups=c // 2), nn.BatchNorm2d(c // 2)),
        lambda x, a, b, n: F.channel_shuffle(torch.cat([(p := x.chunk(2, 1))[0], n(b(a(p[1])))], 1), 2),
    ),
    "shuffled groups": (
        lambda c: (nn.Conv2d(c, c, 1, groups=2), nn.Conv2d(c, c, 1, groups=2)),
        lambda x, a, b: b(a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
    ),
    "ghost": (
        lambda c: (nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, c // 2, 3, 1, 1, groups=c // 2)),
        lambda x, a, b: torch.cat([y := a(x), b(y)], 1)[:, : x.shape[1]],
    ),
    "inception": (
        lambda c: (nn.Conv2d(c, 2, 1), nn.Conv2d(c, 3, 3, 1, 1), nn.Conv2d(c, 3, 1)),
        lambda x, a, b, d: torch.cat([a(x), b(x), d(F.avg_pool2d(x, 3, 1, 1))], 1),
    ),
    "dense": (lambda c: (nn.Conv2d(c, 4, 3, 1, 1),), lambda x, a: torch.cat([x, a(x)], 1)),
    "upsampled by pixels": (lambda c: (nn.Conv2d(c, 16, 3, 1, 1),), lambda x, a: F.pixel_shuffle(a(x), 2)),
    "downsampled by pixels": (lambda c: (nn.Conv2d(4 * c, c, 1),), lambda x, a: a(F.pixel_unshuffle(x, 2))),
    "upsampled": (
        lambda c: (nn.Conv2d(c, c, 1), nn.Conv2d(c, 6, 3, 1, 1)),
        lambda x, a, b: b(F.interpolate(a(x), scale_factor=2)),
    ),
    "reversed": (lambda c: (nn.Conv2d(c, c, 3, 1, 1),), lambda x, a: a(x).flip(1)),
    "some channels": (lambda c: (nn.Conv2d(c, c, 1),), lambda x, a: a(x)[:, [0, 1, 1, -1, -2, 0]]),
    "activation": (lambda c: (), lambda x: x.relu()),
}


def drawn_network(seed):
    """Return a random network of two to four blocks, an input, and the names of its blocks."""
    chooser = random.Random(seed)
    torch.manual_seed(seed)
    names, layers, x = [], {}, torch.randn(2, 4, 8, 8)
    for _ in range(chooser.randint(2, 4)):
        name = chooser.choice([name for name in BLOCKS if x.shape[2] in range(8, 17) or "sampled" not in name])
        parts = BLOCKS[name][0](x.shape[1])
        layers |= {f"block{len(names)}_{index}": part for index, part in enumerate(parts)}
        names.append((name, len(parts)))
        with torch.no_grad():
            x = BLOCKS[name][1](x, *parts)

    def forward(m, x):
        for position, (name, count) in enumerate(names):
            x = BLOCKS[name][1](x, *(getattr(m, f"block{position}_{index}") for index in range(count)))
        return m.last(x)

    model = Reads(forward, **layers, last=nn.Conv2d(x.shape[1], 3, 3, padding=1))
    return randomize_batch_norm(model, seed), torch.randn(2, 4, 8, 8), [name for name, _ in names]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_drawn_networks_are_fused_exactly(seed):
    model, x, names = drawn_network(seed)
    fused = fe.fuse(model, (x,), measure=False)
    for batch in (2, 1, 5):
        assert_equal(fused, model, torch.randn(batch, *x.shape[1:]))
    assert len(fused.report.chains) <= 1 + names.count("activation")


def small_network(forward, **layers):
    """Return a network in eval mode, and images for it."""
    torch.manual_seed(0)
    return Reads(forward, **layers).eval(), torch.randn(2, 4, 8, 8)


#: Networks that must become one convolution: forward functions of layers `a` (4 to 16 channels) and `b`.
SINGLE = {
    "cat": (lambda m, x: m.b(torch.cat([m.a(x), x], 1)), 20),
    "cat of the same": (lambda m, x: m.b(torch.cat([y := m.a(x), y], 1)), 32),
    "index": (lambda m, x: m.b(m.a(x)[:, [*range(1, 16), 0]]), 16),
    "flip": (lambda m, x: m.b(m.a(x).flip(1)), 16),
    "roll": (lambda m, x: m.b(torch.roll(m.a(x), 3, 1)), 16),
    "slices": (lambda m, x: m.b((y := m.a(x))[:, :8] + y[:, 8:]), 8),
    "chunks": (lambda m, x: m.b(torch.cat(m.a(x).chunk(4, 1)[::-1], 1)), 16),
    "pixel shuffle": (lambda m, x: m.b(F.pixel_shuffle(m.a(x), 2)), 4),
    "pixel unshuffle": (lambda m, x: m.b(F.pixel_unshuffle(m.a(x), 2)), 64),
    "channel shuffle": (lambda m, x: m.b(F.channel_shuffle(m.a(x), 4)), 16),
    "nearest": (lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)), 16),
    "nearest to a size": (lambda m, x: m.b(F.interpolate(m.a(x), size=(24, 8))), 16),
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_convolution_is_left(name):
    forward, channels = SINGLE[name]
    model, x = small_network(forward, a=nn.Conv2d(4, 16, 1), b=nn.Conv2d(channels, 3, 1))
    fused = fe.fuse(model, (x,), measure=False)
    (chain,) = fused.report.chains
    assert chain.names == ("a", "b")
    convolutions = [node for node in fused.graph_module.graph.nodes if "conv" in str(node.target)]
    assert len(convolutions) == 1
    for batch in (1, 4):
        assert_equal(fused, model, torch.randn(batch, *x.shape[1:]))


def test_selections_that_are_left_are_no_convolutions():
    def forward(m, x):
        x = m.a(x).relu()
        return torch.cat([F.pixel_shuffle(x, 2), F.interpolate(m.b(x[:, m.index]), scale_factor=2)], 1)

    model, x = small_network(forward, a=nn.Conv2d(4, 16, 3), b=nn.Conv2d(6, 3, 3, padding=1))
    model.register_buffer("index", torch.tensor([9, 0, 3, 2, 15, 1]))
    fused = fe.fuse(model, (x,), measure=False)
    convolutions = [node for node in fused.graph_module.graph.nodes if "conv" in str(node.target)]
    assert len(convolutions) == 2
    assert_equal(fused, model, torch.randn(3, 4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_constant_indices_keep_their_dtype(dtype):
    index = torch.tensor([5, 0, 3, 2, 15, 1])
    model, x = small_network(lambda m, x: m.b(m.a(x)[:, m.i].relu()), a=nn.Conv2d(4, 16, 1, groups=4), b=nn.Conv2d(6, 3, 1))
    model.register_buffer("i", index)
    model, x = model.to(dtype), x.to(dtype)
    fused = fe.fuse(model, (x,), measure=False, tolerance=1e-1)
    assert_equal(fused, model, x, tolerance=2e-2)


def test_a_network_with_selections_is_saved_and_loaded(tmp_path):
    model, x = small_network(
        lambda m, x: m.b(F.channel_shuffle(m.a(x), 2)[:, [3, 1, 1, 0]].relu()),
        a=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        b=nn.Conv2d(4, 3, 1),
    )
    fused = fe.fuse(model, (x,), measure=False)
    fused.save(tmp_path / "fused.pt2")
    loaded = fe.load(tmp_path / "fused.pt2")
    assert_equal(loaded, model, torch.randn(3, 4, 8, 8))


def test_sizes_that_are_free():
    def forward(m, x):
        return m.b(torch.cat([F.channel_shuffle(y := m.a(x), 2), F.interpolate(m.c(y), scale_factor=1), y[:, 1:]], 1))

    layers = {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(11, 3, 1), "c": nn.Conv2d(4, 4, 1)}
    model, x = small_network(forward, **layers)
    fused = fe.fuse(model, (x,), measure=False, dynamic_sizes=True)
    assert len(fused.report.chains) == 1
    for size in ((8, 8), (5, 11)):
        assert_equal(fused, model, torch.randn(2, 4, *size))
