"""Random networks of linear operators of every kind that chains go on through, and of activations between them."""

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Drawn(NamedTuple):
    """A random network.

    Attributes:
        model: the network in eval mode.
        shape: the shape of one of its samples.
        pieces: the number of layers with weights between two activations, in call order, without pieces that have none.
        operators: the names of the drawn operators, in call order.
    """

    model: nn.Module
    shape: tuple[int, ...]
    pieces: list[int]
    operators: list[str]


class _Network(nn.Module):
    """Apply functions to a value one after the other. They call the layers of the network."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict()
        self.functions = []

    def forward(self, x):
        for function in self.functions:
            x = function(x)
        return x


class _Draft:
    """A network that is being drawn.

    Its value is an image `[batch, channels, height, width]` first, and rows `[batch, …, channels]` later.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.network = _Network()
        self.channels, self.size = self.random.randint(2, 5), self.random.choice([(6, 6), (5, 7), (8, 4)])
        self.positions, self.pieces, self.operators = 1, [0], []  # `positions` of an image in one axis with its channels

    def layer(self, module: nn.Module) -> nn.Module:
        """Add a layer with weights to the network."""
        name = str(len(self.network.layers))
        self.network.layers[name] = module
        self.pieces[-1] += 1
        return module

    def norm(self, module: nn.Module) -> nn.Module:
        """Add a batch norm with random statistics to the network."""
        self.network.layers[f"norm{len(self.network.layers)}"] = module
        nn.init.normal_(module.running_mean)
        nn.init.uniform_(module.running_var, 0.5, 2)
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
        return module

    def constant(self, *shape: int) -> torch.Tensor:
        """Add a constant to the network."""
        name = f"constant{len(list(self.network.buffers()))}"
        self.network.register_buffer(name, torch.rand(shape) + 0.5)
        return getattr(self.network, name)

    def same(self, depth: int = 2) -> Callable:
        """Draw a function of images that keeps their shape: layers, scales, and sums of such functions."""
        c, kind = self.channels, self.random.randrange(7 if depth else 3)
        if kind == 0:
            return self.layer(nn.Conv2d(c, c, 1))
        if kind == 1:
            return self.layer(nn.Conv2d(c, c, 3, padding=1, groups=self.random.choice([1, c]), bias=self.random.random() < 0.5))
        if kind == 2:
            wide = self.layer(nn.Conv2d(c, 2 * c, 1))
            return nn.Sequential(wide, self.layer(nn.Conv2d(2 * c, c, self.random.choice([1, 3]), padding="same")))
        first, second = self.same(depth - 1), self.same(depth - 1)
        joins = {
            3: lambda x: first(x) + second(x),
            4: lambda x: first(x) - second(x),
            5: lambda x: torch.add(x, first(second(x)), alpha=-0.5),
            6: lambda x: torch.lerp(first(x), second(x), 0.25) + x,
        }
        return joins[kind]


def _pointwise(draft):
    width = draft.random.randint(2, 8)
    layer, draft.channels = draft.layer(nn.Conv2d(draft.channels, width, 1)), width
    return layer


def _spatial(draft):
    options = [{"padding": 1}, {"padding": 1, "stride": 2}, {"padding": (0, 1)}, {"padding": 2, "dilation": 2}]
    layer = draft.layer(nn.Conv2d(draft.channels, width := draft.random.randint(2, 5), 3, **draft.random.choice(options)))
    draft.size = tuple(layer(torch.zeros(1, draft.channels, *draft.size)).shape[2:])
    draft.channels = width
    return layer


def _transposed(draft):
    layer = draft.layer(nn.ConvTranspose2d(draft.channels, 3, 2, stride=2))
    draft.channels, draft.size = 3, tuple(2 * size for size in draft.size)
    return layer


def _pool(draft):
    draft.size = tuple(size // 2 for size in draft.size)
    return draft.random.choice([lambda x: F.avg_pool2d(x, 2), nn.AvgPool2d(2)])


def _number(draft):
    numbers = [torch.neg, lambda x: 1 - x, lambda x: x / 3, lambda x: 2 * x, lambda x: x + x, lambda x: -1.0 + x]
    return draft.random.choice(numbers)


def _channel_constant(draft):
    value = draft.constant(draft.channels, 1, 1)
    return draft.random.choice([lambda x: x * value, lambda x: value - x, lambda x: torch.add(x, value, alpha=3)])


def _batch_norm(draft):
    return draft.norm(nn.BatchNorm2d(draft.channels))


def _instance_norm(draft):
    return draft.norm(nn.InstanceNorm2d(draft.channels, affine=True, track_running_stats=True))


def _padding(draft):
    pads = draft.random.choice([(1, 1, 1, 1), (0, 2, 1, 0), (-1, 1, 0, 0), (1, 0, -1, -1), (0, 0, 0, 0)])
    draft.size = draft.size[0] + pads[2] + pads[3], draft.size[1] + pads[0] + pads[1]
    return draft.random.choice([lambda x: F.pad(x, pads), nn.ZeroPad2d(pads)])


def _rounded_pool(draft):
    if draft.size[0] % 2 or draft.size[1] % 2:
        return lambda x: F.avg_pool2d(x, 3, 1, 1, ceil_mode=True)
    draft.size = tuple(size // 2 for size in draft.size)
    return lambda x: F.avg_pool2d(x, 2, ceil_mode=True)


def _contraction(draft):
    width = draft.random.randint(2, 5)
    weight, draft.channels = draft.constant(width, draft.channels), width
    draft.pieces[-1] += 1
    return lambda x: torch.einsum("bchw,dc->bdhw", x, weight)


def _residual(draft):
    body, gamma = draft.same(), draft.constant(1, draft.channels, 1, 1)
    joins = [
        lambda x: x + gamma * body(x),
        lambda x: x - body(x),
        lambda x: body(x) - x,
        lambda x: x * gamma + body(x),
        lambda x: F.avg_pool2d(x, 3, 1, 1) - x + body(x),
        lambda x: torch.sub(body(x), x, alpha=2),
    ]
    return draft.random.choice(joins)


def _views_of_images(draft):
    c, size = draft.channels, draft.size
    views = [
        lambda x: x.flatten(2).unflatten(2, size),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x.transpose(1, 3).swapaxes(3, 1),
        lambda x: x.expand(-1, -1, -1, -1),
        lambda x: x.view(x.shape[0], c, *size),
        lambda x: x.permute(0, 2, 3, 1).contiguous().movedim(-1, 1),
        lambda x: x.flatten(1).reshape(-1, c, *size),
        lambda x: x[:, :, 0:].clone(),
    ]
    return draft.random.choice(views)


def _channels_last_layer(draft):
    width = draft.random.randint(2, 6)
    layer, draft.channels = draft.layer(nn.Linear(draft.channels, width)), width
    return lambda x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _concatenation(draft):
    first, second = draft.layer(nn.Conv2d(draft.channels, 2, 1)), draft.layer(nn.Conv2d(draft.channels, 3, 3, padding=1))
    old, draft.channels = draft.channels, 5
    if draft.random.random() < 0.5:
        return lambda x: torch.cat([first(x), second(x)], 1)
    draft.channels += old
    return lambda x: torch.cat([first(x), x, second(x)], 1)


def _split_channels(draft):
    layer = draft.layer(nn.Conv2d(draft.channels, 4, 1))
    draft.channels = 4
    halves = [
        lambda x: torch.cat(layer(x).chunk(2, 1)[::-1], 1),
        lambda x: torch.cat([(y := layer(x))[:, 1:], y[:, :1]], 1),
        lambda x: F.channel_shuffle(layer(x), 2),
    ]
    return draft.random.choice(halves)


def _pixels(draft):
    if draft.size[0] % 2 == 0 and draft.size[1] % 2 == 0:
        draft.channels, draft.size = 4 * draft.channels, (draft.size[0] // 2, draft.size[1] // 2)
        return lambda x: F.pixel_unshuffle(x, 2)
    layer, draft.channels, draft.size = draft.layer(nn.Conv2d(draft.channels, 8, 1)), 2, tuple(2 * n for n in draft.size)
    return lambda x: F.pixel_shuffle(layer(x), 2)


def _upsample(draft):
    draft.size = tuple(2 * size for size in draft.size)
    return lambda x: F.interpolate(x, scale_factor=2)


def _computed_constant(draft):
    if draft.random.random() < 0.5:
        gamma = draft.constant(draft.channels)
        return lambda x: x * gamma.exp().view(1, -1, 1, 1)
    width = draft.random.randint(2, 5)
    weight, draft.channels = draft.constant(width, draft.channels, 1, 1), width
    draft.pieces[-1] += 1
    return lambda x: F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True))


def _tokens(draft):
    return draft.random.choice([lambda x: x.flatten(2).transpose(1, 2), lambda x: x.movedim(1, -1)])


def _head(draft):
    if draft.random.random() < 0.5:
        draft.positions = draft.size[0] * draft.size[1]
        draft.channels *= draft.positions
        return lambda x: x.flatten(1)
    pooled = [lambda x: x.flatten(1), lambda x: x[:, :, 0, 0], lambda x: x.squeeze(-1).squeeze(-1), lambda x: x.sum((2, 3))]
    view = draft.random.choice(pooled)
    return lambda x: view(F.adaptive_avg_pool2d(x, 1))


def _linear(draft):
    width = draft.random.randint(2, 8)
    layer, draft.channels, draft.positions = draft.layer(nn.Linear(draft.channels, width)), width, 1
    return layer


def _row_constant(draft):
    value = draft.constant(1 if draft.positions > 1 else draft.channels)  # a constant per position and channel ends a chain
    return draft.random.choice([lambda x: x * value, lambda x: value - x, lambda x: x - value])


def _views_of_rows(draft):
    c = draft.channels
    views = [
        lambda x: x.unsqueeze(-2).squeeze(-2),
        lambda x: x.unflatten(-1, (c, 1)).flatten(-2),
        lambda x: x.unsqueeze(1).transpose(1, -1).transpose(1, -1).squeeze(1),
        lambda x: x.reshape(-1, c).view(x.shape),
    ]
    return draft.random.choice(views)


def _activation(draft):
    draft.pieces.append(0)
    return draft.random.choice([torch.relu, F.gelu, torch.tanh])


IMAGE_OPERATORS = {
    "pointwise": _pointwise,
    "spatial": _spatial,
    "transposed": _transposed,
    "pool": _pool,
    "number": _number,
    "channel constant": _channel_constant,
    "batch norm": _batch_norm,
    "instance norm": _instance_norm,
    "padding": _padding,
    "rounded pool": _rounded_pool,
    "contraction": _contraction,
    "residual": _residual,
    "views": _views_of_images,
    "channels-last layer": _channels_last_layer,
    "concatenation": _concatenation,
    "split channels": _split_channels,
    "pixels": _pixels,
    "upsample": _upsample,
    "computed constant": _computed_constant,
    "activation": _activation,
}
ENDS = {"tokens": _tokens, "head": _head}
ROW_OPERATORS = {
    "layer": _linear,
    "number": _number,
    "constant": _row_constant,
    "views": _views_of_rows,
    "activation": _activation,
}


def draw_network(seed: int, active: bool = True) -> Drawn:
    """Draw a network of up to seven operators on images, then of up to four on rows.

    Args:
        seed: makes the choices.
        active: whether there may be activations.
    """
    torch.manual_seed(seed)
    draft = _Draft(seed)
    shape = (draft.channels, *draft.size)

    def append(table):
        names = [name for name in table if active or name != "activation"]
        shrinking, growing = {"pool", "spatial", "padding", "rounded pool"}, {"transposed", "upsample", "pixels"}
        unfit = (shrinking if min(draft.size) < 4 else set()) | (growing if max(draft.size) > 10 else set())
        names = [name for name in names if name not in unfit]
        name = draft.random.choice(names)
        draft.operators.append(name)
        draft.network.functions.append(table[name](draft))

    append({"pointwise": _pointwise, "spatial": _spatial})
    for _ in range(draft.random.randint(1, 5)):
        append(IMAGE_OPERATORS)
    append({"pointwise": _pointwise, "residual": _residual})
    if draft.random.random() < 0.7:
        append(ENDS)
        for _ in range(draft.random.randint(1, 3)):
            append(ROW_OPERATORS)
        append({"layer": _linear})
    return Drawn(draft.network.eval(), shape, [piece for piece in draft.pieces if piece], draft.operators)
