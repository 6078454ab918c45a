"""Small networks that several tests use."""

from torch import Tensor, nn


class Residual(nn.Module):
    """A small network with convolutions, batch norm, a residual addition, three activations and a linear classifier."""

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
    """A network that is given by a function.

    Args:
        forward: the forward of the network. It is called as `forward(network, *inputs)`.
        modules: the modules of the network, which become its attributes.
    """

    def __init__(self, forward, **modules):
        super().__init__()
        self._function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self._function(self, *inputs)


class Holder(nn.Module):
    """A network that is a function of itself and an input, with constants as buffers."""

    def __init__(self, function, **constants):
        super().__init__()
        self._function = function
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self._function(self, x)


def plain_inputs(model, images):
    """Return the inputs of the activations of a `Residual`, by name, computed step by step without hooks."""
    x1 = model.bn1(model.conv1(images))
    y1 = x1.clone().relu()
    x2 = model.bn2(model.conv2(y1)) + y1
    x3 = model.fc1(x2.clone().relu().flatten(1))
    return {"relu1": x1, "relu2": x2, "gelu": x3}


def make_part():
    """Return a small network with one activation at the top level and one inside a nested `Sequential`."""
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 5), nn.GELU()))
