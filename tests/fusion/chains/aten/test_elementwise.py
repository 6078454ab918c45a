"""Sums, differences, products and quotients with constants are read as scales and shifts, whatever PyTorch calls them."""

import pytest
import torch
from torch import nn

from fastentropy.fusion.chains.aten import read_weighted_sum
from tests._helpers.networks import Holder
from tests._helpers.operators import close, normal
from tests._helpers.reading import read_node


def last_node(model, *inputs):
    module = torch.export.export(model, inputs).module(check_guards=False)
    (output,) = module.graph.find_nodes(op="output")
    (node,) = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    return node, module


SCALES = {
    "-x": lambda m, x: -x,
    "torch.negative(x)": lambda m, x: torch.negative(x),
    "1 - x": lambda m, x: 1 - x,
    "channels - x": lambda m, x: m.channels - x,
    "rsub(x, 2, alpha=3)": lambda m, x: torch.rsub(x, 2, alpha=3),
    "rsub(x, channels, alpha=3)": lambda m, x: torch.rsub(x, m.channels, alpha=3),
    "x + 2.5 channels": lambda m, x: torch.add(x, m.channels, alpha=2.5),
    "channels + 2.5 x": lambda m, x: torch.add(m.channels, x, alpha=2.5),
    "x - 2 channels": lambda m, x: torch.sub(x, m.channels, alpha=2),
    "channels - 2 x": lambda m, x: torch.sub(m.channels, x, alpha=2),
    "x - 3 times 2": lambda m, x: torch.sub(x, 3.0, alpha=2),
    "x + x": lambda m, x: x + x,
    "x + 3 x": lambda m, x: torch.add(x, x, alpha=3),
    "subtract": lambda m, x: torch.subtract(x, m.channels),
    "multiply": lambda m, x: torch.multiply(x, m.channels),
    "divide": lambda m, x: torch.divide(x, m.channels),
    "true_divide": lambda m, x: torch.true_divide(x, m.one),
}


@pytest.mark.parametrize("name", SCALES)
def test_every_scale_and_shift_is_read(name):
    model = Holder(SCALES[name], channels=normal(1, 4, 1, 1, seed=1), one=normal(1, seed=2))
    x = normal(2, 4, 3, 5, seed=0)
    node, module = last_node(model, x)
    operator = read_node(node, module).build(2)
    assert operator.is_channelwise
    close(operator(x), model(x))


@pytest.mark.parametrize("name", ["sub_", "subtract_", "neg_", "negative_", "multiply_", "divide_", "true_divide_", "add_"])
def test_operators_in_place_are_read_as_the_others(name):
    operands = () if name.startswith("neg") else (torch.tensor(3.0),)
    model = Holder(lambda m, x: getattr(x.sin(), name)(*(m.three for _ in operands)), three=torch.tensor(3.0).double())
    x = normal(2, 4, 3, 5, seed=0)
    node, module = last_node(model, x)
    assert str(node.target).startswith(f"aten.{name}.")
    close(read_node(node, module).build(2)(x.sin()), model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x + y,
        lambda x, y: x - y,
        lambda x, y: torch.rsub(x, y),
        lambda x, y: torch.rsub(x, y, alpha=3),
        lambda x, y: torch.add(x, y, alpha=-0.5),
        lambda x, y: torch.sub(x, y, alpha=2),
        lambda x, y: torch.lerp(x, y, 0.3),
        lambda x, y: x.clone().sub_(y, alpha=0.25),
        lambda x, y: torch.subtract(x, y),
    ],
)
def test_weighted_sums_have_the_weights_of_their_operator(function):
    class Two(nn.Module):
        def forward(self, x, y):
            return function(x, y)

    x, y = normal(2, 3, seed=0), normal(2, 3, seed=1)
    node, _ = last_node(Two(), x, y)
    operands, (first, second) = read_weighted_sum(node)
    assert len(set(operands)) == 2
    close(first * x + second * y, function(x, y))


@pytest.mark.parametrize("function", [lambda x: x * 2, lambda x: x.sin(), lambda x: x / x, lambda x: torch.lerp(x, x * x, x)])
def test_other_operators_are_no_weighted_sums(function):
    node, _ = last_node(Holder(lambda m, x: function(x)), normal(2, 3, seed=0))
    assert read_weighted_sum(node) is None
