"""Products that are computed in float64 block by block equal those of converted weights."""

import pytest
import torch
import torch.nn.functional as F

from fastentropy.fusion.chains import blocks

SIZES = [(1, 1, 1), (7, 5, 9), (37, 1, 11), (3, 64, 2)]


@pytest.fixture(params=[1, 10, 100, 2**23], autouse=True)
def elements(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", request.param)


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_product(rows, inner, columns, dtype):
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).T
    exact = left.double() @ right.double()
    torch.testing.assert_close(blocks.multiply(left, right, torch.float64), exact, rtol=1e-13, atol=1e-13)
    actual = blocks.multiply(left, right, torch.float32)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-7, atol=1e-7)  # rounded once


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(rows, inner, columns, has_bias):
    x, weight = torch.randn(2, columns, inner, dtype=torch.float64), torch.randn(rows, inner)
    bias = torch.randn(rows) if has_bias else None
    expected = F.linear(x, weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(blocks.linear(x, weight, bias), expected, rtol=1e-13, atol=1e-13)


def test_blocks_are_the_rows():
    weight = torch.randn(9, 4)
    assert torch.equal(torch.cat(blocks.in_blocks(weight)), weight)
    assert all(block.numel() <= max(4, blocks.BLOCK_ELEMENTS) for block in blocks.in_blocks(weight))
