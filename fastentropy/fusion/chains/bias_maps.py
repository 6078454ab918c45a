"""Find the bias that a merged operator needs at each position, and store what differs near the borders only.

A chain is a stretch of linear operators. For an input of zeros, its output is what its biases make of it: constant far from the
borders, and something else near them if an operator inside of the chain pads its input with zeros.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastentropy.fusion.chains.bias_slabs import BiasSlab
from fastentropy.fusion.chains.borders import smaller_size
from fastentropy.fusion.chains.elements import BorderStrip, Chain, operators, run


class ZeroResponse(NamedTuple):
    """The output of a chain for an input of zeros, without repetitions of its constant part.

    Attributes:
        values: the output for a smaller input, with the same borders: `[out_channels, *sizes]`.
        positions: for each spatial axis, the position in `values` of each position of the whole output: int64.
        interiors: for each spatial axis, the position in `values` of the constant part, or None if all positions may differ.
    """

    values: Tensor
    positions: tuple[Tensor, ...]
    interiors: tuple[int | None, ...]

    def expanded(self) -> Tensor:
        """Return the whole output, `[out_channels, *output_size]`."""
        whole = self.values
        for axis, positions in enumerate(self.positions, 1):
            whole = whole.index_select(axis, positions.to(whole.device))
        return whole

    def numel(self) -> int:
        """Return the number of values of the whole output."""
        return len(self.values) * torch.Size(map(len, self.positions)).numel()

    def differs(self, bias: Tensor, strips: Iterable[BorderStrip] = ()) -> bool:
        """Return whether the output differs from a bias `[out_channels]` at any position outside of the given strips."""
        interior = bias.reshape(-1, *(1,) * len(self.positions))
        different = ~torch.isclose(self.values, interior.expand_as(self.values), rtol=1e-12, atol=1e-12)
        for strip in strips:
            positions, (start, stop) = self.positions[strip.axis], strip.output
            inside = torch.ones(different.shape[1 + strip.axis], dtype=torch.bool, device=different.device)
            inside[torch.cat([positions[:start], positions[stop:]])] = False
            different.index_fill_(1 + strip.axis, inside.nonzero().flatten().to(different.device), False)
        return bool(different.any())

    def slabs(self) -> Iterator[BiasSlab]:
        """Yield what must be added to the constant part near the borders, at most two slabs per spatial axis.

        The slabs of the last axis have one value per channel and position along that axis. Those of the axes before it are what
        then still differs, at all positions of the axes behind them.
        """
        values = self.values
        for axis, (positions, interior) in enumerate(zip(self.positions, self.interiors, strict=True)):
            assert interior is not None, "without an interior, all values are stored"
            whole = values
            for behind, each in enumerate(self.positions[axis + 1 :], axis + 2):
                whole = whole.index_select(behind, each.to(whole.device))
            constant, last = whole.narrow(1 + axis, interior, 1), whole.shape[1 + axis] - 1 - interior
            for start, length, first in ((0, interior, 0), (len(positions) - last, last, interior + 1)):
                difference = whole.narrow(1 + axis, first, length) - constant
                if not torch.allclose(difference, torch.zeros_like(difference), rtol=0, atol=1e-12):
                    yield BiasSlab(axis, (start, start + length), difference)
            values = values.narrow(1 + axis, interior, 1)


def zero_response(chain: Chain, spatial_size: Sequence[int]) -> ZeroResponse:
    """Return the output of a chain for an input of zeros.

    Away from the borders this output is constant. The chain therefore runs on a smaller input.

    Args:
        chain: operators with spatial axes, and sums and concatenations of them.
        spatial_size: size of the input along each spatial axis.
    """
    first = operators(chain)[0]
    smaller = [smaller_size(chain, axis, size) for axis, size in enumerate(spatial_size)]
    values = run(chain, first.bias.new_zeros((1, first.in_channels, *(each.size for each in smaller))))[0]
    return ZeroResponse(values, tuple(each.positions for each in smaller), tuple(each.interior for each in smaller))
