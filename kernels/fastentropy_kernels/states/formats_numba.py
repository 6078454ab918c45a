"""CPU: the bits of floating-point dtypes, and the edges of a histogram as such bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class FloatFormat(NamedTuple):
    """The bits of a floating-point dtype, as signed integers of the same width."""

    signed: Any  # the NumPy type of the same width
    positive: int  # every bit but the sign
    infinity: int  # the bits of infinity
    six: int  # the bits of 6


FORMATS = {
    torch.float32: FloatFormat(np.int32, 0x7FFFFFFF, 0x7F800000, 0x40C00000),
    torch.bfloat16: FloatFormat(np.int16, 0x7FFF, 0x7F80, 0x40C0),
    torch.float16: FloatFormat(np.int16, 0x7FFF, 0x7C00, 0x4600),
}


def thresholds_of(edges: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the thresholds of a histogram as integers, which are compared with the results of `loops_numba.ordered`.

    The thresholds are -infinity, then for each edge the smallest value of `dtype` that is at least the edge, and at last the
    first bit pattern beyond infinity.

    Args:
        edges: the edges in rising order.
        dtype: float16, bfloat16 or float32.

    Returns:
        int16 or int32 `[len(edges) + 2]`.
    """
    form = FORMATS[dtype]
    exact = torch.tensor(edges, dtype=torch.float64, device="cpu")
    rounded = exact.to(dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    bits = rounded.view(integers).long()
    ordered = torch.where(bits >= 0, bits, bits ^ form.positive) + (rounded.double() < exact)
    ordered = torch.where(rounded == 0, torch.where(exact > 0, 1, -1), ordered)
    return torch.tensor([-form.infinity - 1, *ordered.tolist(), form.infinity + 1], dtype=integers, device="cpu")
