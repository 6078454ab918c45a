"""Series of convolutions without activations between them, and images on which one convolution approximates them."""

import torch
from torch import nn

#: Paths of the modules of `series`, in call order.
NAMES = ("conv1", "bn1", "relu", "conv2", "bn2")


def series(axes=2, stride=1, groups=1, norm=True, kernel=3):
    """Return two convolutions and what is between them, linearised; the statistics of batch norm are random."""
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    model = nn.Sequential()
    model.conv1 = convolution(4, 8, kernel, stride, kernel // 2, groups=groups, bias=not norm)
    model.bn1 = batch_norm(8) if norm else nn.Identity()
    model.relu = nn.Identity()
    model.conv2 = convolution(8, 6, 3, 1, 1, groups=groups, bias=not norm)
    model.bn2 = batch_norm(6) if norm else nn.Identity()
    for module in model:
        if isinstance(module, batch_norm):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model.eval()


def smooth(*shape):
    """Return random images with similar neighbours, so that a small kernel can approximate a large one."""
    x = torch.randn(shape)
    for axis in range(2, len(shape)):
        x = x + x.roll(1, axis) + x.roll(-1, axis)
    return x


def rms(x):
    """Return the root mean square of a tensor."""
    return float(x.detach().square().mean().sqrt())
