"""At which positions a merged operator equals its chain, and how the others are recomputed, in float64."""

import re

import pytest
import torch
from hypothesis import assume, given, settings

from fastentropy.fusion.chains.borders import border_strips, valid_range
from fastentropy.fusion.chains.elements import Sum
from fastentropy.fusion.chains.merging import compose_chain
from tests._helpers.chains import chains, pytorch_chain
from tests._helpers.operators import REFUSALS, attempt, close, convolution, pytorch_output


@settings(max_examples=40)
@given(chains(flatten=False))
def test_border_strips_are_the_complement_of_the_valid_range(drawn):
    chain, x, y = drawn
    strips, reason = attempt(border_strips, chain, x.shape[2:])
    if strips is None:
        assert re.search(REFUSALS, reason)
        return
    recomputed = [set() for _ in x.shape[2:]]
    for strip in strips:
        positions = set(range(*strip.output))
        assert positions
        assert not positions & recomputed[strip.axis]
        recomputed[strip.axis] |= positions
    for axis, size in enumerate(x.shape[2:]):
        valid = valid_range(chain, axis, size)
        assert valid.size == y.shape[2 + axis]
        assert recomputed[axis] == set(range(valid.size)) - set(range(valid.start, valid.stop))


@pytest.mark.slow
@settings(max_examples=40)
@given(chains(kinds=("same", "same", "strided", "residual"), flatten=False))
def test_a_border_strip_needs_only_its_part_of_the_input(drawn):
    chain, x, y = drawn
    strips, _ = attempt(border_strips, chain, x.shape[2:])
    for strip in strips or ():
        axis = 2 + strip.axis
        assert 0 <= strip.input[0] < strip.input[1] <= x.shape[axis]
        border = pytorch_chain(chain, x.narrow(axis, strip.input[0], strip.input[1] - strip.input[0]))
        length = strip.output[1] - strip.output[0]
        assert strip.kept[1] - strip.kept[0] == length
        close(border.narrow(axis, strip.kept[0], length), y.narrow(axis, strip.output[0], length))


@pytest.mark.slow
@settings(max_examples=40)
@given(chains(flatten=False))
def test_only_biases_differ_in_the_valid_range(drawn):
    chain, x, y = drawn
    operator, _ = attempt(compose_chain, chain)
    assume(operator is not None)
    difference = pytorch_output(operator, x) - y  # the same for all inputs, once that of the biases is subtracted
    difference = difference - (pytorch_output(operator, torch.zeros_like(x)) - pytorch_chain(chain, torch.zeros_like(x)))
    for axis, size in enumerate(x.shape[2:]):
        valid = valid_range(chain, axis, size)
        difference = difference.narrow(2 + axis, valid.start, max(valid.stop - valid.start, 0))
    close(difference, torch.zeros_like(difference))


@pytest.mark.parametrize(
    ("chain", "size", "expected"),
    [
        ((convolution(4, 4, 3, 1), convolution(4, 4, 3, 1)), 8, (1, 7)),
        ((convolution(4, 4, 3, 1), convolution(4, 4, 3, 1), convolution(4, 4, 3, 1)), 8, (2, 6)),
        ((convolution(4, 4, 3, 1), convolution(4, 4, 3)), 8, (0, 6)),
        ((convolution(4, 4, 3), convolution(4, 4, 3, 2)), 8, (2, 6)),
        ((convolution(4, 4, 3, 2), convolution(4, 4, 3, 5)), 8, (0, 18)),
        ((convolution(4, 4, 1), convolution(4, 4, 5, 2)), 8, (0, 8)),
        ((convolution(4, 4, 1, stride=2), convolution(4, 4, 3, 1)), 8, (0, 4)),
        ((convolution(4, 4, 1, stride=2), convolution(4, 4, 3, 1)), 7, (0, 4)),
        ((convolution(4, 4, 3, 1), convolution(4, 4, 3, 1, stride=2)), 9, (1, 4)),
        ((Sum(((convolution(4, 4, 3, 1), convolution(4, 4, 3, 1)), ())), convolution(4, 4, 3)), 8, (1, 5)),
        ((Sum(((convolution(4, 4, 1),), ())), convolution(4, 4, 3, 1)), 8, (0, 8)),
        ((convolution(4, 4, 2, 1, upsampling=2), convolution(4, 4, 1)), 8, (0, 16)),
    ],
)
def test_valid_range_of_known_chains(chain, size, expected):
    assert valid_range(chain, 0, size)[:2] == expected
