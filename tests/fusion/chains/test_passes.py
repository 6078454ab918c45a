"""Folding, moving pools and pairing operators keep the function of a chain, in float64."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import FusedPair, Sum, cost, operators, run
from fastentropy.fusion.chains.passes import fold, fuse_pairs, move_pools_forward
from tests._helpers.chains import chains, pytorch_chain
from tests._helpers.operators import SEEDS, average, channelwise, close, convolution, convolutions, linear_layer, normal


@pytest.mark.slow
@settings(max_examples=60)
@given(chains(kinds=("batch norm", "batch norm", "strided", "same", "transposed", "residual", "pool")))
def test_folding_keeps_the_function(drawn):
    chain, x, y = drawn
    folded = fold(chain)
    close(run(folded, x), y)
    assert len(operators(folded)) <= len(operators(chain))
    assert cost(folded, x.shape, 4).multiplications <= cost(chain, x.shape, 4).multiplications


@given(SEEDS)
def test_folding_leaves_no_scale_that_a_convolution_can_take(seed):
    chain = (
        convolution(6, 4, 3, 1, seed=seed),
        channelwise(6, seed + 1),
        Sum(((channelwise(6, seed + 2), convolution(6, 6, 1, seed=seed + 3), channelwise(6, seed + 4)), ())),
        channelwise(6, seed + 5),
        convolution(4, 6, 3, 1, seed=seed + 6),
    )
    folded = fold(chain)
    x = normal(2, 4, 5, 6, seed=seed)
    close(pytorch_chain(folded, x), pytorch_chain(chain, x))
    # The scale before the padded convolution stays, because folding it would be wrong at the border.
    assert [operator.is_channelwise for operator in operators(folded)] == [False, False, True, False]


def test_average_pooling_is_not_folded_into():
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
def test_a_pool_moves_before_all_pointwise_operators(data, axes):
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
def test_a_pool_stays_behind_an_operator_that_is_not_pointwise(before):
    chain = (before, average(4, 2, 2))
    assert move_pools_forward(chain) == chain


def test_a_padded_pool_stays_in_its_place():
    chain = (convolution(4, 4, 1), average(4, 3, 3, padding=1))
    assert move_pools_forward(chain) == chain


@pytest.mark.slow
@settings(max_examples=40)
@given(chains())
def test_fused_pairs_keep_the_function(drawn):
    chain, x, y = drawn
    close(run(fuse_pairs(chain), x), y)
    assert operators(fuse_pairs(chain)) == operators(chain)


@pytest.mark.parametrize(
    ("chain", "names"),
    [
        ((linear_layer(128, 300), linear_layer(300, 128)), ["linear_pair"]),
        ((linear_layer(129, 3), linear_layer(3, 129)), [None, None]),
        ((linear_layer(3, 3), linear_layer(3, 3), linear_layer(3, 3)), ["linear_pair", None]),
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
def test_each_kernel_takes_the_pairs_it_is_written_for(chain, names):
    assert [element.name if isinstance(element, FusedPair) else None for element in fuse_pairs(chain)] == names


def test_a_pair_in_a_branch_is_fused():
    block = (Sum(((convolution(6, 4, 3, 1), convolution(4, 6, 1)), (convolution(4, 4, 1),))),)
    assert isinstance(fuse_pairs(block)[0].branches[0][0], FusedPair)


@pytest.mark.parametrize("swap", [False, True])
def test_a_residual_pair_adds_its_input_in_the_kernel(swap):
    branches = [(convolution(6, 4, 3, 1), convolution(4, 6, 1)), ()]
    block = (Sum(tuple(branches[::-1] if swap else branches)),)
    (kernel,) = fuse_pairs(block)
    assert kernel.adds_input
    x = normal(2, 4, 5, 6, seed=0)
    close(run((kernel,), x), pytorch_chain(block, x))
