"""Sums and differences of any number of branches belong to chains, and the chains compute the same."""

import operator
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy.fusion.chains.elements import Sum
from fastentropy.fusion.chains.finding import find_chains
from tests._helpers.linear_networks import IMAGES, image_network
from tests._helpers.networks import Reads
from tests.fusion.chains.test_finding import assert_computes, names, traced

JOINS = {
    "x - y": operator.sub,
    "-x + y": lambda x, y: -x + y,
    "x + -1.0 y": lambda x, y: x + -1.0 * y,
    "rsub": torch.rsub,
    "rsub with alpha": lambda x, y: torch.rsub(x, y, alpha=0.5),
    "add with alpha": lambda x, y: torch.add(x, y, alpha=2),
    "sub with alpha": lambda x, y: torch.sub(x, y, alpha=-1.5),
    "sub_": lambda x, y: x.clone().sub_(y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "1 - (x - y)": lambda x, y: 1 - (x - y),
    "a scaled residual": lambda x, y: x * 0.5 + y,
}


@pytest.mark.parametrize("name", JOINS)
def test_a_difference_of_branches_belongs_to_the_chain(name):
    """The value that is shared is the output of a convolution, so the chain begins before it."""
    model = image_network(lambda m, x: m.whole(JOINS[name](y := m.a(x), m.b(y))))
    (chain,) = assert_computes(traced(model, IMAGES), IMAGES)
    assert chain.names == ("a", "b", "whole")


def test_the_order_of_a_difference_counts():
    for forward in (lambda m, x: x - m.b(m.a(x)), lambda m, x: m.b(m.a(x)) - x):
        (chain,) = assert_computes(traced(image_network(forward), IMAGES), IMAGES)
        assert [type(element) for element in chain.elements] == [Sum]


def test_a_sum_of_many_branches_is_one_element():
    model = image_network(lambda m, x: m.a(x) - m.b(x) + 2 * m.c(x) - x, c=nn.Conv2d(4, 4, 1))
    (chain,) = assert_computes(traced(model, IMAGES), IMAGES)
    (element,) = chain.elements
    assert [len(branch) for branch in element.branches] == [1, 2, 2, 1]


def test_a_value_added_to_itself_is_computed_once():
    (chain,) = assert_computes(traced(image_network(lambda m, x: m.b((y := m.a(x)) + y)), IMAGES), IMAGES)
    assert chain.names == ("a", "b")


def test_doubling_is_linear_in_the_length():
    def forward(m, x):
        for _ in range(12):
            x = m.b(x)
            x = x + x
        return x

    assert [len(each) for each in names(image_network(forward), IMAGES)] == [12]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) - m.relu(x),
        lambda m, x: m.b(x) - x[:1],
        lambda m, x: (y := m.relu(x)).sub_(m.b(m.a(y))) * 2,
    ],
)
def test_differences_of_other_values_end_a_chain(forward):
    assert all("sub" not in str(node.target) for node in _members(image_network(forward)))


def _members(model):
    return [node for chain in find_chains(traced(model, IMAGES)) for node in chain.members]


class RepMixer(nn.Module):
    """The token mixer of FastViT (Vasu et al., arXiv 2303.14189): x + γ · (mixer(x) − norm(x))."""

    def __init__(self):
        super().__init__()
        self.mix, self.point = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Conv2d(4, 4, 1, groups=4, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.gamma = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        mixed = self.norms[0](self.mix(x)) + self.norms[1](self.point(x)) + self.norms[2](x)
        return x + self.gamma * (mixed - self.norms[3](x))


class Denoiser(nn.Module):
    """The output of DnCNN (Zhang et al., arXiv 1608.03981) is x minus the noise that its layers predict."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 32, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1))

    def forward(self, x):
        return x - self.layers(x)


class PoolMixer(nn.Module):
    """The token mixer of PoolFormer (Yu et al., arXiv 2111.11418), pool(x) − x, between pointwise convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 24, 1), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(F.avg_pool2d(y, 3, 1, 1) - y)


@pytest.mark.parametrize("block", [RepMixer, Denoiser, PoolMixer])
def test_blocks_with_a_difference_become_one_convolution(block):
    model = block().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    fused = fe.fuse(model, (IMAGES,), measure=False)
    assert [node.target for node in fused.graph_module.graph.nodes if "conv" in str(node.target)] == [
        torch.ops.aten.conv2d.default
    ]
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6, 6)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_drawn_differences_compute_the_same(seed):
    """Branches of convolutions, scales and differences, nested at random, all from one value."""
    draw = random.Random(seed)
    modules = {f"c{index}": nn.Conv2d(4, 4, draw.choice([1, 3]), padding="same") for index in range(4)}

    def value(m, x, depth):
        kind = draw.choice(["input", "layer", "number", "join"] if depth else ["input", "layer"])
        if kind == "input":
            return x
        if kind == "layer":
            return getattr(m, draw.choice(list(modules)))(value(m, x, max(depth - 1, 0)))
        if kind == "number":
            return draw.choice([torch.neg, lambda y: 1 - y, lambda y: y / 3])(value(m, x, depth - 1))
        return draw.choice(list(JOINS.values()))(value(m, x, depth - 1), value(m, x, depth - 1))

    state = draw.getstate()

    def forward(m, x):
        draw.setstate(state)
        return m.c0(value(m, m.c1(x), 3) + value(m, x, 2))

    model = Reads(forward, **modules).eval()
    assert assert_computes(traced(model, IMAGES), IMAGES)
    fused = fe.fuse(model, (IMAGES,), measure=False)
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
