"""Approximate a linearised stretch of convolutions by one of them, where the exact operator would be larger and slower.

Two 3×3 convolutions are a 5×5 one, which multiplies more than both. Its centre is a 3×3 convolution, and the 3×3 convolution
nearest to the stretch on the data that the network sees is found by least squares: a regression from patches to outputs.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastentropy.fusion.affine import AffineOperator
from fastentropy.fusion.chains import find_chains
from fastentropy.fusion.elements import Chain
from fastentropy.fusion.lowering import like_format
from fastentropy.fusion.merging import compose_all
from fastentropy.fusion.tracing import export, inference_module

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: Observations for each number that is fitted, and how many are taken from one batch.
OBSERVATIONS, OBSERVATIONS_PER_BATCH = 8, 4096

#: Pulls towards the centre of the exact kernel what the data leave open, relative to the mean square of the inputs.
RIDGE = 1e-6


@dataclass(frozen=True)
class Projection:
    """A stretch of modules that one convolution stands for.

    It takes the place of the first convolution among them; a batch norm behind it, if there is one, is kept, and the others
    become the identity. relative_error is the root mean square of what the stretch gave and it does not, over that of what the
    stretch gave, on the calibration data and before any training; centre_error is that of the centre of the exact kernel.
    """

    modules: tuple[str, ...]
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int
    relative_error: float
    centre_error: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Projection":
        """The projection whose fields JSON gave back. Raises TypeError where it has others."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)


def centre(chain: Chain, composed: Callable[[Chain], AffineOperator] = compose_all) -> AffineOperator:
    """The middle of the merged kernel of a chain of convolutions, as large as the largest kernel among them.

    composed is as in `merging.merge`. Raises ValueError where the chain is not of that kind, or its merged operator not larger.
    """
    if not all(isinstance(element, AffineOperator) and element.axes for element in chain):
        raise ValueError("only a series of convolutions is approximated by one of them")
    merged = composed(chain)
    kernel = [max(sizes) for sizes in zip(*(element.kernel for element in chain), strict=True)]  # type: ignore[union-attr]
    cut = [k - own for k, own in zip(merged.kernel, kernel, strict=True)]
    padding = [(axis.before - each // 2, axis.after - each // 2) for axis, each in zip(merged.axes, cut, strict=True)]
    plain = all(axis.dilation == axis.upsampling == 1 for axis in merged.axes)
    if not any(cut) or any(each % 2 for each in cut) or not plain or any(a != b or a < 0 for a, b in padding):
        raise ValueError("no smaller convolution of the same kind has the same output size")
    taps: Any = (..., *(slice(each // 2, each // 2 + own) for each, own in zip(cut, kernel, strict=True)))
    return replace(merged, weight=merged.weight[taps], padding=tuple(a for a, _ in padding))


def can_project(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether the modules of a stretch, but for its activations, are plain convolutions and batch norms."""
    return {type(model.get_submodule(name)) for name in names} <= {*_CONVOLUTIONS, *_BATCH_NORMS}


@torch.no_grad()
def project(model: nn.Module, names: Sequence[str], calibrate: Callable[[nn.Module], object]) -> Projection:
    """Replace a series of modules by the one convolution that is nearest to it on the calibration data, in place.

    names: modules of which each gives its output to the next and to nothing else, linearised but for what is affine.
    calibrate(model) makes forward passes. Raises ValueError, and leaves the model as it was, where that cannot be.
    """
    regression: _Regression | None = None
    stretch = copy.deepcopy(nn.Sequential(*(model.get_submodule(name) for name in names)))

    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal regression
        if regression is None:
            program = export(stretch, (inputs[0][:2].clone(),))
            (chain,) = find_chains(inference_module(program))
            regression = _Regression(centre(chain.elements))
        regression.add(inputs[0], stretch(inputs[0].clone()))

    handle = model.get_submodule(names[0]).register_forward_pre_hook(observe)
    try:
        calibrate(model)
    finally:
        handle.remove()
    if regression is None:
        raise ValueError(
            "calibrate made no forward pass of the model it was given; call model(batch) on the training data in it"
        )
    operator = regression.solve()
    projection = Projection(
        tuple(names),
        operator.in_channels,
        operator.out_channels,
        operator.kernel,
        operator.stride,
        tuple(axis.before for axis in operator.axes),
        operator.groups,
        regression.error(operator),
        regression.error(regression.centre),
    )
    convolution, norm = place(model, projection)
    convolution.weight.copy_(operator.weight)
    if norm is None:
        convolution.bias.copy_(operator.bias)
    else:
        _set_moments(norm, *regression.moments(operator), operator.bias)
    return projection


def _set_moments(norm: Any, mean: Tensor, variance: Tensor, bias: Tensor) -> None:
    """Let a batch norm in eval mode add a bias and do nothing else, and in training mode normalise as usual."""
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(mean + bias)


def place(model: nn.Module, projection: Projection) -> tuple[Any, Any]:
    """Put a new convolution, and a new batch norm or None, into the place of a stretch of modules; returns these two."""
    modules = {name: model.get_submodule(name) for name in projection.modules}
    first = next(name for name, module in modules.items() if isinstance(module, _CONVOLUTIONS))
    behind = list(modules)[list(modules).index(first) :]
    norm = next((name for name in behind if isinstance(modules[name], _BATCH_NORMS)), None)
    old: Any = modules[first]
    new: dict[str, Any] = {name: nn.Identity() for name in modules}
    new[first] = type(old)(
        projection.in_channels,
        projection.out_channels,
        projection.kernel,
        projection.stride,
        projection.padding,
        groups=projection.groups,
        bias=norm is None,
    )
    if norm:
        new[norm] = type(modules[norm])(projection.out_channels)
    new[first].weight.data = like_format(new[first].weight.data, old.weight)
    for name, module in new.items():
        model.set_submodule(name, module.to(old.weight.device, old.weight.dtype).train(modules[name].training))
    return new[first], new[norm] if norm else None


class _Regression:
    """Least squares for the weight of a convolution, given inputs and wanted outputs, in float64.

    Solved for the difference to a first guess. With u a patch and a one behind it, the sums of u uᵀ, u rᵀ and of r² are all
    that is kept, r being what the first guess leaves of the output; each group has its own.
    """

    def __init__(self, guess: AffineOperator) -> None:
        self.centre = guess
        self._groups = guess.groups
        self._unknowns = guess.weight[0].numel() + 1
        self._products = guess.weight.new_zeros(self._groups, self._unknowns, self._unknowns)
        self._residuals = guess.weight.new_zeros(self._groups, self._unknowns, guess.out_channels // self._groups)
        self._square_residual = self._square_output = 0.0
        self._observations = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take some positions of a batch, as long as more are needed."""
        if self._observations >= OBSERVATIONS * self._unknowns:
            return
        patches, wanted = self._sample(x, y)
        u = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
        left = wanted - torch.bmm(u, self._coefficients(self.centre))
        self._products += torch.bmm(u.mT, u)
        self._residuals += torch.bmm(u.mT, left)
        self._square_residual += float(left.square().sum())
        self._square_output += float(wanted.square().sum())
        self._observations += u.shape[1]

    def solve(self) -> AffineOperator:
        """The operator that leaves the least."""
        ridge = RIDGE * self._products.diagonal(dim1=1, dim2=2).mean() * torch.eye(self._unknowns).to(self._products)
        difference = torch.linalg.solve(self._products + ridge, self._residuals)
        coefficients = self._coefficients(self.centre) + difference
        weight = coefficients[:, :-1].mT.reshape(self.centre.weight.shape)
        return replace(self.centre, weight=weight, bias=coefficients[:, -1].flatten())

    def error(self, operator: AffineOperator) -> float:
        """The root mean square of what an operator leaves, over that of the output."""
        step = self._coefficients(operator) - self._coefficients(self.centre)
        explained = 2 * (step * self._residuals).sum() - (step * torch.bmm(self._products, step)).sum()
        return float((max(self._square_residual - float(explained), 0.0) / max(self._square_output, 1e-300)) ** 0.5)

    def moments(self, operator: AffineOperator) -> tuple[Tensor, Tensor]:
        """The mean and the variance of each output channel without its bias, over what was observed."""
        weight = self._coefficients(operator)
        weight[:, -1] = 0
        mean = torch.bmm(self._products[:, -1:], weight).flatten() / self._observations
        square = (weight * torch.bmm(self._products, weight)).sum(1).flatten() / self._observations
        return mean, (square - mean.square()).clamp_min(0)

    def _coefficients(self, operator: AffineOperator) -> Tensor:
        """The numbers of an operator as [groups, inputs of a patch and the one, outputs]."""
        both = torch.cat([operator.weight.flatten(1), operator.bias.unsqueeze(1)], 1)
        return both.reshape(self._groups, -1, both.shape[1]).mT

    def _sample(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [groups, positions, inputs] and outputs [groups, positions, outputs] at random positions of a batch."""
        operator = self.centre
        windows = F.pad(x, [zeros for axis in reversed(operator.axes) for zeros in (axis.before, axis.after)])
        for index, axis in enumerate(operator.axes):
            windows = windows.unfold(2 + index, axis.kernel, axis.stride)
        shape = (y.shape[0], *y.shape[2:])
        total = int(torch.tensor(shape).prod())
        count = min(total, OBSERVATIONS_PER_BATCH)
        chosen = torch.randperm(total, generator=self._generator)[:count].to(x.device)
        batch, *place = torch.unravel_index(chosen, shape)
        at: Any = (batch, slice(None), *place)
        patches, wanted = (values[at].double().reshape(count, self._groups, -1) for values in (windows, y))
        return patches.transpose(0, 1), wanted.transpose(0, 1)
