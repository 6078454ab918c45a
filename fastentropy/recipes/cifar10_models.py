"""The networks of the recipe `cifar10`: torchvision's, adapted to 32×32 images, and a small one for a CPU."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torchvision.models.vgg import cfgs, make_layers

from fastentropy.surgery.isolation import isolate

CLASSES = 10


def resnet18() -> nn.Module:
    """Build ResNet-18 (arXiv 1512.03385): 17 activations. Its stem is a 3×3 convolution of stride 1, without max pooling."""
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    _initialize(model.conv1)
    return isolate(model, (torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32),))


def mobilenet_v2() -> nn.Module:
    """Build MobileNetV2 (arXiv 1801.04381): 35 activations. The first two strides are 1, so that the last map is 4×4."""
    # expansion, channels, blocks, stride
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model = MobileNetV2(num_classes=CLASSES, inverted_residual_setting=stages)
    model.features[0][0].stride = (1, 1)
    return model


def vgg16_bn() -> nn.Module:
    """Build VGG-16 (arXiv 1409.1556) with batch norm: 15 activations.

    Its convolutions reduce a 32×32 image to one position, so the first linear layer has 512 inputs instead of 512 × 7 × 7.
    """
    classifier = nn.Sequential(
        nn.Linear(512, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(4096, CLASSES),
    )
    parts = OrderedDict(features=make_layers(cfgs["D"], batch_norm=True), flatten=nn.Flatten(), classifier=classifier)
    return nn.Sequential(parts).apply(_initialize)


def swin_t() -> nn.Module:
    """Build Swin-T (arXiv 2103.14030): 12 activations. Patches are 2×2, windows 4×4; stochastic depth as in torchvision."""
    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[4, 4],
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
        block=_swin_block,
    )


def resnet8() -> nn.Module:
    """Build the ResNet for CIFAR-10 of arXiv 1512.03385, section 4.2, with n = 1: 7 activations, 78,000 parameters."""
    return ResNet8().apply(_initialize)


#: Name -> function that builds the network with random weights on the CPU.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": resnet18,
    "mobilenet_v2": mobilenet_v2,
    "vgg16_bn": vgg16_bn,
    "swin_t": swin_t,
    "resnet8": resnet8,
}


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm; the input is added before the second activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Build a block that changes the number of channels, and the size by the stride."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # If the shape changes, a projection (option B of the paper), which `fuse` can merge, unlike the slices of option A.
        self.shortcut = nn.Sequential()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, in_channels, height, width] to [batch, channels, height / stride, width / stride]."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet8(nn.Module):
    """A convolution, three blocks of 16, 32 and 64 channels at 32², 16² and 8², and a linear classifier."""

    def __init__(self) -> None:
        """Build the network with PyTorch's default initialisation."""
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(16, 16, stride=1), Block(16, 32, stride=2), Block(32, 64, stride=2))
        self.pool = nn.AvgPool2d(8)
        self.classifier = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, 32, 32] to logits [batch, 10]."""
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.classifier(self.pool(x).flatten(1))


def _initialize(module: nn.Module) -> None:
    """Initialise a module like those of torchvision's convolutional networks (arXiv 1502.01852)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _swin_block(channels: int, heads: int, *, window_size: Sequence[int], **options: Any) -> nn.Module:
    """Build a block whose window is no larger than its map, as in Swin's code; torchvision would pad the last map to 4×4."""
    map_size = 16 * 96 // channels  # 16 at 96 channels; each stage halves the map and doubles the channels
    return SwinTransformerBlock(channels, heads, window_size=[min(size, map_size) for size in window_size], **options)
