"""Small networks that several tests use."""

from torch import Tensor, nn


class Residual(nn.Module):
    """A network with everything the loop meets: convolutions, batch norm, a residual addition, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 1)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(6 * 5 * 5, 8)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        return self.fc2(self.gelu(self.fc1(x.flatten(1))))


class Reads(nn.Module):
    """A network given as a function of itself and its inputs; its modules are attributes."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self._function(self, *inputs)
