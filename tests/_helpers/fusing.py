"""Networks to fuse, and a comparison of a fused network with the original one."""

import torch
from torch import nn

from tests._helpers.networks import Reads


def randomize_batch_norm(model, seed=0):
    """Give every batch norm of a model random statistics, weights and biases, as after a training.

    Args:
        model: the model, which is changed.
        seed: the seed of the random values.

    Returns:
        The model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def assert_equal(fused, model, *inputs, tolerance=1e-5):
    """Assert that a fused network computes what the original one computes.

    Args:
        fused: the fused network.
        model: the original network.
        inputs: the positional inputs of a call.
        tolerance: the largest allowed difference, relative to the largest absolute output of `model`.
    """
    with torch.no_grad():
        actual, expected = fused(*inputs), model(*inputs)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def two_layers(forward):
    """Return a network with linear layers `a` and `b` (8 to 8 features). `forward(network, x)` is its forward."""
    torch.manual_seed(0)
    return Reads(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()


def inverted_residual(channels=3, size=9):
    """Return a network with an inverted residual block, and an input.

    Its three convolutions and the addition of its input make a chain (a stretch of linear operators) that merges into one
    convolution. The bias of this convolution depends on the position, because the second convolution pads a value to which a
    bias was added.
    """
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
    """Return a network of two 3×3 convolutions and an activation, and an input.

    The two convolutions merge into one, whose output is wrong at the border of an image, because the second convolution pads
    the intermediate value with zeros. The fused network recomputes the border.
    """
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers).eval(), torch.randn(3, 2, 11, 12)


class Amplifier(nn.Module):
    """A network whose rounding grows from block to block. Each block is a chain of two layers, and a sine."""

    def __init__(self, blocks: int = 6, gain: float = 6.0, features: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = [nn.Sequential(nn.Linear(features, 40), nn.Linear(40, features)) for _ in range(blocks)]
        self.blocks, self.gain = nn.ModuleList(pairs), gain
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                nn.init.normal_(layer.bias)

    def forward(self, x):
        for block in self.blocks:
            x = torch.sin(self.gain * block(x))
        return x
