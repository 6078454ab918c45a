"""Compare forms of a chain (a stretch of linear operators) with the chain in float64, on as much of the output as shows errors.

A form computes every position far from the borders in the same way. Float64 convolutions of whole images are slow and take
much memory, so the chain runs on the corners of large images only, which have every kind of border and some of the interior.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastentropy.fusion.chains.borders import border_parts
from fastentropy.fusion.chains.elements import Activation, BorderStrip, Chain, Flatten, operators, run
from fastentropy.fusion.chains.lowering import compile_chain
from fastentropy.fusion.verification import full_precision, relative_error

#: The number of rows on which layers without spatial axes are compared.
ROWS = 64


class ChainReference:
    """The outputs of a chain in float64 for two samples, with which its forms are compared."""

    def __init__(self, chain: Chain, x: Tensor) -> None:
        """Run the chain on the first sample of an input, and on a random sample of the same size.

        Args:
            chain: the chain.
            x: an input of the chain.
        """
        self._axes = axes = len(operators(chain)[0].axes)
        given = x[:1] if x.ndim > axes + 1 else x
        if not axes and given.ndim > 1:
            given = given.narrow(-2, 0, min(ROWS, given.shape[-2]))
        drawn = torch.randn(given.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
        self._samples = given, drawn.to(given) * given.std(correction=0)
        is_cut = all(not isinstance(element, Flatten | Activation) for element in chain)
        sizes = given.shape[given.ndim - axes :]
        parts = [border_parts(chain, axis, size) if is_cut else () for axis, size in enumerate(sizes)]
        self._corners = list(itertools.product(*filter(None, parts)))
        with full_precision():
            self._expected = [self._reference(chain, sample) for sample in self._samples]

    def error(self, form: Chain) -> float:
        """Return the largest relative error of a compiled form on the two samples."""
        compiled = compile_chain(form, self._samples[0])
        with full_precision():
            outputs = [self._at_corners(compiled(sample)) for sample in self._samples]
            return max(map(relative_error, outputs, self._expected))

    def _at_corners(self, y: Tensor) -> Tensor:
        """Return the values of an output at all corners, one behind the other. Without corners, that is the whole output."""
        return _joined(self._cut(y, corner, "output") for corner in self._corners)

    def _reference(self, chain: Chain, x: Tensor) -> Tensor:
        """Return the output of the chain for x in float64: the values of all corners, one behind the other."""
        inputs = ((corner, self._cut(x, corner, "input").double()) for corner in self._corners)
        return _joined(self._cut(run(chain, part), corner, "kept") for corner, part in inputs)

    def _cut(self, x: Tensor, corner: Sequence[BorderStrip], positions: str) -> Tensor:
        """Return the part of an input or an output of the chain that belongs to a corner.

        Args:
            x: the tensor.
            corner: one part of each spatial axis that is cut.
            positions: which positions of the parts: "output", "input" or "kept".
        """
        for part in corner:
            start, stop = getattr(part, positions)
            x = x.narrow(part.axis - self._axes, start, stop - start)
        return x


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Return the values of tensors, one behind the other."""
    return torch.cat([part.flatten() for part in parts])
