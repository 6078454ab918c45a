"""The algebra against running the operators one after the other, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn.functional import conv1d, conv2d, conv3d, linear

from fastentropy.fusion.affine import (
    AffineOperator,
    Sum,
    add,
    borders_agree,
    compose,
    fold,
    identity,
    merge,
    multiplications,
    operators,
    output_shape,
)

SEEDS = st.integers(0, 2**16)


def plain(operator, x):
    """An operator without any of our code but its numbers."""
    if not operator.stride:
        blocks = operator.weight.chunk(operator.groups)
        return linear(x, torch.block_diag(*blocks), operator.bias)
    function = {1: conv1d, 2: conv2d, 3: conv3d}[len(operator.stride)]
    bias = operator.bias if operator.bias.ndim == 1 else None
    y = function(x, operator.weight, bias, operator.stride, operator.padding, operator.dilation, operator.groups)
    return y if bias is not None else y + operator.bias


def plain_chain(chain, x):
    for element in chain:
        x = sum(plain_chain(branch, x) for branch in element.branches) if isinstance(element, Sum) else plain(element, x)
    return x


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@st.composite
def convolutions(draw, axes, in_channels, pointwise=False):
    """Any convolution from in_channels channels; pointwise ones have one tap and no padding."""
    groups = draw(st.sampled_from([g for g in range(1, in_channels + 1) if in_channels % g == 0]))
    out_channels = groups * draw(st.integers(1, 3))
    kernel = [1 if pointwise else draw(st.integers(1, 3)) for _ in range(axes)]
    stride, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(2))
    padding = tuple(0 if pointwise else draw(st.integers(0, 3)) for _ in range(axes))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    weight = torch.randn(out_channels, in_channels // groups, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_channels, generator=generator, dtype=torch.float64)
    return AffineOperator(weight, bias, stride, padding, dilation, groups)


@st.composite
def pairs(draw):
    """Two convolutions, one behind the other, and an input on which the pair has an output."""
    axes = draw(st.integers(0, 3))
    first = draw(convolutions(axes, draw(st.sampled_from([1, 2, 3, 4, 6])), pointwise=draw(st.booleans())))
    second = draw(convolutions(axes, first.out_channels))
    size = [draw(st.integers(1, 9)) for _ in range(axes)]
    shape = (2, first.in_channels, *size)
    assume(min(output_shape((first,), shape)) > 0 and min(output_shape((first, second), shape)) > 0)
    return first, second, torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(SEEDS)))


def interior(first, second, x):
    """The output positions at which no tap of the second operator falls into its padding, as an index."""
    middle = output_shape((first,), x.shape)[2:]
    output = output_shape((first, second), x.shape)[2:]
    axes = []
    for n, m, k, s, p, d in zip(output, middle, second.kernel, second.stride, second.padding, second.dilation, strict=True):
        axes.append([o for o in range(n) if o * s - p >= 0 and o * s - p + (k - 1) * d < m])
    return axes


@given(pairs())
def test_composition_equals_the_pair_wherever_no_padding_lies_between(pair):
    first, second, x = pair
    actual, expected = plain(compose(first, second), x), plain_chain((first, second), x)
    assert actual.shape == expected.shape == output_shape((first, second), x.shape)
    for position in itertools.product(*interior(first, second, x)):
        close(actual[(..., *position)] if position else actual, expected[(..., *position)] if position else expected)


@given(pairs())
def test_without_a_bias_between_the_composition_equals_the_pair_everywhere_where_borders_agree(pair):
    first, second, x = pair
    assume(borders_agree(first, second))
    first = replace(first, bias=torch.zeros_like(first.bias))
    close(plain(compose(first, second), x), plain_chain((first, second), x))


@given(pairs())
def test_one_merged_operator_equals_the_pair_everywhere_or_is_refused(pair):
    first, second, x = pair
    if borders_agree(first, second):
        close(plain(merge((first, second), x.shape[2:]), x), plain_chain((first, second), x))
    else:
        with pytest.raises(ValueError, match="inner zero padding"):
            merge((first, second), x.shape[2:])


@given(pairs())
def test_groups_are_kept_as_far_as_both_have_them(pair):
    first, second, _ = pair
    composed = compose(first, second)
    assert composed.groups == torch.tensor(first.groups).gcd(torch.tensor(second.groups)).item()
    assert (composed.in_channels, composed.out_channels) == (first.in_channels, second.out_channels)


@given(pairs())
def test_an_operator_runs_as_its_numbers_say(pair):
    first, _, x = pair
    close(first(x), plain(first, x))


@st.composite
def branches(draw):
    """Two convolutions that give outputs of one size for every input."""
    axes = draw(st.integers(0, 2))
    left = draw(convolutions(axes, draw(st.sampled_from([2, 4]))))
    kernel = [draw(st.integers(1, 4)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 2)) for _ in range(axes)]
    padding = []
    for k, d, k1, d1, p1 in zip(kernel, dilation, left.kernel, left.dilation, left.padding, strict=True):
        twice = (k - 1) * d - ((k1 - 1) * d1 - 2 * p1)
        assume(twice >= 0 and twice % 2 == 0)
        padding.append(twice // 2)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    groups = draw(st.sampled_from([g for g in range(1, 5) if left.in_channels % g == left.out_channels % g == 0]))
    shape = (left.out_channels, left.in_channels // groups, *kernel)
    weight, bias = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (shape, shape[:1]))
    right = AffineOperator(weight, bias, left.stride, tuple(padding), tuple(dilation), groups)
    x = torch.randn(2, left.in_channels, *(draw(st.integers(1, 9)) for _ in range(axes)), generator=generator).double()
    assume(min(output_shape((left,), x.shape)) > 0)
    return (left, right, x) if draw(st.booleans()) else (right, left, x)


@given(branches())
def test_a_sum_equals_both_outputs_added_everywhere(drawn):
    left, right, x = drawn
    close(plain(add(left, right), x), plain(left, x) + plain(right, x))


@given(pairs())
def test_two_operators_are_added_exactly_where_their_outputs_have_one_size_for_every_input(pair):
    left, right = (replace(o, weight=torch.zeros(6, 2, *o.kernel), bias=torch.zeros(6), groups=2) for o in pair[:2])
    sizes = [output_shape((o,), (1, 4, *[n] * len(o.kernel))) for o in (left, right) for n in range(60)]
    if sizes[:60] == sizes[60:]:
        assert add(left, right).out_channels == 6
    else:
        with pytest.raises(ValueError, match="different sizes"):
            add(left, right)


def convolution(out_channels, in_channels, kernel, padding=0, groups=1, stride=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_channels, in_channels // groups, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(out_channels, generator=generator, dtype=torch.float64)
    return AffineOperator(weight, bias, (stride,) * 2, (padding,) * 2, (1, 1), groups)


def channelwise(channels, seed=0):
    return convolution(channels, channels, 1, groups=channels, seed=seed)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (8, 8)])
def test_an_inverted_residual_block_merges_into_one_operator_that_is_exact_at_the_border(size):
    inner = (
        convolution(12, 4, 1),
        channelwise(12, 1),
        convolution(12, 12, 3, 1, groups=12, seed=2),
        convolution(4, 12, 1, seed=3),
    )
    block = (Sum((inner, ())),)
    merged = merge(block, size)
    assert (merged.kernel, merged.padding, merged.groups) == ((3, 3), (1, 1), 1)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    close(plain(merged, x), plain_chain(block, x))
    assert merged.bias.shape == (4, *size) or size == (1, 1)


@given(st.data())
def test_an_expanded_convolution_of_any_geometry_merges_exactly_at_every_size(data):
    """1×1, any grouped convolution, 1×1, all with biases, and the value itself added where the sizes allow it."""
    axes = data.draw(st.integers(1, 3))
    channels = data.draw(st.sampled_from([1, 2, 3]))
    expand = data.draw(convolutions(axes, channels, pointwise=True))
    middle = data.draw(convolutions(axes, expand.out_channels))
    project = data.draw(convolutions(axes, middle.out_channels, pointwise=True))
    chain = (expand, middle, project)
    x = torch.randn(2, channels, *(data.draw(st.integers(1, 6)) for _ in range(axes)), dtype=torch.float64)
    assume(min(output_shape(chain, x.shape)) > 0)
    close(plain(merge(chain, x.shape[2:]), x), plain_chain(chain, x))
    closed = AffineOperator(
        torch.randn(channels, project.out_channels, *[1] * axes).double(),
        torch.randn(channels).double(),
        *((1,) * axes, (0,) * axes, (1,) * axes),
    )
    block = (Sum(((*chain, closed), ())),)
    margins = [(k - 1) * d - 2 * p for k, d, p in zip(middle.kernel, middle.dilation, middle.padding, strict=True)]
    if any(margins) or any(s > 1 for operator in chain for s in operator.stride):
        with pytest.raises(ValueError, match="different sizes"):
            merge(block, x.shape[2:])
    else:
        close(plain(merge(block, x.shape[2:]), x), plain_chain(block, x))


@pytest.mark.parametrize("seed", range(3))
def test_a_block_with_a_downsample_branch_merges(seed):
    long = (convolution(6, 4, 1, seed=seed), convolution(8, 6, 3, 1, stride=2, seed=seed + 1))
    block = (convolution(4, 2, 1, seed=9), Sum((long, (convolution(8, 4, 1, stride=2, seed=seed + 2),))))
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    close(plain(merge(block, (7, 6)), x), plain_chain(block, x))


def test_two_padded_3x3_convolutions_are_refused():
    with pytest.raises(ValueError, match="inner zero padding"):
        merge((convolution(4, 4, 3, 1), convolution(4, 4, 3, 1)), (8, 8))


@given(SEEDS)
def test_folding_keeps_the_function_and_leaves_no_scale_beside_a_convolution(seed):
    chain = (
        convolution(6, 4, 3, 1, seed=seed),
        channelwise(6, seed + 1),
        Sum(((channelwise(6, seed + 2), convolution(6, 6, 1, seed=seed + 3), channelwise(6, seed + 4)), ())),
        channelwise(6, seed + 5),
        convolution(4, 6, 3, 1, seed=seed + 6),
    )
    folded = fold(chain)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    close(plain_chain(folded, x), plain_chain(chain, x))
    # The one before the padded convolution stays: it would be wrong at the border.
    assert [operator.is_channelwise for operator in operators(folded)] == [False, False, True, False]


def test_the_identity_returns_its_input():
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(plain(identity(4, convolution(4, 4, 3)), x), x)


def test_multiplications_are_those_counted_by_hand():
    chain = (convolution(12, 4, 1), convolution(12, 12, 3, 1, groups=12), convolution(4, 12, 1))
    assert multiplications(chain, (2, 4, 5, 7)) == 2 * 5 * 7 * (4 * 12 + 9 * 12 + 12 * 4)
    dense = AffineOperator(torch.zeros(3, 8), torch.zeros(3))
    assert multiplications((dense,), (2, 6, 8)) == 2 * 6 * 3 * 8
    strided = (Sum(((convolution(4, 4, 3, 1, stride=2),), (convolution(4, 4, 1, stride=2),))), convolution(8, 4, 2))
    assert multiplications(strided, (1, 4, 6, 6)) == 9 * (4 * 4 * 9 + 4 * 4) + 4 * 8 * 4 * 4


def test_the_output_shape_of_a_chain_is_that_of_its_output():
    chain = (convolution(6, 4, 3, stride=2), Sum(((), (convolution(6, 6, 3, 1),))), convolution(2, 6, 2, 1))
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    assert output_shape(chain, x.shape) == plain_chain(chain, x).shape
    assert output_shape((AffineOperator(torch.zeros(3, 8), torch.zeros(3)),), (2, 6, 8)) == (2, 6, 3)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: compose(convolution(4, 4, 3), convolution(4, 6, 1)), "cannot follow"),
        (lambda: compose(convolution(4, 4, 3), AffineOperator(torch.zeros(2, 4), torch.zeros(2))), "cannot follow"),
        (lambda: add(convolution(4, 4, 3), convolution(4, 4, 1)), "different sizes"),
        (lambda: add(convolution(4, 4, 1), convolution(4, 4, 1, stride=2)), "different sizes"),
        (lambda: AffineOperator(torch.zeros(4, 4, 3), torch.zeros(4)), "1 entries each"),
        (lambda: AffineOperator(torch.zeros(4, 4), torch.zeros(4), groups=3), "do not divide"),
    ],
)
def test_operators_that_do_not_fit_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()
