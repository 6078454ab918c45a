"""The recipe `digits`: the 1,797 images of handwritten digits in scikit-learn, 8×8 pixels, and a small residual network."""

from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fastentropy.recipes import Progress, Recipe, Report, Split, ignore

#: The seed of the splits. It is not the seed of the run, so all runs have the same splits.
SPLIT_SEED = 0
BATCH_SIZE = 64


class Block(nn.Module):
    """A residual block like that of ConvNeXt (arXiv 2201.03545), with batch norm and ReLU.

    A depthwise 3×3 convolution is followed by two 1×1 convolutions. The ReLU is between these two, where there are more
    channels. The input is added at the end.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        """Build a block with `channels` input and output channels, and `expansion` times as many at its ReLU."""
        super().__init__()
        width = channels * expansion
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.project = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn3.weight)  # the block starts as the identity (arXiv 1706.02677, section 5.1)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, channels, height, width] to images of the same shape."""
        y = self.relu(self.bn2(self.expand(self.bn1(self.spatial(x)))))
        return x + self.bn3(self.project(y))


class DigitsNet(nn.Module):
    """A residual network for 8×8 images, with two stages. Each stage is a convolution followed by residual blocks.

    Each of the two convolutions and each block has one activation, which makes 2 + 2 × `blocks` activations.
    """

    def __init__(self, channels: int = 24, blocks: int = 3, expansion: int = 4) -> None:
        """Build the network.

        Args:
            channels: the channels of the first stage, at 8×8. The second stage has twice as many, at 4×4.
            blocks: the residual blocks of each stage.
            expansion: the factor by which a block widens its channels at its activation.
        """
        super().__init__()
        self.stem = _convolution(1, channels, stride=1)
        self.stage1 = nn.Sequential(*(Block(channels, expansion) for _ in range(blocks)))
        self.down = _convolution(channels, 2 * channels, stride=2)
        self.stage2 = nn.Sequential(*(Block(2 * channels, expansion) for _ in range(blocks)))
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(8 * channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [batch, 1, 8, 8] to logits [batch, 10]."""
        x = self.stage2(self.down(self.stage1(self.stem(x))))
        return self.classifier(self.pool(x).flatten(1))


def _convolution(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Build a 3×3 convolution with batch norm and ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True)))


class Digits(Recipe):
    """The recipe `digits`. It trains on 50 % of the images, and validates and tests on 25 % each.

    The splits are stratified: every class has the same share of each.
    """

    epochs = 15
    # Operators this small gain nothing from a second thread, and waiting for it takes long if other programs use the cores.
    # With one thread, the same seed also gives the same removals on any number of cores.
    threads = 1

    def __init__(self, device: torch.device) -> None:
        """Load the images, scale them to the range from 0 to 1, split them, and place them on `device`."""
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32, device="cpu")[:, None] / 16
        labels = torch.tensor(digits.target, device="cpu")
        training, rest = _split(torch.arange(len(labels), device="cpu"), labels, 0.5)
        validation, test = _split(rest, labels, 0.5)
        indices = {"train": training, "validation": validation, "test": test}
        self._data = {name: (images[index].to(device), labels[index].to(device)) for name, index in indices.items()}
        self._device = device
        self.calibration_batches = len(training.split(BATCH_SIZE))

    def build_model(self) -> nn.Module:
        """Return a new `DigitsNet` on the device. Its weights are drawn from torch's default random generator."""
        return DigitsNet().to(self._device)

    def train(self, model: nn.Module, epochs: int) -> Iterator[float]:
        """Train a network in place, and yield the mean loss after each epoch.

        The optimizer is AdamW, with a one-cycle learning rate (arXiv 1708.07120) and label smoothing (arXiv 1512.00567).

        Args:
            model: the network, in train mode.
            epochs: the length of the learning rate's cycle.
        """
        images, labels = self._data["train"]
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        steps = epochs * -(-len(labels) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        for _ in range(epochs):
            losses = []
            for batch in torch.randperm(len(labels), device="cpu").to(self._device).split(BATCH_SIZE):
                loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.detach())
            yield float(torch.stack(losses).mean())

    def evaluate(self, model: nn.Module, split: Split, report: Report = ignore) -> float:
        """Return the fraction of the images of a split that the model classifies correctly."""
        images, labels = self._data[split]
        correct = model(images).argmax(1) == labels
        report(Progress(len(labels), len(labels)))
        return float(correct.double().mean())

    def calibrate(self, model: nn.Module) -> Iterator[None]:
        """Run the training images forward through the model. Yield after each batch."""
        for batch in self._data["train"][0].split(BATCH_SIZE):
            model(batch)
            yield

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return the first 64 test images as a tuple of one tensor: float32 [64, 1, 8, 8]."""
        return (self._data["test"][0][:64],)


def _split(indices: Tensor, labels: Tensor, share: float) -> list[Tensor]:
    """Divide indices in two, with the same proportions of classes in both.

    Args:
        indices: int64 [n], the images to divide.
        labels: int64, the class of every image of the data set.
        share: the fraction of the indices in the first part.
    """
    return list(train_test_split(indices, train_size=share, random_state=SPLIT_SEED, stratify=labels[indices]))
