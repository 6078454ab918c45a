"""Fit one convolution to the inputs and outputs of other modules by least squares.

Only sums over the observations are kept, so memory does not grow with the number of batches. A part of the observations is
held out to measure the error.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastentropy.fusion.chains.affine import AffineOperator

#: The number of observations (a patch and its output) taken from the first batch for each number that is fitted per output
#: channel. Half as many are taken from the second batch, a third from the third batch, and so on.
OBSERVATIONS_PER_NUMBER = 8

#: At least this many observations are taken from each batch, if the batch has so many positions.
MIN_OBSERVATIONS = 64

#: One of this many observations is held out: the error is measured on it, and it is not fitted.
HELD_OUT_EVERY = 4

#: The ridge penalty, relative to the mean square of the inputs. It pulls weights that the data do not determine towards the
#: centre of the exact kernel.
RIDGE = 1e-6


class _WeightedSums:
    """Weighted sums over observations, from which a regression and its error are computed.

    An observation has a vector u (the values of a patch, and a one for the bias), the wanted output y, and the residual r: the
    difference between y and the output of a first guess.

    Attributes:
        products: the sum of u uᵀ, `[groups, unknowns, unknowns]`.
        residuals: the sum of u rᵀ, `[groups, unknowns, outputs]`.
        square_residual: the sum of r².
        square_output: the sum of y².
        observations: the sum of the weights.
    """

    def __init__(self, groups: int, unknowns: int, outputs: int, like: Tensor) -> None:
        """Begin with sums of zero, in the dtype and on the device of `like`.

        Args:
            groups: number of groups of channels.
            unknowns: length of u.
            outputs: number of output channels per group.
            like: a tensor.
        """
        self.products = like.new_zeros(groups, unknowns, unknowns)
        self.residuals = like.new_zeros(groups, unknowns, outputs)
        self.square_residual = self.square_output = self.observations = 0.0

    def add(self, u: Tensor, left: Tensor, wanted: Tensor, weight: float) -> None:
        """Add n observations of each group.

        Args:
            u: `[groups, n, unknowns]`.
            left: r, `[groups, n, outputs]`.
            wanted: y, `[groups, n, outputs]`.
            weight: the weight of each observation.
        """
        self.products += weight * torch.bmm(u.mT, u)
        self.residuals += weight * torch.bmm(u.mT, left)
        self.square_residual += weight * float(left.square().sum())
        self.square_output += weight * float(wanted.square().sum())
        self.observations += weight * u.shape[1]


class Regression:
    """A least-squares fit of the weight and bias of a convolution to inputs and wanted outputs, in float64.

    The unknowns are the differences to a first guess. Each group of channels is fitted separately. Only sums are kept, not
    the observations. The error is measured on observations that were not fitted.

    Attributes:
        centre: the first guess, the centre of the exact kernel.
    """

    def __init__(self, guess: AffineOperator) -> None:
        """Begin with no observations and this first guess."""
        self.centre = guess = replace(guess, weight=guess.weight.double())
        self._groups, self._unknowns = guess.groups, guess.weight[0].numel() + 1
        sizes = (self._groups, self._unknowns, guess.out_channels // self._groups)
        self._fitted, self._held_out = _WeightedSums(*sizes, guess.weight), _WeightedSums(*sizes, guess.weight)
        self._generator = torch.Generator().manual_seed(0)
        self._batches = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add observations at random positions of a batch.

        The fewer positions of a batch are drawn, the larger is the weight of each.

        Args:
            x: input of the modules, `[batch, in_channels, *spatial]`.
            y: their output, `[batch, out_channels, *output_size]`.
        """
        self._batches += 1
        patches, wanted = self._sample(x, y, max(OBSERVATIONS_PER_NUMBER * self._unknowns // self._batches, MIN_OBSERVATIONS))
        weight = y.numel() / wanted.numel()
        u = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
        left = wanted - torch.bmm(u, self._coefficients(self.centre))
        held_out = torch.arange(u.shape[1], device=u.device) % HELD_OUT_EVERY == 0
        for sums, part in ((self._held_out, held_out), (self._fitted, ~held_out)):
            sums.add(u[:, part], left[:, part], wanted[:, part], weight)

    def solve(self) -> AffineOperator:
        """Return the operator with the smallest squared error on the fitted observations."""
        products = self._fitted.products
        unit = torch.eye(self._unknowns, dtype=products.dtype, device=products.device)
        ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean() * unit
        difference = torch.linalg.solve(products + ridge, self._fitted.residuals)
        coefficients = self._coefficients(self.centre) + difference
        weight = coefficients[:, :-1].mT.reshape(self.centre.weight.shape)
        return replace(self.centre, weight=weight, bias=coefficients[:, -1].flatten())

    def error(self, operator: AffineOperator) -> float:
        """Return the root mean square error of an operator on the held-out observations.

        It is divided by the root mean square of the wanted output.
        """
        sums, step = self._held_out, self._coefficients(operator) - self._coefficients(self.centre)
        explained = 2 * (step * sums.residuals).sum() - (step * torch.bmm(sums.products, step)).sum()
        return float((max(sums.square_residual - float(explained), 0.0) / max(sums.square_output, 1e-300)) ** 0.5)

    def moments(self, operator: AffineOperator) -> tuple[Tensor, Tensor]:
        """Return the mean and the variance of an operator's output without its bias, over the fitted observations.

        Both have the shape `[out_channels]`.
        """
        products, observations = self._fitted.products, self._fitted.observations
        weight = self._coefficients(operator)
        weight[:, -1] = 0
        mean = torch.bmm(products[:, -1:], weight).flatten() / observations
        square = (weight * torch.bmm(products, weight)).sum(1).flatten() / observations
        return mean, (square - mean.square()).clamp_min(0)

    def _coefficients(self, operator: AffineOperator) -> Tensor:
        """Return the weight and bias of an operator as `[groups, unknowns, outputs]`. The last unknown is the bias."""
        both = torch.cat([operator.weight.flatten(1), operator.bias.unsqueeze(1)], 1)
        return both.reshape(self._groups, -1, both.shape[1]).mT

    def _sample(self, x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return the patches and the wanted outputs at random positions of a batch.

        Args:
            x: `[batch, in_channels, *spatial]`.
            y: `[batch, out_channels, *output_size]`.
            most: the largest number of positions to draw.

        Returns:
            Patches `[groups, positions, inputs]` and outputs `[groups, positions, outputs]`, in float64.
        """
        operator = self.centre
        windows = F.pad(x, [zeros for axis in reversed(operator.axes) for zeros in (axis.before, axis.after)])
        for index, axis in enumerate(operator.axes):
            windows = windows.unfold(2 + index, axis.kernel, axis.stride)
        shape = (y.shape[0], *y.shape[2:])
        if tuple(windows.shape[2 : y.ndim]) != shape[1:]:
            raise ValueError(f"one convolution gives {tuple(windows.shape[2 : y.ndim])} positions, the stretch {shape[1:]}")
        total = math.prod(shape)
        count = min(total, most)
        chosen = torch.randperm(total, generator=self._generator, device="cpu")[:count].to(x.device)
        batch, *position = torch.unravel_index(chosen, shape)
        at: Any = (batch, slice(None), *position)
        patches, wanted = (values[at].double().reshape(count, self._groups, -1) for values in (windows, y))
        return patches.transpose(0, 1), wanted.transpose(0, 1)
