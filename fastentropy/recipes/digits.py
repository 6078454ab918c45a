"""Handwritten digits: 1,797 real 8×8 images that ship with scikit-learn, and a small residual network for them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fastentropy.recipes import Split

#: The split of the data does not depend on the seed of a run, so that runs can be compared.
SPLIT_SEED = 0
BATCH_SIZE = 64


class Bottleneck(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolutions with batch norm, and the input added before the last activation.

    The residual form of He et al. (arXiv 1512.03385) with the inverted widths of MobileNetV2 (arXiv 1801.04381).
    """

    def __init__(self, channels: int, expansion: int) -> None:
        """A block of `channels` channels and `expansion` times as many inside."""
        super().__init__()
        width = channels * expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images of the same shape out."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + x)


class DigitsNet(nn.Module):
    """A residual network for 8×8 images with 1 + 3 × blocks activations."""

    def __init__(self, channels: int = 32, blocks: int = 4, expansion: int = 3) -> None:
        """Stem, blocks, and a linear classifier on the pooled channels."""
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(Bottleneck(channels, expansion) for _ in range(blocks)))
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(channels * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 1, 8, 8] in, logits [batch, 10] out."""
        x = self.blocks(self.relu(self.bn(self.stem(x))))
        return self.classifier(self.pool(x).flatten(1))


class Digits:
    """The recipe `digits`: 50 % of the images to train on, 25 % each for validation and test, classes in equal shares."""

    epochs = 12

    def __init__(self, device: torch.device) -> None:
        """Load and split the images, and put them on a device."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target)
        training, rest = _split(torch.arange(len(labels)), labels, 0.5)
        validation, test = _split(rest, labels, 0.5)
        indices = {"train": training, "validation": validation, "test": test}
        self._data = {name: (images[index].to(device), labels[index].to(device)) for name, index in indices.items()}
        self._device = device
        self.calibration_batches = len(training.split(BATCH_SIZE))

    def build_model(self) -> nn.Module:
        """A new `DigitsNet`, initialised from torch's default random generator."""
        return DigitsNet().to(self._device)

    def train(self, model: nn.Module, epochs: int) -> Iterator[float]:
        """SGD with momentum, the learning rate divided by 10 after 1/2 and 3/4 of the epochs, as EASIER trains on CIFAR-10."""
        images, labels = self._data["train"]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, epochs * 3 // 4])
        for _ in range(epochs):
            losses = []
            for batch in torch.randperm(len(labels)).to(self._device).split(BATCH_SIZE):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            schedule.step()
            yield float(torch.stack(losses).mean())

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The share of the split's images that the model names right."""
        images, labels = self._data[split]
        return float((model(images).argmax(1) == labels).double().mean())

    def calibrate(self, model: nn.Module) -> Iterator[None]:
        """Run the training images through the model, batch by batch."""
        for batch in self._data["train"][0].split(BATCH_SIZE):
            model(batch)
            yield

    def example_inputs(self) -> tuple[Tensor, ...]:
        """The first 64 test images."""
        return (self._data["test"][0][:64],)


def _split(indices: Tensor, labels: Tensor, share: float) -> list[Tensor]:
    return list(train_test_split(indices, train_size=share, random_state=SPLIT_SEED, stratify=labels[indices]))
