"""Composed and added operators compute what the operators compute one after the other, in float64."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator, add, compose, identity
from fastentropy.fusion.chains.geometry import Axis
from tests._helpers.operators import (
    NO_CONVOLUTION,
    SEEDS,
    attempt,
    average,
    branches,
    close,
    convolution,
    convolutions,
    normal,
    pairs,
    pytorch_output,
    size_after,
)


def composed(first, second):
    """Return the composition of a drawn pair; discard pairs that have none."""
    operator, _ = attempt(compose, first, second)
    assume(operator is not None)
    return operator


def interior(first, second, x):
    """Return the output positions along each axis at which no tap of the second operator falls into its padding."""
    middle = size_after(first, x.shape[2:])
    axes = []
    for n, m, axis in zip(size_after(second, middle), middle, second.axes, strict=True):
        lowest = [o * axis.stride - axis.before for o in range(n)]
        axes.append([o for o in range(n) if lowest[o] >= 0 and lowest[o] + axis.reach < (m - 1) * axis.upsampling + 1])
    return axes


@settings(max_examples=60)
@given(st.data(), st.integers(0, 3))
def test_an_operator_equals_the_pytorch_convolution(data, axes):
    operator = data.draw(convolutions(axes, data.draw(st.sampled_from([1, 2, 4]))))
    size = [data.draw(st.integers(1, 7)) for _ in range(axes)]
    assume(all(size_after(operator, size)))
    x = normal(2, operator.in_channels, *size, seed=data.draw(SEEDS))
    close(operator(x), pytorch_output(operator, x))


@settings(max_examples=60)
@given(st.data())
def test_a_tap_reads_the_position_of_its_definition(data):
    """Tap t of output o reads position s·o + d·t − p of the input, which has upsampling − 1 zeros between its values."""
    numbers = [data.draw(st.integers(1, most)) for most in (4, 3, 3, 3)]
    kernel, stride, dilation, upsampling = numbers
    before, after = data.draw(st.tuples(st.integers(-2, 4), st.integers(-2, 4)))
    x = normal(data.draw(st.integers(1, 8)), seed=data.draw(SEEDS))
    stuffed = [float(x[i // upsampling]) if i % upsampling == 0 else 0.0 for i in range((len(x) - 1) * upsampling + 1)]
    count = (len(stuffed) + before + after - (kernel - 1) * dilation - 1) // stride + 1
    assume(count > 0)
    weight = normal(kernel, seed=data.draw(SEEDS))

    def read(position):
        return stuffed[position] if 0 <= position < len(stuffed) else 0.0

    expected = [sum(float(weight[t]) * read(stride * o + dilation * t - before) for t in range(kernel)) for o in range(count)]
    operator = AffineOperator(
        weight.reshape(1, 1, -1), torch.zeros(1).double(), (stride,), ((before, after),), (dilation,), 1, (upsampling,)
    )
    close(operator(x.reshape(1, 1, -1)).flatten(), torch.tensor(expected, dtype=torch.float64))
    assert operator.output_shape((1, 1, len(x))) == (1, 1, count)


@settings(max_examples=25)
@given(st.data(), st.integers(1, 3))
def test_a_convolution_may_have_no_batch(data, axes):
    operator = data.draw(convolutions(axes, 2))
    size = [data.draw(st.integers(1, 6)) for _ in range(axes)]
    assume(all(size_after(operator, size)))
    x = normal(2, *size, seed=data.draw(SEEDS))
    close(operator(x), pytorch_output(operator, x[None])[0])
    assert operator.output_shape(x.shape) == operator(x).shape


@settings(max_examples=40)
@given(st.data(), st.integers(0, 3))
def test_output_shape(data, axes):
    operator = data.draw(convolutions(axes, 2))
    size = [data.draw(st.integers(1, 9)) for _ in range(axes)]
    assume(all(size_after(operator, size)))
    shape = (3, 2, *size) if axes else (3, 5, 2)
    assert operator.output_shape(shape) == pytorch_output(operator, torch.zeros(shape).double()).shape


@settings(max_examples=100)
@given(pairs())
def test_composition_equals_the_pair_away_from_padding(pair):
    first, second, x = pair
    if max(second.upsampling, default=1) > 1:  # its taps also read inserted zeros
        first = replace(first, bias=torch.zeros_like(first.bias))
    actual, expected = pytorch_output(composed(first, second), x), pytorch_output(second, pytorch_output(first, x))
    assert actual.shape == expected.shape == compose(first, second).output_shape(x.shape)
    for axis, positions in enumerate(interior(first, second, x), 2):
        actual, expected = (y.index_select(axis, torch.tensor(positions, dtype=torch.int64)) for y in (actual, expected))
    close(actual, expected)


@pytest.mark.slow
@settings(max_examples=60)
@given(pairs())
def test_linear_parts_compose_everywhere_without_padding(pair):
    first, second, x = pair
    first = replace(first, bias=torch.zeros_like(first.bias))
    second = replace(second, padding=(0,) * len(second.stride))
    middle = size_after(first, x.shape[2:])
    assume(all(middle) and all(size_after(second, middle)))
    close(pytorch_output(composed(first, second), x), pytorch_output(second, pytorch_output(first, x)))


@pytest.mark.slow
@settings(max_examples=60)
@given(pairs())
def test_composition_is_refused_only_with_inserted_zeros(pair):
    first, second, _ = pair
    strided, upsampled = (
        any(max(getattr(operator, name), default=1) > 1 for operator in (first, second)) for name in ("stride", "upsampling")
    )
    operator, reason = attempt(compose, first, second)
    if operator is None:
        assert upsampled
        assert strided or "padded" in reason
        assert re.search(NO_CONVOLUTION, reason)


@settings(max_examples=25)
@given(pairs())
def test_composition_keeps_common_groups(pair):
    first, second, _ = pair
    operator = composed(first, second)
    assert operator.groups == torch.tensor(first.groups).gcd(torch.tensor(second.groups)).item()
    assert (operator.in_channels, operator.out_channels) == (first.in_channels, second.out_channels)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data(), st.integers(0, 3))
def test_composition_is_associative(data, axes):
    first = data.draw(convolutions(axes, 2, "strided"))
    second = data.draw(convolutions(axes, first.out_channels, "strided"))
    third = data.draw(convolutions(axes, second.out_channels, "strided"))
    left, right = compose(compose(first, second), third), compose(first, compose(second, third))
    assert (left.stride, left.padding, left.groups) == (right.stride, right.padding, right.groups)
    if left.dilation == right.dilation:  # a kernel of one tap may have any
        close(left.weight, right.weight)
    close(left.bias, right.bias)


@settings(max_examples=60)
@given(branches())
def test_a_sum_equals_both_outputs_added(drawn):
    left, right, x = drawn
    total, reason = attempt(add, left, right)
    if total is None:  # no transposed convolution has the padding of both
        assert max(left.upsampling) > 1
        assert re.search(NO_CONVOLUTION, reason)
    else:
        close(pytorch_output(total, x), pytorch_output(left, x) + pytorch_output(right, x))


@pytest.mark.slow
@settings(max_examples=60)
@given(pairs("strided"))
def test_operators_add_only_if_output_sizes_always_agree(pair):
    left, right = (replace(o, weight=torch.zeros(6, 2, *o.kernel), bias=torch.zeros(6), groups=2) for o in pair[:2])
    margins = [axis.reach + 2 for operator in (left, right) for axis in operator.axes]
    sizes = range(max(margins), max(margins) + 12)  # where both have an output
    outputs = [[size_after(operator, [n] * len(operator.stride)) for n in sizes] for operator in (left, right)]
    if outputs[0] == outputs[1]:
        assert add(left, right).out_channels == 6
    else:
        with pytest.raises(ValueError, match="different sizes"):
            add(left, right)


@given(st.integers(0, 3), st.sampled_from([1, 3, 4]))
def test_identity_returns_its_input(axes, channels):
    like = AffineOperator(torch.zeros(2, channels, *[3] * axes).double(), torch.zeros(2).double(), *[(1,) * axes] * 3)
    x = normal(2, channels, *[4] * axes, seed=axes)
    assert torch.equal(pytorch_output(identity(channels, like), x), x)


@settings(max_examples=25)
@given(st.data(), st.integers(0, 2))
def test_dense_weight_has_one_group(data, axes):
    operator = data.draw(convolutions(axes, 4))
    dense = replace(operator, weight=operator.dense_weight(), groups=1)
    x = normal(2, 4, *[7] * axes, seed=data.draw(SEEDS))
    assume(all(size_after(operator, x.shape[2:])))
    close(pytorch_output(dense, x), pytorch_output(operator, x))


@pytest.mark.parametrize(
    ("operator", "kinds"),
    [
        (convolution(4, 4, 1), {"pointwise"}),
        (convolution(4, 4, 1, groups=4), {"pointwise", "channelwise"}),
        (convolution(8, 4, 1, groups=4), {"pointwise"}),
        (replace(convolution(4, 4, 1), dilation=(2, 3)), {"pointwise"}),
        (convolution(4, 4, 3, 1), set()),
        (convolution(4, 4, 1, 1), set()),
        (convolution(4, 4, 1, stride=2), set()),
        (convolution(4, 4, 1, groups=4, upsampling=2), set()),
        (convolution(4, 4, 3, groups=4), set()),
        (average(3, 2, 2), {"average"}),
        (average(3, 2, 3, stride=(1, 2), padding=1), {"average"}),
        (average(1, 7), {"average"}),
        (replace(average(3, 2, 2), bias=torch.ones(3).double()), set()),
        (replace(average(4, 2, 2), weight=torch.full((4, 1, 2, 2), 0.3).double()), set()),
        (replace(average(3, 2, 2), dilation=(2, 1)), set()),
        (replace(average(3, 2, 2), stride=(1, 1), upsampling=(1, 2)), set()),
        (replace(average(3, 1, 2), dilation=(2, 1)), {"average"}),
        (average(3, 1, 1), {"pointwise", "channelwise"}),
        (AffineOperator(torch.zeros(3, 4), torch.zeros(3)), {"pointwise"}),
        (AffineOperator(torch.zeros(3, 1), torch.zeros(3), groups=3), {"pointwise", "channelwise"}),
    ],
)
def test_kinds_of_operators(operator, kinds):
    assert {name for name in ("pointwise", "channelwise", "average") if getattr(operator, f"is_{name}")} == kinds


def test_one_number_of_padding_is_for_both_sides():
    operator = AffineOperator(torch.zeros(1, 1, 3, 2), torch.zeros(1), (2, 1), (1, (0, 2)), (1, 3))
    assert operator.padding == ((1, 1), (0, 2))
    assert operator.axes == (Axis(3, 2, 1, 1), Axis(2, 1, 0, 2, 3))
    assert operator.upsampling == (1, 1)


def test_multiplications_counted_by_hand():
    assert convolution(12, 4, 1).multiplications((2, 4, 5, 7)) == 2 * 5 * 7 * 4 * 12
    assert convolution(12, 12, 3, 1, groups=12).multiplications((2, 12, 5, 7)) == 2 * 5 * 7 * 9 * 12
    assert convolution(4, 4, 3, 1, stride=2).multiplications((1, 4, 6, 6)) == 9 * 4 * 4 * 9
    assert AffineOperator(torch.zeros(3, 8), torch.zeros(3)).multiplications((2, 6, 8)) == 2 * 6 * 3 * 8
    # A transposed convolution multiplies each of its inputs with the kernel once: 25 positions, 2×2 taps, 4 to 3 channels.
    assert convolution(3, 4, 2, 1, upsampling=2).multiplications((1, 4, 5, 5)) == 25 * 4 * 4 * 3


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: compose(convolution(4, 4, 3), convolution(4, 6, 1)), "cannot follow"),
        (lambda: compose(convolution(4, 4, 3), AffineOperator(torch.zeros(2, 4), torch.zeros(2))), "cannot follow"),
        (lambda: compose(convolution(4, 4, 3, stride=2), convolution(4, 4, 2, upsampling=2)), "behind a strided one"),
        (lambda: compose(convolution(4, 4, 2, upsampling=2), convolution(4, 4, 3, stride=2)), "strided convolution behind"),
        (lambda: compose(convolution(4, 4, 2, 1, upsampling=2), convolution(4, 4, 3, 3)), "padded convolution behind"),
        (lambda: compose(convolution(4, 4, 1, stride=2), replace(convolution(4, 4, 2), upsampling=(2, 1))), "no convolution"),
        (
            lambda: compose(replace(convolution(4, 4, 1), stride=(2, 1)), replace(convolution(4, 4, 1), upsampling=(1, 2))),
            "together",
        ),
        (
            lambda: compose(replace(convolution(4, 4, 1), upsampling=(1, 2)), replace(convolution(4, 4, 1), stride=(2, 1))),
            "together",
        ),
        (
            lambda: compose(replace(convolution(4, 4, 1), upsampling=(1, 2)), convolution(4, 4, 1, ((0, 1), 0))),
            "padded convolution",
        ),
        (lambda: add(convolution(4, 4, 3), convolution(4, 4, 1)), "different sizes"),
        (lambda: add(convolution(4, 4, 1), convolution(4, 4, 1, stride=2)), "different sizes"),
        (lambda: add(convolution(4, 4, 1), convolution(4, 4, 1, upsampling=2)), "different sizes"),
        (lambda: add(convolution(4, 4, 1), convolution(6, 4, 1)), "different sizes"),
        (lambda: AffineOperator(torch.zeros(4, 4, 3), torch.zeros(4)), "1 entries each"),
        (lambda: AffineOperator(torch.zeros(4, 4, 3), torch.zeros(4), (1,), (0,), (1,), 1, (1, 1)), "1 entries each"),
        (lambda: AffineOperator(torch.zeros(4, 4), torch.zeros(4), groups=3), "do not divide"),
    ],
)
def test_operators_that_do_not_fit_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()
