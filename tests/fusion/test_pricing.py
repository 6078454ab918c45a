"""Forms of equal structure are priced once, whatever their weights, and planning takes no more than it must."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastentropy as fe
from fastentropy.fusion import chain_error, planner
from fastentropy.fusion.chain_error import ChainReference
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Sum, run
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.pricing import SharedPrices, structure
from tests._helpers.operators import average, channelwise, convolution, normal


class Counter:
    """A price that counts what it is asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, forms, inputs):
        self.asked.append(len(forms))
        return {key: float(len(form)) for key, form in forms.items()}


@pytest.fixture
def timed(monkeypatch):
    """Counts the forms that are timed."""
    counter = Counter()
    monkeypatch.setattr(planner, "measured", counter)
    return counter


class MLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x):
        return x + self.layers(x)


@pytest.mark.slow
def test_equal_blocks_are_timed_once(timed):
    pieces = []
    for blocks in (1, 2, 6):
        timed.asked.clear()
        model = nn.Sequential(*(MLP(8, 32) for _ in range(blocks))).eval()
        report = fe.fuse(model, (torch.randn(2, 5, 8),)).report
        assert len(report.chains) == blocks
        pieces.append(sum(timed.asked))
    assert pieces[0] == pieces[1] == pieces[2] > 0


def test_equal_blocks_have_one_choice_and_their_own_weights(timed):
    torch.manual_seed(1)
    model = nn.Sequential(*(MLP(8, 32) for _ in range(3))).eval()
    fused = fe.fuse(model, (torch.randn(2, 5, 8),))
    assert {chain.choice for chain in fused.report.chains} == {"merge"}
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(fused(x), model(x))


def test_blocks_of_another_shape_are_timed_by_themselves(timed):
    model = nn.Sequential(MLP(8, 32), MLP(8, 64), MLP(8, 32)).eval()
    fe.fuse(model, (torch.randn(2, 5, 8),))
    two = sum(timed.asked)
    timed.asked.clear()
    fe.fuse(nn.Sequential(MLP(8, 32)).eval(), (torch.randn(2, 5, 8),))
    assert two == 2 * sum(timed.asked)


def test_only_times_measured_side_by_side_are_compared():
    counter = Counter()
    prices = SharedPrices(counter)
    one, two, three = ((convolution(out, 4, 1),) for out in (4, 5, 6))
    x = normal(1, 4, 3, 3, seed=0)
    assert prices({"a": one, "b": two}, dict.fromkeys("ab", x)) == {"a": 1.0, "b": 1.0}
    prices({"c": (convolution(4, 4, 1, seed=9),)}, {"c": x})
    assert counter.asked == [2]
    prices({"a": one, "d": three}, dict.fromkeys("ad", x))
    prices({"a": one}, {"a": normal(2, 4, 3, 3, seed=0)})
    assert counter.asked == [2, 2, 1]


LAYER = convolution(4, 4, 3, 1)
DIFFERENT = [
    replace(LAYER, weight=normal(4, 4, 1, 1, seed=0), padding=(0, 0)),
    replace(LAYER, bias=torch.zeros(4).double()),
    replace(LAYER, bias=normal(4, 5, 5, seed=0)),
    replace(LAYER, stride=(2, 2)),
    replace(LAYER, weight=normal(4, 2, 3, 3, seed=0), groups=2),
    average(4, 3, 3),
    convolution(4, 4, 3, 1, groups=4),
    channelwise(4),
    replace(channelwise(4), weight=torch.ones(4, 1, 1, 1).double()),
    Sum(((LAYER,), ())),
    Sum(((LAYER,), (LAYER,))),
    *merge((convolution(4, 4, 3, 1), convolution(4, 4, 3, 1)), (9, 9)),
    *merge((convolution(4, 4, 1), convolution(4, 4, 3, 1)), (40, 40)),
]


def test_structures_that_run_differently_differ():
    structures = [structure((element,)) for element in (LAYER, *DIFFERENT)]
    assert len(set(structures)) == len(structures)
    assert structure((convolution(4, 4, 3, 1, seed=7),)) == structures[0]


@pytest.mark.slow
@pytest.mark.parametrize("measure", [True, False])
def test_planning_is_linear_in_the_length(timed, monkeypatch, measure):
    """Stretches that are merged for a trial, of layers that all have another shape and are all worth merging."""
    merged = []
    monkeypatch.setattr(planner, "merge", lambda chain, *rest: merged.append(len(chain)) or merge(chain, *rest))
    counts = []
    for length in (12, 18, 24):
        merged.clear()
        sizes = [3 + index % 7 + (index % 3) * (index % 5) for index in range(length + 1)]
        model = nn.Sequential(*(nn.Linear(*pair) for pair in itertools.pairwise(sizes))).eval()
        report = fe.fuse(model, (torch.randn(2, sizes[0]),), measure=measure).report
        assert [len(chain.names) for chain in report.chains] == [length]
        counts.append(len(merged))
    assert counts[2] - counts[1] <= 1.2 * (counts[1] - counts[0])


class Doubling(nn.Module):
    def __init__(self, length, double):
        super().__init__()
        self.layers, self.double = nn.ModuleList(nn.Linear(4, 4) for _ in range(length)), double

    def forward(self, x):
        for layer in self.layers:
            x = self.double(layer(x))
        return x


@pytest.mark.slow
@pytest.mark.parametrize("double", [lambda x: x + x, lambda x: torch.sub(x, x, alpha=-2), lambda x: x - 3 * x])
def test_value_that_is_read_twice_stays_one_value(double):
    operators = []
    for length in (3, 6, 12):
        model = Doubling(length, double).eval()
        fused = fe.fuse(model, (torch.randn(2, 4),), measure=False)
        (chain,) = fused.report.chains
        assert len(chain.names) == length
        operators.append(chain.candidates["keep"].operators)
        x = torch.randn(3, 4)
        expected = model(x)
        assert (fused(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert operators[2] - operators[1] == 2 * (operators[1] - operators[0])


def blocks():
    return convolution(12, 3, 1), convolution(12, 12, 3, 1, groups=12, seed=3), convolution(4, 12, 1, seed=4)


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_reads_the_corners_of_large_images(monkeypatch, stride):
    """In float64, the chain runs on a small part of a large image, whatever its size."""
    read = []
    monkeypatch.setattr(chain_error, "run", lambda chain, x: read.append(x.numel()) or run(chain, x))
    chain = (*blocks(), convolution(3, 4, 5, 2, stride=stride, seed=8))
    numbers = []
    for size in (100, 200):
        read.clear()
        x = torch.randn(2, 3, size, size)
        reference = ChainReference(chain, x)
        numbers.append(sum(read))
        assert reference.error(chain) < 1e-5
    assert numbers[0] == numbers[1] < 2 * 3 * 100**2 / 2


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
@pytest.mark.parametrize("axis", [0, 1])
def test_reference_sees_an_error_at_any_corner(corner, axis):
    chain, x = blocks(), torch.randn(1, 3, 90, 70)
    (merged,) = merge(chain, (90, 70))
    reference = ChainReference(chain, x)
    assert reference.error((merged,)) < 1e-5
    slabs = []
    for slab in merged.border_bias:
        at_start = slab.positions[0] == 0
        wrong = slab.axis == axis and at_start == (corner[axis] == 0)
        slabs.append(slab._replace(values=slab.values + 1) if wrong else slab)
    assert reference.error((replace(merged, border_bias=tuple(slabs)),)) > 1e-2


def test_reference_sees_an_error_of_the_interior():
    chain, x = blocks(), torch.randn(1, 3, 90, 70)
    (merged,) = merge(chain, (90, 70))
    wrong = replace(merged, weight=merged.weight * 1.01)
    assert ChainReference(chain, x).error((wrong,)) > 1e-3


def test_reference_of_layers_reads_some_rows():
    layers = tuple(AffineOperator(normal(o, i, seed=0), normal(o, seed=0)) for o, i in [(9, 4), (3, 9)])
    assert ChainReference(layers, torch.randn(2, 500, 4)).error(layers) < 1e-5
    wrong = replace(layers[1], bias=layers[1].bias + 0.1)
    assert ChainReference(layers, torch.randn(4)).error((layers[0], wrong)) > 1e-3
