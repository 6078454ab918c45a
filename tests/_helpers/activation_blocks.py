"""Small modules that call activations in several ways, and functions that compare models or list their sites."""

import contextlib
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import find_sites

VECTOR = (4, 3)


class Block(nn.Module):
    """The base class of small modules: two linear layers and a GELU module. Subclasses define the forward."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 5), nn.Linear(5, 5)
        self.act = nn.GELU()


class Functional(Block):
    def forward(self, x):
        return torch.relu(self.fc2(F.relu(self.fc1(x))))


class Helper(Block):
    def helper(self, x, bias=0.25):
        return F.relu(self.fc1(x) + bias)

    def forward(self, x):
        return F.relu(0.5 - self.helper(x))


def outputs_equal(left, right, x):
    """Return whether two models have equal outputs for `x`, without a tolerance. Both models are put into eval mode."""
    with torch.no_grad():
        return torch.equal(left.eval()(x.clone()), right.eval()(x.clone()))


@contextlib.contextmanager
def no_warnings():
    """Raise every warning of the `with` block as an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def names(model, x):
    """Return the names of the sites (calls of an activation) of a model with the input `x`, in call order."""
    return [site.name for site in find_sites(model, (x,))]
