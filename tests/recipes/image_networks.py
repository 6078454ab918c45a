"""Networks of a user, and functions that build them, for the recipe `images`."""

import sys

import torch
from torch import nn


class Small(nn.Module):
    """A network with batch norm, an activation that is a module, and two calls of a function."""

    def __init__(self, num_classes=7):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8, momentum=0.01), nn.ReLU(inplace=True))
        self.expand, self.reduce = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.relu(self.reduce(torch.relu(self.expand(x))))
        return self.fc(self.dropout(x.mean((2, 3))))


class Repeated(Small):
    """One activation module is called twice, outside of a loop."""

    def forward(self, x):
        x = self.stem[2](self.stem[1](self.stem[0](x)))
        x = self.stem[2](self.expand(x))
        return self.fc(self.reduce(x).mean((2, 3)))


class Looped(Small):
    """The calls in a loop, of a module and of a function, cannot be isolated; the first one can."""

    def __init__(self, num_classes=7):
        super().__init__(num_classes)
        self.gelu = nn.GELU()

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = torch.relu(self.reduce(self.gelu(self.expand(x))))
        return self.fc(x.mean((2, 3)))


class LoopedOnly(Small):
    """No call can be isolated."""

    def forward(self, x):
        x = self.stem[1](self.stem[0](x))
        for _ in range(2):
            x = torch.relu(self.reduce(self.expand(x)))
        return self.fc(x.mean((2, 3)))


class WithoutActivations(Small):
    """It calls no activation."""

    def forward(self, x):
        return self.fc(self.stem[0](x).mean((2, 3)))


class OwnHead(Small):
    """The last layer is no module, so it cannot be replaced."""

    def __init__(self):
        super().__init__(8)
        self.centers = nn.Parameter(torch.randn(7, 8))

    def forward(self, x):
        return super().forward(x) @ self.centers.T


class FixedSize(Small):
    """It takes images of 16×16 only."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8 * 8 * 8, 7)

    def forward(self, x):
        return self.fc(self.stem(x).flatten(1))


class TwoOutputs(Small):
    """In training it returns a second output, as networks with an auxiliary classifier do."""

    def forward(self, x):
        y = super().forward(x)
        return (y, y) if self.training else y


def seven_classes():
    """Build a network without asking for the number of classes."""
    return Small(7)


def fails():
    """Fail as a program may that was not written to be imported."""
    raise RuntimeError("no such checkpoint\nsecond line")


def exits():
    """End the process, as a script does."""
    sys.exit(0)


def no_network():
    """Return something else."""
    return {"fc.weight": torch.zeros(7, 8)}
