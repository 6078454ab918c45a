"""Chains rewritten: what is merged, folded or moved has the same function at every position, in float64 and in float32."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.borders import border_strips, right_positions, zero_response
from fastentropy.fusion.chains.elements import (
    BorderCorrected,
    Flatten,
    FusedPair,
    Sum,
    cost,
    operators,
    output_shape,
    run,
    spatial_size,
)
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import compose_chain, composed_shape, merge
from fastentropy.fusion.chains.passes import fold, fuse_pairs, move_pools_forward
from tests._helpers.chains import chains, plain_chain
from tests._helpers.operators import (
    NO_CONVOLUTION,
    SEEDS,
    attempt,
    average,
    close,
    convolution,
    convolutions,
    normal,
    plain,
    size_after,
)

#: All the reasons for which a chain is not merged.
REASONS = f"inner zero padding|{NO_CONVOLUTION}|different sizes"


def channelwise(channels, seed=0):
    return convolution(channels, channels, 1, groups=channels, seed=seed)


@settings(max_examples=150)
@given(chains())
def test_a_merged_chain_equals_the_chain_at_every_position_or_is_refused_with_a_reason(drawn):
    chain, x, y = drawn
    merged, reason = attempt(merge, chain, x.shape[2:])
    if merged is None:
        assert re.search(REASONS, reason)
    else:
        close(run(merged, x), y)
        assert isinstance(merged[0], AffineOperator | BorderCorrected)
        assert merged[1:] == (Flatten(),) * isinstance(chain[-1], Flatten)


@settings(max_examples=40)
@given(chains(kinds=("same", "batch norm", "residual", "pointwise"), flatten=False))
def test_padded_chains_of_every_size_are_refused_only_where_no_position_is_left(drawn):
    chain, x, y = drawn
    ends = [right_positions(chain, axis, size) for axis, size in enumerate(x.shape[2:])]
    nothing_left = any(start >= stop for start, stop, _ in ends)
    merged, reason = attempt(merge, chain, x.shape[2:])
    assert (merged is None) == nothing_left or "different sizes" in reason
    if merged is not None:
        close(run(merged, x), y)


@settings(max_examples=100)
@given(chains(batch=4))
def test_a_merged_chain_is_exact_in_float32(drawn):
    chain, x, y = drawn
    merged, _ = attempt(merge, chain, x.shape[2:])
    if merged is not None:
        actual = compile_chain(merged, x.float())(x.float()).double()
        assert (actual - y).abs().max() <= 1e-5 * y.abs().max()


@settings(max_examples=25)
@given(chains(flatten=False))
def test_a_merged_chain_without_a_batch_is_exact(drawn):
    chain, x, y = drawn
    merged, _ = attempt(merge, chain, x.shape[2:])
    if merged is not None:
        close(run(merged, x[0]), y[0])


@settings(max_examples=25)
@given(st.data(), st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_layers_merge_into_one(data, widths):
    layers = []
    for width, features in itertools.pairwise(widths):
        if data.draw(st.booleans()):
            layers.append(AffineOperator(normal(width, 1, seed=data.draw(SEEDS)), normal(width, seed=1), groups=width))
        layers.append(AffineOperator(normal(features, width, seed=data.draw(SEEDS)), normal(features, seed=2)))
    back = AffineOperator(normal(widths[0], widths[-1], seed=3), normal(widths[0], seed=4))
    for chain in (tuple(layers), (Sum(((*layers, back), ())),)):
        (merged,) = merge(chain, ())
        x = normal(2, 3, widths[0], seed=data.draw(SEEDS))
        close(plain(merged, x), plain_chain(chain, x))
        assert (merged.in_channels, merged.out_channels) == (widths[0], plain_chain(chain, x).shape[-1])


@settings(max_examples=40)
@given(chains(flatten=False))
def test_the_strips_are_all_positions_that_are_not_right(drawn):
    chain, x, y = drawn
    strips, reason = attempt(border_strips, chain, x.shape[2:])
    if strips is None:
        assert re.search(REASONS, reason)
        return
    recomputed = [set() for _ in x.shape[2:]]
    for strip in strips:
        positions = set(range(*strip.output))
        assert positions
        assert not positions & recomputed[strip.axis]
        recomputed[strip.axis] |= positions
    for axis, size in enumerate(x.shape[2:]):
        start, stop, output = right_positions(chain, axis, size)
        assert output == y.shape[2 + axis]
        assert recomputed[axis] == set(range(output)) - set(range(start, stop))


@settings(max_examples=40)
@given(chains(kinds=("same", "same", "strided", "residual"), flatten=False))
def test_a_strip_is_computed_from_its_part_of_the_input(drawn):
    chain, x, y = drawn
    strips, _ = attempt(border_strips, chain, x.shape[2:])
    for strip in strips or ():
        axis = 2 + strip.axis
        assert 0 <= strip.input[0] < strip.input[1] <= x.shape[axis]
        border = plain_chain(chain, x.narrow(axis, strip.input[0], strip.input[1] - strip.input[0]))
        length = strip.output[1] - strip.output[0]
        assert strip.kept[1] - strip.kept[0] == length
        close(border.narrow(axis, strip.kept[0], length), y.narrow(axis, strip.output[0], length))


@settings(max_examples=40)
@given(chains(flatten=False))
def test_at_right_positions_only_the_bias_is_not_that_of_the_composition(drawn):
    chain, x, y = drawn
    operator, _ = attempt(compose_chain, chain)
    assume(operator is not None)
    difference = plain(operator, x) - y  # one for all inputs: that of the biases
    difference = difference - (plain(operator, torch.zeros_like(x)) - plain_chain(chain, torch.zeros_like(x)))
    for axis, size in enumerate(x.shape[2:]):
        start, stop, _ = right_positions(chain, axis, size)
        difference = difference.narrow(2 + axis, start, max(stop - start, 0))
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
def test_positions_are_right_as_far_as_no_operator_reads_what_padding_hides(chain, size, expected):
    assert right_positions(chain, 0, size)[:2] == expected


@pytest.mark.parametrize("size", [*itertools.product(range(1, 7), repeat=2), (14, 14), (1, 14), (9, 2)])
def test_a_basic_block_is_merged_where_a_position_is_left_between_its_borders(size):
    block = (Sum(((convolution(6, 4, 3, 1), channelwise(6, 1), convolution(4, 6, 3, 1, seed=2)), ())), channelwise(4, 5))
    x = normal(2, 4, *size, seed=3)
    if min(size) < 3:
        with pytest.raises(ValueError, match="inner zero padding: one operator would be wrong at every position"):
            merge(block, size)
    else:
        (merged,) = merge(block, size)
        close(run((merged,), x), plain_chain(block, x))
        assert merged.interior.kernel == (5, 5)
        assert [(strip.axis, *strip.output) for strip in merged.strips] == [
            (axis, *ends) for axis, n in enumerate(size) for ends in ((0, 1), (n - 1, n))
        ]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (8, 8)])
def test_an_inverted_residual_block_merges_into_one_operator_that_is_exact_at_the_border(size):
    inner = (
        convolution(12, 4, 1),
        channelwise(12, 1),
        convolution(12, 12, 3, 1, groups=12, seed=2),
        convolution(4, 12, 1, seed=3),
    )
    block = (Sum((inner, ())),)
    (merged,) = merge(block, size)
    assert merged.groups == 1
    if size == (1, 1):  # only the tap in the middle ever reads a value
        assert (merged.kernel, merged.padding) == ((1, 1), ((0, 0), (0, 0)))
    else:
        assert (merged.kernel, merged.padding) == ((3, 3), ((1, 1), (1, 1)))
    x = normal(3, 4, *size, seed=4)
    close(plain(merged, x), plain_chain(block, x))
    assert merged.bias.shape == (4, *size) or size == (1, 1)


@settings(max_examples=40)
@given(st.data())
def test_an_expanded_convolution_of_any_geometry_merges_into_one_operator_at_every_size(data):
    """1×1, any grouped convolution, 1×1, all with biases, and the value itself added where the sizes allow it."""
    axes = data.draw(st.integers(1, 3))
    channels = data.draw(st.sampled_from([1, 2, 3]))
    expand = data.draw(convolutions(axes, channels, "pointwise"))
    middle = data.draw(convolutions(axes, expand.out_channels, "strided"))
    project = data.draw(convolutions(axes, middle.out_channels, "pointwise"))
    chain = (expand, middle, project)
    x = normal(2, channels, *(data.draw(st.integers(1, 6)) for _ in range(axes)), seed=data.draw(SEEDS))
    assume(all(size_after(middle, size_after(expand, x.shape[2:]))))
    (merged,) = merge(chain, x.shape[2:])
    close(plain(merged, x), plain_chain(chain, x))
    ones = (1,) * axes
    closed = AffineOperator(normal(channels, project.out_channels, *ones, seed=1), normal(channels, seed=2), ones, ones, ones)
    closed = replace(closed, padding=(0,) * axes)
    block = (Sum(((*chain, closed), ())),)
    if any(axis.reach != axis.before + axis.after for axis in middle.axes) or any(max(o.stride) > 1 for o in chain):
        with pytest.raises(ValueError, match="different sizes"):
            merge(block, x.shape[2:])
    else:
        (merged,) = merge(block, x.shape[2:])
        close(plain(merged, x), plain_chain(block, x))


@pytest.mark.parametrize("seed", range(3))
def test_a_block_with_a_downsample_branch_merges(seed):
    long = (convolution(6, 4, 1, seed=seed), convolution(8, 6, 3, 1, stride=2, seed=seed + 1))
    block = (convolution(4, 2, 1, seed=9), Sum((long, (convolution(8, 4, 1, stride=2, seed=seed + 2),))))
    x = normal(2, 2, 7, 6, seed=seed)
    (merged,) = merge(block, (7, 6))
    close(plain(merged, x), plain_chain(block, x))


@pytest.mark.parametrize(
    ("chain", "axes"),
    [
        ((convolution(6, 4, 3, 1), channelwise(6), convolution(4, 6, 3)), 1),
        ((convolution(6, 4, 1), convolution(4, 6, 3, 1)), 3),
        ((convolution(6, 4, 2, 1, upsampling=2), channelwise(6), convolution(4, 6, 1)), 1),
    ],
)
def test_a_bias_depends_on_the_position_only_where_it_must(chain, axes):
    (merged,) = merge(chain, (7, 8))
    assert merged.bias.ndim == axes
    assert merged.bias.shape == (4, *output_shape(chain, (1, 4, 7, 8))[2:])[:axes]


def test_a_classifier_behind_a_pool_is_merged_and_flattened():
    """A convolution, global average pooling and two linear layers of what it gives, flattened."""
    head = (convolution(6, 4, 3, 1), average(6, 7, 8), convolution(5, 6, 1, seed=3), convolution(2, 5, 1, seed=5), Flatten())
    merged = merge(head, (7, 8))
    x = normal(2, 4, 7, 8, seed=0)
    assert run(merged, x).shape == (2, 2)
    close(run(merged, x), plain_chain(head, x))


@settings(max_examples=40)
@given(chains(largest=(60, 20, 8), flatten=False))
def test_the_answer_to_zeros_is_that_to_zeros_of_the_full_size(drawn):
    chain, x, _ = drawn
    close(zero_response(chain, x.shape[2:]), plain_chain(chain, torch.zeros_like(x[:1]))[0])


def test_the_answer_to_zeros_of_a_large_size_is_read_off_a_small_one(monkeypatch):
    """A block on 512×512 images is not run on as many positions."""
    sizes = []
    monkeypatch.setattr("fastentropy.fusion.chains.borders.run", lambda chain, x: sizes.append(x.shape[2:]) or run(chain, x))
    chain = (convolution(6, 4, 3, 1, stride=2), channelwise(6), convolution(4, 6, 5, 2, seed=3))
    response = zero_response(chain, (512, 300))
    assert response.shape == (4, 256, 150)
    assert max(sizes[0]) < 20
    close(response, plain_chain(chain, torch.zeros(1, 4, 512, 300).double())[0])


@settings(max_examples=25)
@given(chains(flatten=False, most_axes=2))
def test_an_outline_has_the_sizes_of_the_merged_operator_or_none_for_the_same_reason(drawn):
    chain, _, _ = drawn
    (sketch, why_no_sketch), (operator, reason) = (attempt(f, chain) for f in (composed_shape, compose_chain))
    assert why_no_sketch == reason
    if operator is not None:
        assert (sketch.weight.device.type, sketch.bias.device.type) == ("meta", "meta")
        assert (sketch.weight.shape, sketch.bias.shape) == (operator.weight.shape, operator.bias.shape)
        assert (sketch.axes, sketch.groups) == (operator.axes, operator.groups)


@settings(max_examples=60)
@given(chains(kinds=("batch norm", "batch norm", "strided", "same", "transposed", "residual", "pool")))
def test_folding_keeps_the_function(drawn):
    chain, x, y = drawn
    folded = fold(chain)
    close(run(folded, x), y)
    assert len(operators(folded)) <= len(operators(chain))
    assert cost(folded, x.shape, 4).multiplications <= cost(chain, x.shape, 4).multiplications


@given(SEEDS)
def test_folding_leaves_no_scale_beside_a_convolution_that_can_take_it(seed):
    chain = (
        convolution(6, 4, 3, 1, seed=seed),
        channelwise(6, seed + 1),
        Sum(((channelwise(6, seed + 2), convolution(6, 6, 1, seed=seed + 3), channelwise(6, seed + 4)), ())),
        channelwise(6, seed + 5),
        convolution(4, 6, 3, 1, seed=seed + 6),
    )
    folded = fold(chain)
    x = normal(2, 4, 5, 6, seed=seed)
    close(plain_chain(folded, x), plain_chain(chain, x))
    # The one before the padded convolution stays: it would be wrong at the border.
    assert [operator.is_channelwise for operator in operators(folded)] == [False, False, True, False]


def test_an_average_is_not_folded_into():
    pool = average(4, 2, 2)
    assert [o.is_average for o in fold((channelwise(4), pool, channelwise(4, 1)))] == [False, True, False]


@settings(max_examples=40)
@given(chains(kinds=("pool", "pool", "pointwise", "batch norm", "same", "residual", "transposed")))
def test_moving_pools_forward_keeps_the_function(drawn):
    chain, x, y = drawn
    moved = move_pools_forward(chain)
    close(run(moved, x), y)
    assert len(moved) == len(chain)


@settings(max_examples=20)
@given(st.data(), st.integers(1, 3))
def test_a_pool_is_moved_before_all_pointwise_operators_that_it_follows(data, axes):
    pairs = tuple((1,) * axes for _ in range(3))
    chain = [AffineOperator(normal(2, 3, *[2] * axes, seed=0), normal(2, seed=1), *pairs)]
    for _ in range(data.draw(st.integers(0, 3))):
        chain.append(replace(data.draw(convolutions(axes, chain[-1].out_channels, "pointwise")), stride=(1,) * axes))
    moved = move_pools_forward((*chain, average(chain[-1].out_channels, *[2] * axes)))
    assert moved[0] is chain[0]
    assert moved[1].is_average
    assert list(moved[2:]) == chain[1:]


@pytest.mark.parametrize(
    "before",
    [
        convolution(4, 4, 3, 1),
        convolution(4, 4, 1, 1),
        convolution(4, 4, 1, stride=2),
        replace(convolution(4, 4, 1), bias=normal(4, 6, 6, seed=0)),
        Sum(((convolution(4, 4, 1),), ())),
    ],
)
def test_a_pool_stays_behind_what_is_not_pointwise(before):
    chain = (before, average(4, 2, 2))
    assert move_pools_forward(chain) == chain


def test_a_padded_pool_stays_where_it_is():
    chain = (convolution(4, 4, 1), average(4, 3, 3, padding=1))
    assert move_pools_forward(chain) == chain


@settings(max_examples=40)
@given(chains())
def test_pairs_in_one_kernel_keep_the_function(drawn):
    chain, x, y = drawn
    close(run(fuse_pairs(chain), x), y)
    assert operators(fuse_pairs(chain)) == operators(chain)


def dense(out_features, in_features):
    return AffineOperator(normal(out_features, in_features, seed=0), normal(out_features, seed=1))


@pytest.mark.parametrize(
    ("chain", "names"),
    [
        ((dense(128, 300), dense(300, 128)), ["linear_pair"]),
        ((dense(129, 3), dense(3, 129)), [None, None]),
        ((dense(3, 3), dense(3, 3), dense(3, 3)), ["linear_pair", None]),
        ((convolution(6, 4, 3, 1), convolution(4, 6, 1)), ["conv_pointwise"]),
        ((convolution(4, 4, 3, 1, groups=4, stride=2), convolution(8, 4, 1)), ["conv_pointwise"]),
        ((convolution(4, 4, 3, 1, groups=2), convolution(8, 4, 1)), [None, None]),
        ((convolution(8, 4, 3, 1, groups=4), convolution(8, 8, 1)), [None, None]),
        ((convolution(4, 4, 3, 1), channelwise(4)), [None, None]),
        ((convolution(4, 4, 3, 1), convolution(4, 4, 1, stride=2)), [None, None]),
        ((convolution(4, 4, 2, upsampling=2), convolution(4, 4, 1)), [None, None]),
        ((replace(convolution(4, 4, 3), padding=((0, 1), (1, 1))), convolution(4, 4, 1)), [None, None]),
        ((replace(convolution(4, 4, 1), bias=normal(4, 5, 5, seed=0)), convolution(4, 4, 1)), [None, None]),
    ],
)
def test_a_kernel_takes_the_pairs_that_it_is_written_for(chain, names):
    assert [element.name if isinstance(element, FusedPair) else None for element in fuse_pairs(chain)] == names


def test_a_pair_within_a_branch_is_a_kernel_too():
    block = (Sum(((convolution(6, 4, 3, 1), convolution(4, 6, 1)), (convolution(4, 4, 1),))),)
    assert isinstance(fuse_pairs(block)[0].branches[0][0], FusedPair)


@pytest.mark.parametrize("swap", [False, True])
def test_a_kernel_adds_its_own_input(swap):
    branches = [(convolution(6, 4, 3, 1), convolution(4, 6, 1)), ()]
    block = (Sum(tuple(branches[::-1] if swap else branches)),)
    (kernel,) = fuse_pairs(block)
    assert kernel.adds_input
    x = normal(2, 4, 5, 6, seed=0)
    close(run((kernel,), x), plain_chain(block, x))


@pytest.mark.parametrize(("shape", "size"), [((2, 4, 5, 6), (5, 6)), ((4, 5, 6), (5, 6))])
def test_the_spatial_size_is_that_of_the_last_axes(shape, size):
    assert spatial_size((Sum(((), (convolution(4, 4, 3, 1),))),), torch.zeros(shape)) == size
    assert spatial_size((dense(3, 6),), torch.zeros(shape)) == ()
