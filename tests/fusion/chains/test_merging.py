"""A merged chain computes what the chain computes, at every position, in float64 and in float32."""

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains import merging
from fastentropy.fusion.chains.affine import AffineOperator, compose
from fastentropy.fusion.chains.borders import valid_range
from fastentropy.fusion.chains.elements import BorderCorrected, Flatten, Sum, output_shape, run
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import compose_chain, composed_shape, merge
from tests._helpers.chains import chains, pytorch_chain
from tests._helpers.operators import (
    REFUSALS,
    SEEDS,
    attempt,
    average,
    channelwise,
    close,
    convolution,
    convolutions,
    normal,
    pytorch_output,
    size_after,
)


@pytest.mark.slow
@settings(max_examples=150)
@given(chains())
def test_a_merged_chain_equals_the_chain_at_every_position(drawn):
    chain, x, y = drawn
    merged, reason = attempt(merge, chain, x.shape[2:])
    if merged is None:
        assert re.search(REFUSALS, reason)
    else:
        close(run(merged, x), y)
        assert isinstance(merged[0], AffineOperator | BorderCorrected)
        assert merged[1:] == (Flatten(),) * isinstance(chain[-1], Flatten)


@settings(max_examples=40)
@given(chains(kinds=("same", "batch norm", "residual", "pointwise"), flatten=False))
def test_padded_chains_merge_while_an_inner_position_is_left(drawn):
    chain, x, y = drawn
    ranges = [valid_range(chain, axis, size) for axis, size in enumerate(x.shape[2:])]
    nothing_left = any(valid.start >= valid.stop for valid in ranges)
    merged, reason = attempt(merge, chain, x.shape[2:])
    assert (merged is None) == nothing_left or "different sizes" in reason
    if merged is not None:
        close(run(merged, x), y)


@pytest.mark.slow
@settings(max_examples=100)
@given(chains(batch=4))
def test_a_merged_chain_is_exact_in_float32(drawn):
    chain, x, y = drawn
    merged, _ = attempt(merge, chain, x.shape[2:])
    if merged is not None:
        actual = compile_chain(merged, x.float())(x.float()).double()
        assert (actual - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.slow
@settings(max_examples=25)
@given(chains(flatten=False))
def test_a_merged_chain_is_exact_without_a_batch(drawn):
    chain, x, y = drawn
    merged, _ = attempt(merge, chain, x.shape[2:])
    if merged is not None:
        close(run(merged, x[0]), y[0])


@settings(max_examples=25)
@given(st.data(), st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_linear_layers_merge_into_one(data, widths):
    layers = []
    for width, features in itertools.pairwise(widths):
        if data.draw(st.booleans()):
            layers.append(AffineOperator(normal(width, 1, seed=data.draw(SEEDS)), normal(width, seed=1), groups=width))
        layers.append(AffineOperator(normal(features, width, seed=data.draw(SEEDS)), normal(features, seed=2)))
    back = AffineOperator(normal(widths[0], widths[-1], seed=3), normal(widths[0], seed=4))
    for chain in (tuple(layers), (Sum(((*layers, back), ())),)):
        (merged,) = merge(chain, ())
        x = normal(2, 3, widths[0], seed=data.draw(SEEDS))
        close(pytorch_output(merged, x), pytorch_chain(chain, x))
        assert (merged.in_channels, merged.out_channels) == (widths[0], pytorch_chain(chain, x).shape[-1])


@pytest.mark.parametrize("widths", [(64, 8, 8, 2), (2, 8, 8, 64)])
def test_linear_layers_are_composed_from_the_narrow_end(monkeypatch, widths):
    chain = tuple(AffineOperator(normal(b, a, seed=b), normal(b, seed=a)) for a, b in itertools.pairwise(widths))
    composed = []
    monkeypatch.setattr(merging, "compose", lambda *pair: composed.append(compose(*pair)) or composed[-1])
    (merged,) = merge(chain, ())
    assert {min(each.in_channels, each.out_channels) for each in composed} == {2}
    x = normal(5, widths[0], seed=9)
    close(pytorch_output(merged, x), pytorch_chain(chain, x))


@pytest.mark.parametrize("size", [*itertools.product(range(1, 7), repeat=2), (14, 14), (1, 14), (9, 2)])
def test_a_residual_block_is_merged_between_its_borders(size):
    block = (Sum(((convolution(6, 4, 3, 1), channelwise(6, 1), convolution(4, 6, 3, 1, seed=2)), ())), channelwise(4, 5))
    x = normal(2, 4, *size, seed=3)
    if min(size) < 3:
        with pytest.raises(ValueError, match="inner zero padding: one operator would be wrong at every position"):
            merge(block, size)
    else:
        (merged,) = merge(block, size)
        close(run((merged,), x), pytorch_chain(block, x))
        assert merged.interior.kernel == (5, 5)
        assert [(strip.axis, *strip.output) for strip in merged.strips] == [
            (axis, *ends) for axis, n in enumerate(size) for ends in ((0, 1), (n - 1, n))
        ]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (8, 8)])
def test_an_inverted_residual_block_merges_into_one_operator(size):
    inner = (
        convolution(12, 4, 1),
        channelwise(12, 1),
        convolution(12, 12, 3, 1, groups=12, seed=2),
        convolution(4, 12, 1, seed=3),
    )
    block = (Sum((inner, ())),)
    (merged,) = merge(block, size)
    assert merged.groups == 1
    if size == (1, 1):  # only the tap in the middle reads a value
        assert (merged.kernel, merged.padding) == ((1, 1), ((0, 0), (0, 0)))
    else:
        assert (merged.kernel, merged.padding) == ((3, 3), ((1, 1), (1, 1)))
    x = normal(3, 4, *size, seed=4)
    close(pytorch_output(merged, x), pytorch_chain(block, x))
    assert size == (1, 1) or merged.border_bias or merged.bias.shape == (4, *size)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data())
def test_an_expanded_convolution_merges_at_every_size(data):
    """1×1, any grouped convolution and 1×1, all with biases; the input is added if the sizes allow it."""
    axes = data.draw(st.integers(1, 3))
    channels = data.draw(st.sampled_from([1, 2, 3]))
    expand = data.draw(convolutions(axes, channels, "pointwise"))
    middle = data.draw(convolutions(axes, expand.out_channels, "strided"))
    project = data.draw(convolutions(axes, middle.out_channels, "pointwise"))
    chain = (expand, middle, project)
    x = normal(2, channels, *(data.draw(st.integers(1, 6)) for _ in range(axes)), seed=data.draw(SEEDS))
    assume(all(size_after(middle, size_after(expand, x.shape[2:]))))
    (merged,) = merge(chain, x.shape[2:])
    close(pytorch_output(merged, x), pytorch_chain(chain, x))
    ones = (1,) * axes
    closed = AffineOperator(normal(channels, project.out_channels, *ones, seed=1), normal(channels, seed=2), ones, ones, ones)
    closed = replace(closed, padding=(0,) * axes)
    block = (Sum(((*chain, closed), ())),)
    if any(axis.reach != axis.before + axis.after for axis in middle.axes) or any(max(o.stride) > 1 for o in chain):
        with pytest.raises(ValueError, match="different sizes"):
            merge(block, x.shape[2:])
    else:
        (merged,) = merge(block, x.shape[2:])
        close(pytorch_output(merged, x), pytorch_chain(block, x))


@pytest.mark.parametrize("seed", range(3))
def test_a_block_with_a_downsampling_branch_merges(seed):
    long = (convolution(6, 4, 1, seed=seed), convolution(8, 6, 3, 1, stride=2, seed=seed + 1))
    block = (convolution(4, 2, 1, seed=9), Sum((long, (convolution(8, 4, 1, stride=2, seed=seed + 2),))))
    x = normal(2, 2, 7, 6, seed=seed)
    (merged,) = merge(block, (7, 6))
    close(pytorch_output(merged, x), pytorch_chain(block, x))


@pytest.mark.parametrize(
    ("chain", "axes"),
    [
        ((convolution(6, 4, 3, 1), channelwise(6), convolution(4, 6, 3)), 1),
        ((convolution(6, 4, 1), convolution(4, 6, 3, 1)), 3),
        ((convolution(6, 4, 2, 1, upsampling=2), channelwise(6), convolution(4, 6, 1)), 1),
    ],
)
def test_the_bias_is_a_map_only_where_it_must_be(chain, axes):
    (merged,) = merge(chain, (7, 8))
    assert merged.has_uniform_bias == (axes == 1)
    if not merged.border_bias:
        assert merged.bias.shape == (4, *output_shape(chain, (1, 4, 7, 8))[2:])[:axes]


def test_a_classifier_behind_a_pool_merges_and_is_flattened():
    """A convolution, global average pooling and two linear layers on the flattened result."""
    head = (convolution(6, 4, 3, 1), average(6, 7, 8), convolution(5, 6, 1, seed=3), convolution(2, 5, 1, seed=5), Flatten())
    merged = merge(head, (7, 8))
    x = normal(2, 4, 7, 8, seed=0)
    assert run(merged, x).shape == (2, 2)
    close(run(merged, x), pytorch_chain(head, x))


@pytest.mark.slow
@settings(max_examples=25)
@given(chains(flatten=False, most_axes=2))
def test_composed_shape_agrees_with_the_composition(drawn):
    chain, _, _ = drawn
    (sketch, why_no_sketch), (operator, reason) = (attempt(f, chain) for f in (composed_shape, compose_chain))
    assert why_no_sketch == reason
    if operator is not None:
        assert (sketch.weight.device.type, sketch.bias.device.type) == ("meta", "meta")
        assert (sketch.weight.shape, sketch.bias.shape) == (operator.weight.shape, operator.bias.shape)
        assert (sketch.axes, sketch.groups) == (operator.axes, operator.groups)
