"""Random networks whose activations treat each neuron by itself."""

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastentropy as fe


def neuronwise(states, activation=None, values=None, axis=-1):
    """Return an activation of neurons that are active ("a"), linear ("l") or constant ("c")."""
    linear, constant = (torch.tensor([state == each for state in states]) for each in "lc")
    values = None if values is None else torch.tensor(values)
    return fe.NeuronwiseActivation(activation or nn.ReLU(), linear, constant, values, channel_axis=axis)


def images(states, *further, **options):
    """Return such an activation of images."""
    return neuronwise(states, *further, axis=-3, **options)


#: The activations, some of which overwrite their input. ReLU6 is 0 below and 6 above.
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.ELU, nn.PReLU),
    *(lambda: nn.ReLU(inplace=True), lambda: nn.ReLU6(inplace=True), lambda: nn.SiLU(inplace=True)),
)


class Drawn(NamedTuple):
    """A random network in eval mode, the shape of one of its samples, and the names of its blocks in call order."""

    model: nn.Module
    shape: tuple[int, ...]
    blocks: list[str]


class Gated(nn.Module):
    """Multiply a linear layer by an activated one."""

    def __init__(self, draft: "_Draft", features: int):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(features, 8), nn.Linear(features, 8), nn.Linear(8, features)
        self.activation = draft.activation(8, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Squeeze(nn.Module):
    """Multiply each channel by a number that follows from the means of all channels."""

    def __init__(self, draft: "_Draft", channels: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.activation = draft.activation(4, -3)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))))


class Halves(nn.Module):
    """Convolve the second half of the channels, and shuffle the channels of both halves."""

    def __init__(self, draft: "_Draft", channels: int):
        super().__init__()
        half = channels // 2
        self.layer = nn.Conv2d(half, half, 3, padding=1, groups=draft.random.choice([1, half]))
        self.activation, self.by_views = draft.activation(half, -3), draft.random.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.activation(self.layer(right))], 1)
        if not self.by_views:
            return F.channel_shuffle(y, 2)
        return y.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)


class Residual(nn.Module):
    """Add the output of a module to its input."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


class _Draft:
    """A network that is being drawn."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.blocks: list[str] = []

    def activation(self, neurons: int, axis: int) -> nn.Module:
        """Draw an activation, and the states of its neurons: those of all, or of each by itself."""
        activation = self.random.choice(ACTIVATIONS)()
        weights = self.random.choice([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 2), (0, 1, 1), (1, 1, 2)])
        states = torch.tensor(self.random.choices((0, 1, 2), weights, k=neurons))
        values = torch.randn(neurons) if self.random.random() < 0.3 else None
        self.blocks.append(f"{type(activation).__name__} {states.tolist()}{'' if values is None else ' with values'}")
        return fe.NeuronwiseActivation(activation, states == 1, states == 2, values, channel_axis=axis)

    def norm(self, channels: int) -> nn.Module:
        """Return a batch norm with random statistics."""
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.bias)
        return norm

    def image_block(self, channels: int) -> tuple[nn.Module, int]:
        """Draw a block of an image, and return it with the number of its output channels."""
        wide = self.random.choice([4, 6, 8])
        choices = {
            "pointwise": lambda: (nn.Conv2d(channels, wide, 1), wide),
            "padded": lambda: (nn.Conv2d(channels, wide, 3, padding=1), wide),
            "strided": lambda: (nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False), wide),
            "dilated": lambda: (nn.Conv2d(channels, wide, 3, padding=2, dilation=2), wide),
            "grouped": lambda: (nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=2), 2 * channels),
            "depthwise": lambda: (nn.Conv2d(channels, channels, 3, padding=1, groups=channels), channels),
            "transposed": lambda: (nn.ConvTranspose2d(channels, wide, 2, stride=2), wide),
            "norm": lambda: (self.norm(channels), channels),
            "average": lambda: (nn.AvgPool2d(2, stride=1, padding=1), channels),
            "maximum": lambda: (nn.MaxPool2d(3, stride=1, padding=1), channels),
            "nearest": lambda: (nn.Upsample(scale_factor=2), channels),
            "bilinear": lambda: (nn.Upsample(scale_factor=2, mode="bilinear"), channels),
            "pixels": lambda: (nn.Sequential(nn.Conv2d(channels, 16, 1), nn.PixelShuffle(2)), 4),
            "squeeze": lambda: (Squeeze(self, channels), channels),
            "halves": lambda: (Halves(self, channels), channels),
            "residual": lambda: (Residual(nn.Conv2d(channels, channels, 3, padding=1)), channels),
        }
        name = self.random.choice(list(choices))
        self.blocks.append(name)
        return choices[name]()

    def row_block(self, features: int) -> tuple[nn.Module, int]:
        """Draw a block of rows, and return it with the number of its output features."""
        wide = self.random.choice([4, 6, 8])
        choices = {
            "linear": lambda: (nn.Linear(features, wide), wide),
            "gated": lambda: (Gated(self, features), features),
            "residual": lambda: (
                Residual(nn.Sequential(nn.Linear(features, features), self.activation(features, -1))),
                features,
            ),
        }
        name = self.random.choice(list(choices))
        self.blocks.append(name)
        return choices[name]()


def draw_neuronwise_network(seed: int) -> Drawn:
    """Draw a network: blocks of an image with activations behind most of them, then features, then blocks of these."""
    draft, channels = _Draft(seed), 4
    modules: list[nn.Module] = [nn.Conv2d(3, channels, 3), draft.activation(channels, -3)]
    for _ in range(draft.random.randint(1, 4)):
        module, channels = draft.image_block(channels)
        modules.append(module)
        if draft.random.random() < 0.8:
            modules.append(draft.activation(channels, -3))
    ends = {
        "flatten": (nn.Flatten(), nn.LazyLinear(6)),
        "mean": (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 6)),
        "tokens": (nn.Flatten(2), _Transposed(), nn.Linear(channels, 6)),
    }
    end = draft.random.choice(list(ends))
    draft.blocks.append(end)
    modules += [*ends[end], draft.activation(6, -1)]
    features = 6
    for _ in range(draft.random.randint(0, 3)):
        module, features = draft.row_block(features)
        modules += [module, draft.activation(features, -1)]
    model = nn.Sequential(*modules, nn.Linear(features, 5)).eval()
    model(torch.randn(2, 3, 8, 7))
    return Drawn(model, (3, 8, 7), draft.blocks)


class _Transposed(nn.Module):
    """Exchange the last two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)
