"""Define bias slabs: biases that an operator adds to its outputs near a border only."""

from typing import NamedTuple

from torch import Tensor


class BiasSlab(NamedTuple):
    """A bias that is added to a range of output positions along one spatial axis, in addition to the bias of all positions.

    Attributes:
        axis: index of the spatial axis.
        positions: the range, (start, stop).
        values: `[out_channels, *sizes]`. A size of 1 stands for the same value at all positions of its axis.
    """

    axis: int
    positions: tuple[int, int]
    values: Tensor

    def add_to(self, output: Tensor) -> None:
        """Add the values to an output in place. Its last axes are the spatial ones."""
        start, stop = self.positions
        output.narrow(self.axis - (self.values.ndim - 1), start, stop - start).add_(self.values)
