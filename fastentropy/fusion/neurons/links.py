"""Keep sets of channels that can only be cut out of a graph together, and which of them must stay."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Links:
    """Numbered channels, in sets that are joined while a graph is read (a union-find structure over tensors)."""

    def __init__(self) -> None:
        """Begin without channels."""
        self._parents = torch.empty(0, dtype=torch.int64, device="cpu")
        self._kept: list[tuple[Tensor, object]] = []

    def add(self, channels: int) -> Tensor:
        """Add channels, each in a set of its own, and return their numbers, int64 [channels]."""
        numbers = torch.arange(len(self._parents), len(self._parents) + channels, device="cpu")
        self._parents = torch.cat([self._parents, numbers])
        return numbers

    def join(self, left: Tensor, right: Tensor) -> None:
        """Join the sets of channels, pair by pair."""
        while True:
            left, right = self._roots(left), self._roots(right)
            differ = left != right
            if not bool(differ.any()):
                return
            low, high = torch.minimum(left, right)[differ], torch.maximum(left, right)[differ]
            self._parents.scatter_reduce_(0, high, low, "amin")

    def keep(self, numbers: Tensor, reader: object = None) -> None:
        """Note that channels must stay, with all channels of their sets, and for which reader."""
        self._kept.append((numbers, reader))

    def kept(self, but_for: object = ()) -> Tensor:
        """Return for every channel whether it must stay, bool, by its number; `but_for` is a reader that does not count."""
        return self.with_sets([numbers for numbers, reader in self._kept if reader is not but_for])

    def with_sets(self, numbers: Iterable[Tensor]) -> Tensor:
        """Return for every channel whether its set holds one of the given channels, bool, by its number."""
        holds = torch.zeros(len(self._parents), dtype=torch.bool, device="cpu")
        for each in numbers:
            holds[self._roots(each)] = True
        return holds[self._roots(torch.arange(len(self._parents), device="cpu"))]

    def _roots(self, numbers: Tensor) -> Tensor:
        """Return the channel with the smallest number in the set of each channel."""
        while not torch.equal(parents := self._parents[numbers], numbers):
            numbers = parents
        return numbers
