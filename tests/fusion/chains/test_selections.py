"""Selections compute what their weights say, compose like convolutions, and run as operators that only copy."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator, stack
from fastentropy.fusion.chains.elements import BorderCorrected, Concatenation, Flatten, cost, output_shape, run
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import compose_chain, composed_shape, merge, placeholder_weights
from fastentropy.fusion.chains.passes import fold, fuse_pairs, move_pools_forward, move_upsampling_back
from fastentropy.fusion.chains.selections import (
    Selection,
    is_exact_factor,
    pixel_shuffle,
    pixel_unshuffle,
    repeated_positions,
    selected_channels,
)
from tests._helpers.chains import SELECTING, chains, concatenations, pytorch_chain, selections
from tests._helpers.operators import REFUSALS, attempt, close, normal, pytorch_output

CPU = torch.device("cpu")


def convolution(in_channels, out_channels, kernel):
    """Return a convolution of images with random weights that keeps the spatial size."""
    weight = normal(out_channels, in_channels, kernel, kernel, seed=kernel)
    return AffineOperator(weight, normal(out_channels, seed=1), (1, 1), (kernel // 2,) * 2, (1, 1))


@settings(max_examples=60)
@given(st.data(), st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 8]))
def test_a_selection_equals_its_weight(data, axes, channels):
    selection = data.draw(selections(channels, axes))
    x = normal(2, channels, *data.draw(st.lists(st.integers(3, 7), min_size=axes, max_size=axes)), seed=0)
    expected = pytorch_output(selection, x)
    assert torch.equal(selection(x), expected)
    assert torch.equal(selection(x), pytorch_output(selection.as_convolution(), x))
    assert selection.output_shape(x.shape) == expected.shape


@settings(max_examples=20)
@given(st.data(), st.integers(0, 2))
def test_stacked_operators_equal_the_concatenation(data, axes):
    element = data.draw(concatenations(3, axes).filter(lambda e: () not in e.branches))
    x = normal(2, 3, *[5] * axes, seed=1)
    stacked = stack([branch[0] for branch in element.branches])
    assert stacked.groups == 1
    close(pytorch_output(stacked, x), pytorch_chain((element,), x))


@pytest.mark.slow
@settings(max_examples=120)
@given(chains(kinds=SELECTING))
def test_a_merged_chain_equals_the_chain(drawn):
    chain, x, y = drawn
    close(run(chain, x), y)
    assert output_shape(chain, x.shape) == y.shape
    merged, reason = attempt(merge, chain, x.shape[2:])
    if merged is None:
        assert re.search(REFUSALS, reason)
    else:
        close(run(merged, x), y)
        assert isinstance(merged[0], AffineOperator | BorderCorrected)
        assert not isinstance(merged[0], Selection)


@pytest.mark.slow
@settings(max_examples=60)
@given(chains(kinds=SELECTING, longest=4))
def test_compiled_and_merged_chains_compile(drawn):
    chain, x, y = drawn
    close(compile_chain(chain, x)(x), y)
    merged, _ = attempt(merge, chain, x.shape[2:])
    if merged is not None:
        close(compile_chain(merged, x)(x), y)


@settings(max_examples=40)
@given(chains(kinds=SELECTING, flatten=False))
def test_merging_for_every_size_is_exact_at_another_size(drawn):
    chain, x, _ = drawn
    merged, _ = attempt(merge, chain, None)
    assume(merged is not None)
    larger = normal(2, x.shape[1], *(size + 6 for size in x.shape[2:]), seed=7)
    close(run(merged, larger), pytorch_chain(chain, larger))


@pytest.mark.slow
@settings(max_examples=30)
@given(chains(kinds=SELECTING, flatten=False, most_axes=2))
def test_placeholders_have_the_shape_and_the_bias_of_the_composition(drawn):
    chain, _, _ = drawn
    composed, _ = attempt(compose_chain, chain)
    assume(composed is not None)
    sketch, placeholder = composed_shape(chain), placeholder_weights(chain)
    assert sketch.weight.shape == placeholder.weight.shape == composed.weight.shape
    assert sketch.axes == placeholder.axes == composed.axes
    close(placeholder.bias, composed.bias)


@settings(max_examples=40)
@given(chains(kinds=(*SELECTING, "pool"), flatten=False))
def test_passes_keep_the_function_and_the_selections(drawn):
    chain, x, y = drawn
    for changed in (fold(chain), move_pools_forward(chain), fuse_pairs(chain)):
        close(run(changed, x), y)
        assert sum(isinstance(e, Selection) for e in changed) == sum(isinstance(e, Selection) for e in chain)


@pytest.mark.parametrize(
    ("selection", "shape", "expected"),
    [
        (pixel_shuffle(3, 2, CPU), (2, 12, 4, 5), lambda x: F.pixel_shuffle(x, 2)),
        (pixel_unshuffle(3, 2, CPU), (2, 3, 4, 6), lambda x: F.pixel_unshuffle(x, 2)),
        (repeated_positions(3, (2, 3), CPU), (2, 3, 4, 5), lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)),
        (selected_channels(torch.tensor([2, 0, 0]), 3, 2), (2, 3, 4, 5), lambda x: x[:, [2, 0, 0]]),
    ],
)
def test_selections_are_those_of_pytorch_and_only_copy(selection, shape, expected):
    x = torch.randn(shape)
    compiled = compile_chain((selection,), x)
    for values in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(compiled(values), expected(values))
    assert not any("conv" in str(node.target) for node in compiled.graph.nodes)
    counted = cost((selection,), shape, 4)
    assert counted.multiplications == 0
    assert counted.bytes <= 4 * (x.numel() + expected(x).numel())


def test_a_cut_input_is_unshuffled_without_its_last_positions():
    x = normal(1, 2, 5, 7, seed=0)
    selection = pixel_unshuffle(2, 2, CPU)
    expected = F.pixel_unshuffle(x[:, :, :4, :6], 2)
    assert torch.equal(selection(x), expected)
    assert torch.equal(compile_chain((selection,), x)(x), expected)


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_a_bias_in_front_of_repeated_positions_is_no_map(bias):
    layer = replace(convolution(2, 3, 1), bias=torch.full((3,), bias).double())
    repeat, behind = repeated_positions(3, (2, 2), CPU), convolution(3, 2, 3)
    (merged,) = merge((layer, repeat), (5, 6))
    assert merged.bias.ndim == 1
    for size in ((5, 6), None)[: 1 if bias else 2]:
        merged = merge((layer, repeat, behind), size)
        x = normal(2, 2, 5, 6, seed=1)
        close(run(merged, x), pytorch_chain((layer, repeat, behind), x))


def test_a_convolution_behind_repeated_positions_needs_fewer_multiplications():
    chain = (repeated_positions(4, (2, 2), CPU), convolution(4, 4, 3))
    (merged,) = merge(chain, (8, 8))
    assert merged.multiplications((1, 4, 8, 8)) == chain[1].multiplications((1, 4, 16, 16)) * 4 // 9


def test_a_concatenation_has_the_cost_of_its_branches_and_of_a_copy():
    layer = convolution(4, 5, 1)
    element, shape = Concatenation(((layer,), ()), 2), (2, 4, 3, 3)
    alone, both = cost((layer,), shape, 8), cost((element,), shape, 8)
    assert both.multiplications == alone.multiplications
    assert both.bytes == alone.bytes + 8 * 2 * 2 * 9 * 9


def test_a_selection_in_front_of_a_flattening_is_no_layer():
    x = normal(2, 3, 2, 2, seed=0)
    chain = (pixel_unshuffle(3, 2, CPU), Flatten())
    compiled = compile_chain(chain, x)
    assert torch.equal(compiled(x), run(chain, x))
    assert not any("linear" in str(node.target) for node in compiled.graph.nodes)


@settings(max_examples=60)
@given(st.integers(1, 64), st.integers(1, 2000))
def test_exact_factors_repeat_every_position(factor, size):
    assume(is_exact_factor(factor, factor * size))
    x = torch.arange(size, dtype=torch.float32).reshape(1, 1, -1)
    repeated = F.interpolate(x, scale_factor=factor)
    assert torch.equal(repeated, x.repeat_interleave(factor, 2))


@settings(max_examples=30)
@given(chains(kinds=("selection", "pointwise", "batch norm", "same"), flatten=False))
def test_moving_upsampling_back_keeps_the_function(drawn):
    chain, x, y = drawn
    moved = move_upsampling_back(chain)
    close(run(moved, x), y)
    for first, second in itertools.pairwise(moved):
        repeats = isinstance(first, Selection) and first.repeats
        assert not repeats or not isinstance(second, AffineOperator) or not second.is_pointwise


def test_upsampling_moves_behind_all_pointwise_operators():
    layers = convolution(3, 4, 1), convolution(4, 2, 1)
    moved = move_upsampling_back((repeated_positions(3, (2, 3), CPU), *layers, convolution(2, 2, 3)))
    assert moved[:2] == layers
    assert moved[2].repeats
    assert moved[2].out_channels == 2
