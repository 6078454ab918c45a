"""Compute with large weights in float64 block by block, because a copy of a whole weight in float64 takes much memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

#: The number of elements of a block: 64 MB in float64.
BLOCK_ELEMENTS = 2**23


def in_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a weight in blocks of about `BLOCK_ELEMENTS` elements, and of one row at least."""
    return torch.split(weight, _rows(weight))


def multiply(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of two matrices. It is computed in float64, and each block is converted to `dtype` at once."""
    product = left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)
    for rows, factors in zip(in_blocks(product), torch.split(left, _rows(product)), strict=True):
        total = rows.new_zeros(rows.shape, dtype=torch.float64)
        for some, others in zip(torch.split(factors, _rows(right), 1), in_blocks(right), strict=True):
            total.addmm_(some.double(), others.double())
        rows.copy_(total)
    return product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer to x in the dtype of x."""
    first, *others = (F.linear(x, block.to(x.dtype)) for block in in_blocks(weight))
    output = torch.cat([first, *others], -1) if others else first
    return output if bias is None else output + bias.to(x.dtype)


def _rows(weight: Tensor) -> int:
    """Return the number of rows of a block of a weight."""
    return max(1, BLOCK_ELEMENTS // max(1, weight.shape[1:].numel()))
