"""Approximate a linearised stretch of convolutions by one of them, where the exact operator would be larger and slower.

Two 3×3 convolutions are a 5×5 one, which multiplies more than both. Its centre is a 3×3 convolution, and the 3×3 convolution
nearest to the stretch on the data that the network sees is found by least squares: a regression from patches to outputs.
"""

import collections
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fastentropy._compat import has_hooks
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Chain
from fastentropy.fusion.chains.finding import find_chains, module_path
from fastentropy.fusion.chains.merging import compose_chain
from fastentropy.fusion.memory_format import like_format
from fastentropy.fusion.tracing import export, inference_module

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

#: The first batch gives so many observations for each number of an output that is fitted, the second half as many, the third
#: a third, and none fewer than the least.
OBSERVATIONS, LEAST = 8, 64
#: Every so many-th observation is for the error, not for the fit.
HELD_OUT = 4

#: Pulls towards the centre of the exact kernel what the data leave open, relative to the mean square of the inputs.
RIDGE = 1e-6


@dataclass(frozen=True)
class Projection:
    """A stretch of modules that one convolution stands for.

    It takes the place of the first convolution among them; a batch norm behind it, if there is one, is replaced by a new one,
    and the others become the identity.

    Attributes:
        modules: the paths of the modules.
        in_channels: of the convolution.
        out_channels: of the convolution.
        kernel: of the convolution, along each spatial axis.
        stride: along each spatial axis.
        padding: with zeros, along each spatial axis.
        groups: of the convolution.
        relative_error: the root mean square of what the stretch gave and it does not, over that of what the stretch gave,
            before any training, at positions of the calibration data that were not fitted.
        centre_error: that of the centre of the exact kernel.
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


def central_kernel(chain: Chain, composed: Callable[[Chain], AffineOperator] = compose_chain) -> AffineOperator:
    """The middle of the merged kernel of a chain of convolutions, as large as the largest kernel among them.

    composed is as in `merging.merge`. Raises ValueError where the chain is not of that kind.
    """
    if not all(isinstance(element, AffineOperator) and element.axes for element in chain):
        raise ValueError("only a series of convolutions is approximated by one of them")
    merged = composed(chain)
    # Each element is an operator, as checked above.
    kernel = [max(sizes) for sizes in zip(*(element.kernel for element in chain), strict=True)]  # type: ignore[union-attr]
    cut = [k - own for k, own in zip(merged.kernel, kernel, strict=True)]
    padding = [(axis.before - each // 2, axis.after - each // 2) for axis, each in zip(merged.axes, cut, strict=True)]
    plain = all(axis.dilation == axis.upsampling == 1 for axis in merged.axes)
    if any(each % 2 for each in cut) or not plain or any(a != b or a < 0 for a, b in padding):
        raise ValueError("no smaller convolution of the same kind has the same output size")
    taps: Any = (..., *(slice(each // 2, each // 2 + own) for each, own in zip(cut, kernel, strict=True)))
    return replace(merged, weight=merged.weight[taps], padding=tuple(a for a, _ in padding))


def replaceable_modules(model: nn.Module, traced: GraphModule) -> set[str]:
    """The paths of the modules that may be replaced: plain convolutions and batch norms, called once, whom nobody watches."""
    calls = collections.Counter(module_path(node) for node in traced.graph.nodes if node.op == "call_function")
    places = collections.Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {
        name
        for name, module in model.named_modules()
        if type(module) in (*_CONVOLUTIONS, *_BATCH_NORMS)
        and calls[name] == places[id(module)] == 1
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and not has_hooks(module)
    }


@torch.no_grad()
def project(model: nn.Module, names: Sequence[str], calibrate: Callable[[nn.Module], object]) -> Projection:
    """Replace a series of modules by the one convolution that is nearest to it on the calibration data, in place.

    names: modules of which each gives its output to the next and to nothing else, linearised but for what is affine.
    calibrate(model) makes forward passes. Raises ValueError, and leaves the model as it was, where that cannot be.
    """
    regression: _Regression | None = None
    stretch = copy.deepcopy(nn.Sequential(*(model.get_submodule(name) for name in names)))

    def observe(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        nonlocal regression
        x = inputs[0] if inputs else named["input"]
        if regression is None:
            program = export(stretch, (x[:2].clone(),))
            (chain,) = find_chains(inference_module(program))
            regression = _Regression(central_kernel(chain.elements))
        regression.add(x, stretch(x.clone()))

    handle = model.get_submodule(names[0]).register_forward_pre_hook(observe, with_kwargs=True)
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
    convolution, norm = install(model, projection)
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


def install(model: nn.Module, projection: Projection) -> tuple[Any, Any]:
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
        old_norm: Any = modules[norm]
        new[norm] = type(old_norm)(projection.out_channels, eps=old_norm.eps, momentum=old_norm.momentum)
    new[first].weight.data = like_format(new[first].weight.data, old.weight)
    for name, module in new.items():
        module.requires_grad_(old.weight.requires_grad)
        model.set_submodule(name, module.to(old.weight.device, old.weight.dtype).train(modules[name].training))
    return new[first], new[norm] if norm else None


class _Sums:
    """Weighted sums over observations: of u uᵀ, u rᵀ, r² and y², with u a patch and a one, r what a first guess leaves of y."""

    def __init__(self, groups: int, unknowns: int, outputs: int, like: Tensor) -> None:
        self.products = like.new_zeros(groups, unknowns, unknowns)
        self.residuals = like.new_zeros(groups, unknowns, outputs)
        self.square_residual = self.square_output = self.observations = 0.0

    def add(self, u: Tensor, left: Tensor, wanted: Tensor, weight: float) -> None:
        """Observations of each group: patches [groups, n, unknowns], what is left and what is wanted [groups, n, outputs]."""
        self.products += weight * torch.bmm(u.mT, u)
        self.residuals += weight * torch.bmm(u.mT, left)
        self.square_residual += weight * float(left.square().sum())
        self.square_output += weight * float(wanted.square().sum())
        self.observations += weight * u.shape[1]


class _Regression:
    """Least squares for the weight of a convolution, given inputs and wanted outputs, in float64.

    Solved for the difference to a first guess, each group by itself, from sums alone. The error is that of observations that
    were not fitted.
    """

    def __init__(self, guess: AffineOperator) -> None:
        self.centre = guess
        self._groups, self._unknowns = guess.groups, guess.weight[0].numel() + 1
        sizes = (self._groups, self._unknowns, guess.out_channels // self._groups)
        self._fitted, self._held_out = _Sums(*sizes, guess.weight), _Sums(*sizes, guess.weight)
        self._generator = torch.Generator().manual_seed(0)
        self._batches = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take some positions of a batch, each with the weight of those that it stands for."""
        self._batches += 1
        patches, wanted = self._sample(x, y, max(OBSERVATIONS * self._unknowns // self._batches, LEAST))
        weight = y.numel() / wanted.numel()
        u = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
        left = wanted - torch.bmm(u, self._coefficients(self.centre))
        held_out = torch.arange(u.shape[1], device=u.device) % HELD_OUT == 0
        for sums, part in ((self._held_out, held_out), (self._fitted, ~held_out)):
            sums.add(u[:, part], left[:, part], wanted[:, part], weight)

    def solve(self) -> AffineOperator:
        """The operator that leaves the least."""
        products = self._fitted.products
        ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean() * torch.eye(self._unknowns).to(products)
        difference = torch.linalg.solve(products + ridge, self._fitted.residuals)
        coefficients = self._coefficients(self.centre) + difference
        weight = coefficients[:, :-1].mT.reshape(self.centre.weight.shape)
        return replace(self.centre, weight=weight, bias=coefficients[:, -1].flatten())

    def error(self, operator: AffineOperator) -> float:
        """The root mean square of what an operator leaves, over that of the output."""
        sums, step = self._held_out, self._coefficients(operator) - self._coefficients(self.centre)
        explained = 2 * (step * sums.residuals).sum() - (step * torch.bmm(sums.products, step)).sum()
        return float((max(sums.square_residual - float(explained), 0.0) / max(sums.square_output, 1e-300)) ** 0.5)

    def moments(self, operator: AffineOperator) -> tuple[Tensor, Tensor]:
        """The mean and the variance of each output channel without its bias, over what was observed."""
        products, observations = self._fitted.products, self._fitted.observations
        weight = self._coefficients(operator)
        weight[:, -1] = 0
        mean = torch.bmm(products[:, -1:], weight).flatten() / observations
        square = (weight * torch.bmm(products, weight)).sum(1).flatten() / observations
        return mean, (square - mean.square()).clamp_min(0)

    def _coefficients(self, operator: AffineOperator) -> Tensor:
        """The numbers of an operator as [groups, inputs of a patch and the one, outputs]."""
        both = torch.cat([operator.weight.flatten(1), operator.bias.unsqueeze(1)], 1)
        return both.reshape(self._groups, -1, both.shape[1]).mT

    def _sample(self, x: Tensor, y: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Patches [groups, positions, inputs] and outputs [groups, positions, outputs] at random positions of a batch."""
        operator = self.centre
        windows = F.pad(x, [zeros for axis in reversed(operator.axes) for zeros in (axis.before, axis.after)])
        for index, axis in enumerate(operator.axes):
            windows = windows.unfold(2 + index, axis.kernel, axis.stride)
        shape = (y.shape[0], *y.shape[2:])
        if tuple(windows.shape[2 : y.ndim]) != shape[1:]:
            raise ValueError(f"one convolution gives {tuple(windows.shape[2 : y.ndim])} positions, the stretch {shape[1:]}")
        total = math.prod(shape)
        count = min(total, most)
        chosen = torch.randperm(total, generator=self._generator)[:count].to(x.device)
        batch, *place = torch.unravel_index(chosen, shape)
        at: Any = (batch, slice(None), *place)
        patches, wanted = (values[at].double().reshape(count, self._groups, -1) for values in (windows, y))
        return patches.transpose(0, 1), wanted.transpose(0, 1)
