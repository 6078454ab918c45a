"""Networks to fuse, and the comparison of a fused network with the network."""

import torch
from torch import nn

from tests._helpers.networks import Reads


def randomize_batch_norm(model, seed=0):
    """Give batch norm statistics as after a long training, and return the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def assert_equal(fused, model, *inputs, tolerance=1e-5):
    """Raise if the outputs differ by more than `tolerance` of the largest expected value."""
    with torch.no_grad():
        actual, expected = fused(*inputs), model(*inputs)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def two_layers(forward):
    """Return two linear layers, `a` and `b`, used by a forward function."""
    torch.manual_seed(0)
    return Reads(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()


def inverted_residual(channels=3, size=9):
    """Return a network whose merged chain has a bias that depends on the position, and its input."""
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
    """Return a network whose merged chain has a border that is recomputed, and its input."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 2, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers).eval(), torch.randn(3, 2, 11, 12)
