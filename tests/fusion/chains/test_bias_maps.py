"""The bias of a merged operator near the borders: right at every position, and stored for the borders only."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import fastentropy as fe
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.bias_maps import zero_response
from fastentropy.fusion.chains.elements import Sum, cost, run
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.chains.merging import merge
from tests._helpers.chains import chains, pytorch_chain
from tests._helpers.operators import channelwise, close, convolution, normal, pytorch_output


@pytest.mark.slow
@settings(max_examples=40)
@given(chains(largest=(60, 20, 8), flatten=False))
def test_zero_response_is_the_output_for_zeros(drawn):
    chain, x, _ = drawn
    response = zero_response(chain, x.shape[2:])
    expected = pytorch_chain(chain, torch.zeros_like(x[:1]))[0]
    close(response.expanded(), expected)
    assert response.numel() == expected.numel()


def test_zero_response_of_a_large_size_runs_on_a_small_one(monkeypatch):
    """A block for images of 512×300 runs on fewer than 20 positions per axis."""
    sizes = []
    monkeypatch.setattr("fastentropy.fusion.chains.bias_maps.run", lambda chain, x: sizes.append(x.shape[2:]) or run(chain, x))
    chain = (convolution(6, 4, 3, 1, stride=2), channelwise(6), convolution(4, 6, 5, 2, seed=3))
    response = zero_response(chain, (512, 300))
    assert response.positions[0].shape + response.positions[1].shape == (256, 150)
    assert max(sizes[0]) < 20
    close(response.expanded(), pytorch_chain(chain, torch.zeros(1, 4, 512, 300).double())[0])


@pytest.mark.slow
@settings(max_examples=60)
@given(chains(largest=(40, 20, 9), flatten=False))
def test_slabs_add_up_to_the_whole_map(drawn):
    chain, x, _ = drawn
    response = zero_response(chain, x.shape[2:])
    if None in response.interiors:
        return
    whole, interior = response.expanded(), response.values
    for axis, position in enumerate(response.interiors, 1):
        interior = interior.narrow(axis, position, 1)
    total = interior.expand_as(whole).clone()
    for axis, (start, stop), values in response.slabs():
        total.narrow(1 + axis, start, stop - start).add_(values)
    close(total, whole)


def expanded(axes, padding=1, stride=1, seed=0):
    """Return an expansion, a depthwise convolution with three taps per axis, and a projection."""

    def layer(out, channels, taps, margin=0, groups=1, step=1):
        weight = normal(out, channels // groups, *[taps] * axes, seed=seed + out + taps)
        return AffineOperator(weight, normal(out, seed=seed + taps), (step,) * axes, (margin,) * axes, (1,) * axes, groups)

    return layer(12, 2, 1), layer(12, 12, 3, padding, 12, stride), layer(2, 12, 1)


@pytest.mark.parametrize(("size", "stride"), [((61,), 1), ((40, 23), 1), ((23, 64), 2), ((37, 24), 3), ((11, 12, 17), 1)])
@pytest.mark.parametrize("batched", [True, False])
def test_large_maps_are_slabs_that_are_right_at_every_position(size, stride, batched):
    chain = expanded(len(size), stride=stride)
    (merged,) = merge(chain, size)
    x = normal(3, 2, *size, seed=1)
    expected = pytorch_chain(chain, x)
    assert (merged.bias.ndim, bool(merged.border_bias)) == (1, True)
    close(run((merged,), x), expected)
    close(pytorch_output(merged, x), expected)
    x, expected = (x, expected) if batched else (x[1], expected[1])
    for like in (x, x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x):
        close(compile_chain((merged,), like)(like), expected)


def test_asymmetric_padding_has_a_slab_on_one_side_only():
    first, _, last = expanded(2)
    chain = (first, convolution(12, 12, 3, ((0, 2), (3, 0)), seed=5), last)
    (merged,) = merge(chain, (50, 50))
    assert [(slab.axis, slab.positions) for slab in merged.border_bias] == [(0, (48, 50)), (1, (0, 3))]
    x = normal(2, 2, 50, 50, seed=7)
    close(run((merged,), x), pytorch_chain(chain, x))


@pytest.mark.parametrize("residual", [False, True])
def test_stored_numbers_grow_with_the_border_not_the_image(residual):
    block = (Sum((expanded(2), ())),) if residual else expanded(2)
    stored = {}
    for size in (64, 128, 256):
        (merged,) = merge(block, (size, size))
        stored[size] = merged.bias.numel() + sum(slab.values.numel() for slab in merged.border_bias)
    assert stored[256] - stored[128] == 2 * (stored[128] - stored[64]) == 2 * 2 * 128
    assert stored[256] < 4 * 256 * 2 + 10


def test_small_maps_stay_whole():
    chain = convolution(32, 16, 1), convolution(16, 32, 3, 1)
    (merged,) = merge(chain, (7, 9))
    assert merged.bias.shape == (16, 7, 9)
    assert not merged.border_bias


def test_cost_of_slabs_is_less_than_that_of_the_map():
    (merged,), (plain,) = merge(expanded(2), (40, 40)), merge(expanded(2, padding=0), (40, 40))
    extra = cost((merged,), (1, 2, 40, 40), 4).bytes - cost((plain,), (1, 2, 40, 40), 4).bytes
    assert 0 < extra < 4 * 2 * 2 * 40 * 40


@pytest.mark.parametrize("size", [33, 150])
def test_fused_model_stores_the_borders_of_its_images(size):
    """Blocks of an expansion, a depthwise convolution and a projection store less than twice their parameters."""
    torch.manual_seed(size)

    def block(channels, inner, out):
        depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        return nn.Conv2d(channels, inner, 1), depthwise, nn.Conv2d(inner, out, 1), nn.ReLU()

    model = nn.Sequential(*block(3, 48, 16), *block(16, 96, 16)).eval()
    fused = fe.fuse(model, (torch.randn(1, 3, size, size),), measure=False)
    assert [chain.choice for chain in fused.report.chains] == ["merge", "merge"]
    weights = 9 * 16 * (3 + 16) + 2 * 16
    assert sum(buffer.numel() for buffer in fused.buffers()) <= weights + 2 * 16 * (2 * size + 2)
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert math.isclose(fused.report.max_relative_error, 0, abs_tol=1e-5)
