"""How each element of a chain runs, its output shape and its cost, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import (
    BorderCorrected,
    BorderStrip,
    Cost,
    Flatten,
    FusedPair,
    Sum,
    cost,
    operators,
    output_shape,
    run,
    spatial_size,
)
from tests._helpers.chains import average_pools, chains
from tests._helpers.operators import (
    SEEDS,
    close,
    convolution,
    linear_layer,
    normal,
    pytorch_output,
)


@settings(max_examples=60)
@given(chains(shortest=1))
def test_a_chain_equals_plain_pytorch(drawn):
    chain, x, y = drawn
    close(run(chain, x), y)


@pytest.mark.slow
@settings(max_examples=40)
@given(chains(shortest=1))
def test_output_shape_of_a_chain(drawn):
    chain, x, y = drawn
    assert output_shape(chain, x.shape) == y.shape


@pytest.mark.slow
@settings(max_examples=30)
@given(chains(shortest=1, flatten=False))
def test_a_chain_may_have_no_batch(drawn):
    chain, x, y = drawn
    close(run(chain, x[0]), y[0])
    assert output_shape(chain, x[0].shape) == y[0].shape


@settings(max_examples=25)
@given(st.data(), st.integers(1, 3))
def test_drawn_pools_are_average_pools_of_pytorch(data, axes):
    pool = data.draw(average_pools(3, axes))
    x = normal(2, 3, *[5] * axes, seed=data.draw(SEEDS))
    padding = [before for before, _ in pool.padding]
    expected = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1](x, pool.kernel, pool.stride, padding)
    close(run((pool,), x), expected)


def test_linear_layers_act_on_the_last_axis():
    chain = (AffineOperator(normal(6, 4, seed=0), normal(6, seed=1)), AffineOperator(normal(3, 6, seed=2), normal(3, seed=3)))
    for shape in [(4,), (2, 4), (2, 5, 4), (2, 3, 5, 4)]:
        x = normal(*shape, seed=4)
        close(run(chain, x), F.linear(F.linear(x, chain[0].weight, chain[0].bias), chain[1].weight, chain[1].bias))
        assert output_shape(chain, shape) == (*shape[:-1], 3)


def test_an_empty_chain_returns_its_input():
    x = normal(2, 3, seed=0)
    assert run((), x) is x
    assert output_shape((), (2, 3)) == (2, 3)
    assert cost((), (2, 3), 4) == Cost(0, 0)


BORDER = (convolution(6, 4, 3, 1, seed=2), convolution(3, 6, 3, 1, seed=4))
#: The first row, from three rows of the input, and the last two columns, from the last five.
STRIPS = (BorderStrip(0, (0, 1), (0, 3), (0, 1)), BorderStrip(1, (5, 7), (2, 7), (3, 5)))


@pytest.mark.parametrize("batch", [(), (2,)])
def test_border_strips_are_recomputed_from_a_part_of_the_input(batch):
    interior = convolution(3, 4, 5, 2, seed=8)
    x = normal(*batch, 4, 6, 7, seed=0)
    given = x.clone()
    expected = interior(x)
    expected[..., :1, :] = run(BORDER, x[..., :3, :])[..., :1, :]
    expected[..., 5:] = run(BORDER, x[..., 2:])[..., 3:]
    bordered = BorderCorrected(interior, BORDER, STRIPS)
    close(run((bordered,), x), expected)
    assert torch.equal(x, given)
    assert output_shape((bordered,), x.shape) == expected.shape


def test_a_fused_pair_applies_both_operators():
    kernel = FusedPair("conv_pointwise", convolution(6, 4, 3, 1, stride=2), convolution(3, 6, 1, seed=5))
    x = normal(2, 4, 7, 8, seed=0)
    close(run((kernel,), x), pytorch_output(kernel.second, pytorch_output(kernel.first, x)))
    assert output_shape((kernel,), x.shape) == (2, 3, 4, 4)


def test_operators_of_a_chain_in_call_order():
    a, b, c, d, e, f = (convolution(4, 4, 1, seed=seed) for seed in range(6))
    chain = (
        a,
        Sum(((b, Sum(((c,), ()))), ())),
        FusedPair("conv_pointwise", d, e),
        BorderCorrected(f, (a, Sum(((b,), (c,)))), ()),
        Flatten(),
    )
    assert operators(chain) == [a, b, c, d, e, f, a, b, c]


def test_multiplications_counted_by_hand():
    chain = (convolution(12, 4, 1), convolution(12, 12, 3, 1, groups=12), convolution(4, 12, 1))
    assert cost(chain, (2, 4, 5, 7), 4).multiplications == 2 * 5 * 7 * (4 * 12 + 9 * 12 + 12 * 4)
    dense = AffineOperator(torch.zeros(3, 8), torch.zeros(3))
    assert cost((dense,), (2, 6, 8), 4).multiplications == 2 * 6 * 3 * 8
    strided = (Sum(((convolution(4, 4, 3, 1, stride=2),), (convolution(4, 4, 1, stride=2),))), convolution(8, 4, 2))
    assert cost(strided, (1, 4, 6, 6), 4).multiplications == 9 * (4 * 4 * 9 + 4 * 4) + 4 * 8 * 4 * 4


def test_bytes_counted_by_hand():
    operator = convolution(6, 4, 3, 1)
    read, weights, written = 2 * 4 * 5 * 7, 6 * 4 * 9 + 6, 2 * 6 * 5 * 7
    assert cost((operator,), (2, 4, 5, 7), 1).bytes == read + weights + written
    mapped = replace(operator, bias=normal(6, 5, 7, seed=0))  # its map is added in one more pass over the output
    assert cost((mapped,), (2, 4, 5, 7), 1).bytes == read + 6 * 4 * 9 + written + 2 * written + 6 * 5 * 7
    block = Sum(((convolution(4, 4, 1),), (), ()))  # two additions, each of two values
    assert cost((block,), (2, 4, 5, 7), 1).bytes == 2 * read + 20 + 2 * 3 * read


@pytest.mark.slow
@settings(max_examples=25)
@given(chains(), st.sampled_from([2, 4, 8]))
def test_bytes_are_proportional_to_the_itemsize(drawn, itemsize):
    chain, x, _ = drawn
    assert cost(chain, x.shape, itemsize).bytes == itemsize * cost(chain, x.shape, 1).bytes


@pytest.mark.slow
@settings(max_examples=25)
@given(chains())
def test_cost_of_a_chain_is_the_sum_over_its_elements(drawn):
    chain, x, _ = drawn
    costs = [cost((e,), output_shape(chain[:index], x.shape), 4) for index, e in enumerate(chain)]
    assert cost(chain, x.shape, 4) == tuple(map(sum, zip(*costs, strict=True)))


@settings(max_examples=20)
@given(chains(longest=3))
def test_cost_of_branches_is_added(drawn):
    chain, x, _ = drawn
    assume(not isinstance(chain[-1], Flatten))
    branched = cost((Sum((chain, chain)),), x.shape, 1)
    values = torch.Size(output_shape(chain, x.shape)).numel()
    one = cost(chain, x.shape, 1)
    assert branched == (2 * one.multiplications, 2 * one.bytes + 3 * values)


def test_cost_of_a_border_is_that_of_its_strips():
    interior = convolution(3, 4, 5, 2, seed=8)
    whole = cost((BorderCorrected(interior, BORDER, STRIPS),), (2, 4, 6, 7), 4)
    parts = [cost((interior,), (2, 4, 6, 7), 4), cost(BORDER, (2, 4, 3, 7), 4), cost(BORDER, (2, 4, 6, 5), 4)]
    assert whole == tuple(map(sum, zip(*parts, strict=True)))


def test_a_fused_pair_moves_no_values_in_between():
    first, second = convolution(6, 4, 3, 1), convolution(3, 6, 1)
    pair, kernel = (cost(chain, (2, 4, 5, 7), 4) for chain in ((first, second), (FusedPair("conv_pointwise", first, second),)))
    assert kernel == (pair.multiplications, pair.bytes - 2 * 4 * (2 * 6 * 5 * 7))


def test_flattening_costs_nothing():
    assert cost((Flatten(),), (2, 4, 5, 7), 4) == Cost(0, 0)


@pytest.mark.slow
def test_drawn_chains_cover_every_kind():
    """Other tests rely on this strategy: it must reach every kind of element and geometry."""
    seen = set()

    @settings(max_examples=80, derandomize=True, database=None)
    @given(chains())
    def look(drawn):
        chain, x, _ = drawn
        seen.update(type(element).__name__ for element in chain)
        seen.update(f"{x.ndim - 2}-d" for _ in chain)
        for branch in itertools.chain.from_iterable(e.branches for e in chain if isinstance(e, Sum)):
            seen.update(f"{type(element).__name__} in a branch" for element in branch)
        for operator in operators(chain):
            seen.update(name for name in ("is_average", "is_channelwise", "is_pointwise") if getattr(operator, name))
            seen.update(name for name in ("stride", "dilation", "upsampling") if max(getattr(operator, name)) > 1)
            seen.update(["groups"] * (operator.groups > 1), ["rectangular"] * (len(set(operator.kernel)) > 1))
            seen.update(["one-sided"] * any(axis.before != axis.after for axis in operator.axes))

    look()
    kinds = "AffineOperator Sum Flatten 1-d 2-d 3-d is_average is_channelwise is_pointwise stride dilation upsampling groups"
    assert seen >= {*kinds.split(), "AffineOperator in a branch", "Sum in a branch", "rectangular", "one-sided"}


@pytest.mark.parametrize(("shape", "size"), [((2, 4, 5, 6), (5, 6)), ((4, 5, 6), (5, 6))])
def test_spatial_size_is_that_of_the_last_axes(shape, size):
    assert spatial_size((Sum(((), (convolution(4, 4, 3, 1),))),), torch.zeros(shape)) == size
    assert spatial_size((linear_layer(3, 6),), torch.zeros(shape)) == ()
