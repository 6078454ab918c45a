"""The networks of the recipe `cifar10`: four of torchvision, adapted to 32×32 images, and a small one for CPUs."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torchvision.models.vgg import cfgs, make_layers

from fastentropy.recipes.cifar10_data import CLASSES
from fastentropy.surgery.isolation import isolate


def resnet18(width: float = 1.0) -> nn.Module:
    """Build ResNet-18 (arXiv 1512.03385) as EASIER's code has it for CIFAR-10. It has 17 activations.

    Its stem is a 3×3 convolution of stride 1, and a 3×3 max pooling of stride 2: 140 million multiplications. `isolate` gives
    each call of torchvision's shared ReLU modules a module of its own.
    """
    return _isolated(NarrowResNet18(width, nn.MaxPool2d(3, 2, padding=1)))


def resnet18_wide_map(width: float = 1.0) -> nn.Module:
    """Build ResNet-18 as `resnet18` does, without max pooling: 555 million multiplications, and a higher accuracy."""
    return _isolated(NarrowResNet18(width, nn.Identity()))


def _isolated(model: nn.Module) -> nn.Module:
    """Return a network for 32×32 images in which each call of an activation has a module of its own."""
    return isolate(model, (torch.linspace(-1, 1, 3 * 32 * 32, dtype=torch.float32, device="cpu").view(1, 3, 32, 32),))


def mobilenet_v2(width: float = 1.0) -> nn.Module:
    """Build MobileNetV2 (arXiv 1801.04381), which has 35 activations.

    The first two strides of 2 are replaced by 1, so the last feature map is 4×4 for a 32×32 image. Scaled numbers of channels
    are rounded to multiples of 8, and the last ones are never below 1280, as in the paper.
    """
    # each stage: expansion, output channels, number of blocks, stride of the first block
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model = MobileNetV2(num_classes=CLASSES, width_mult=width, inverted_residual_setting=stages)
    model.features[0][0].stride = (1, 1)
    return model


def vgg16_bn(width: float = 1.0) -> nn.Module:
    """Build VGG-16 (arXiv 1409.1556) with batch norm, which has 15 activations.

    Its convolutions and poolings reduce a 32×32 image to 1×1, so the first linear layer has 512 inputs, not 512 × 7 × 7.
    """
    hidden = _scaled(4096, width)
    classifier = nn.Sequential(
        nn.Linear(_scaled(512, width), hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, CLASSES),
    )
    layers = [each if each == "M" else _scaled(int(each), width) for each in cfgs["D"]]
    parts = OrderedDict(features=make_layers(layers, batch_norm=True), flatten=nn.Flatten(), classifier=classifier)
    return nn.Sequential(parts).apply(_initialize)


def swin_t(width: float = 1.0) -> nn.Module:
    """Build Swin-T (arXiv 2103.14030), which has 12 activations.

    Patches are 2×2 and windows are at most 4×4, because the images are small. The stochastic depth is that of torchvision. The
    number of heads does not depend on the width.
    """
    channels = 3 * _scaled(32, width)
    return SwinTransformer(
        patch_size=[2, 2],
        embed_dim=channels,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[4, 4],
        stochastic_depth_prob=0.2,
        num_classes=CLASSES,
        block=partial(_swin_block, channels),
    )


def resnet8(width: float = 1.0) -> nn.Module:
    """Build the ResNet for CIFAR-10 of arXiv 1512.03385, section 4.2, with n = 1.

    It has 7 activations and 78,000 parameters.
    """
    return ResNet8(width).apply(_initialize)


#: The functions that build the networks, by name. They take the width, by which the channels of all layers are multiplied, and
#: return networks with random weights on the CPU.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet18_wide_map": resnet18_wide_map,
    "mobilenet_v2": mobilenet_v2,
    "vgg16_bn": vgg16_bn,
    "swin_t": swin_t,
    "resnet8": resnet8,
}


class NarrowResNet18(ResNet):  # type: ignore[misc] # torchvision has no annotations
    """torchvision's ResNet-18 of any width, with a 3×3 convolution of stride 1 and the given pooling in its stem."""

    inplanes: int

    def __init__(self, width: float, pool: nn.Module) -> None:
        """Build the network.

        Args:
            width: by which the channels of all layers are multiplied.
            pool: what follows the first activation.
        """
        self._width = width
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=CLASSES)
        channels = _scaled(64, width)
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        _initialize(self.conv1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = pool
        self.fc = nn.Linear(self.inplanes, CLASSES)

    def _make_layer(self, block: type[BasicBlock | Bottleneck], planes: int, *sizes: Any, **options: Any) -> nn.Sequential:
        """Build a stage of the network; `inplanes` is the number of channels of the stage before."""
        if planes == self.inplanes:  # the first stage
            self.inplanes = _scaled(planes, self._width)
        return super()._make_layer(block, _scaled(planes, self._width), *sizes, **options)


class Block(nn.Module):
    """A residual block: convolution, batch norm, ReLU, convolution, batch norm, addition of the input, ReLU.

    Both convolutions are 3×3. If the shape changes, a 1×1 convolution with batch norm adapts the input before the addition.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        """Build a block.

        Args:
            in_channels: the number of input channels.
            channels: the number of output channels.
            stride: the stride of the first convolution, by which height and width are divided.
        """
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        # The shortcut is a projection (option B of the paper) if the shape changes. `fuse` can merge a projection, but not the
        # slices of option A.
        self.shortcut = nn.Sequential()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, in_channels, height, width] to [batch, channels, height / stride, width / stride]."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class ResNet8(nn.Module):
    """A convolution, three residual blocks of 16, 32 and 64 channels at 32×32, 16×16 and 8×8, and a linear classifier."""

    def __init__(self, width: float) -> None:
        """Build the network, initialised by the defaults of PyTorch's layers; `width` multiplies the channels."""
        super().__init__()
        first, second, third = (_scaled(channels, width) for channels in (16, 32, 64))
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(
            Block(first, first, stride=1), Block(first, second, stride=2), Block(second, third, stride=2)
        )
        self.pool = nn.AvgPool2d(8)
        self.classifier = nn.Linear(third, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 3, 32, 32] to logits [batch, 10]."""
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.classifier(self.pool(x).flatten(1))


def _scaled(channels: int, width: float) -> int:
    """Return a number of channels multiplied by the width and rounded, at least 1."""
    return max(1, round(channels * width))


def _initialize(module: nn.Module) -> None:
    """Initialise a convolution or linear layer as torchvision's VGG does (arXiv 1502.01852). Leave other modules unchanged."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _swin_block(first: int, channels: int, heads: int, *, window_size: Sequence[int], **options: Any) -> nn.Module:
    """Build a block of Swin whose attention window is no larger than its feature map, as the authors' code does.

    torchvision's block alone would pad the last feature map, 2×2, to the window of 4×4.

    Args:
        first: the number of channels of the first stage.
        channels: the number of channels of the block, from which the size of its feature map follows.
        heads: the number of attention heads.
        window_size: height and width of the window, in positions.
        **options: further arguments of torchvision's `SwinTransformerBlock`.
    """
    map_size = 16 * first // channels  # 16 in the first stage; each stage halves the map and doubles the channels
    return SwinTransformerBlock(channels, heads, window_size=[min(size, map_size) for size in window_size], **options)
