"""Approximate a series of convolutions by one convolution that is smaller and faster than the exact merged operator.

There are no activations between the convolutions. Two 3×3 convolutions merge into a 5×5 convolution, which takes more
multiplications than the two. A 3×3 convolution can only approximate them. The centre of the 5×5 kernel is a first guess. The
3×3 convolution with the smallest squared error on the network's own data is found by least squares: a linear regression from
input patches to outputs.
"""

import collections
import copy
import itertools
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
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.merging import compose_chain
from fastentropy.fusion.chains.nodes import module_path
from fastentropy.fusion.memory_format import like_format
from fastentropy.fusion.tracing import export, inference_module

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

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


@dataclass(frozen=True)
class Projection:
    """A series of modules that one convolution approximates.

    The new convolution replaces the first convolution among the modules. If the modules after it include a batch norm, a new
    batch norm replaces the first of these. All other modules become the identity.

    Attributes:
        modules: paths of the modules, in call order.
        in_channels: number of input channels of the new convolution.
        out_channels: number of its output channels.
        kernel: size of its kernel along each spatial axis.
        stride: its stride along each spatial axis.
        padding: number of zeros that it pads on each side, along each spatial axis.
        groups: its number of groups.
        relative_error: root mean square of the difference between its output and the output of the modules, divided by the
            root mean square of the latter. It is measured before any training, on observations that were not fitted.
        centre_error: the same error for the centre of the exact kernel in place of the fitted convolution.

    Examples:
        >>> import torch
        >>> from fastentropy.fusion.projection import project
        >>> convolutions = [torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 2, 3, padding=1)]
        >>> model = torch.nn.Sequential(*convolutions).eval()
        >>> projection = project(model, ["0", "1"], lambda model: model(torch.randn(8, 3, 8, 8)))
        >>> projection.kernel, 0 < projection.relative_error < 1
        ((3, 3), True)
        >>> type(model[1]).__name__
        'Identity'
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
        """Make a projection from its fields, as they are read from JSON.

        Args:
            values: the fields by name. Lists are converted to tuples.

        Returns:
            The projection.

        Raises:
            TypeError: a field is missing or unknown.
        """
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)


def central_kernel(chain: Chain, composed: Callable[[Chain], AffineOperator] = compose_chain) -> AffineOperator:
    """Return the centre of the merged kernel of a series of convolutions.

    Along each axis, the centre is as large as the largest kernel among the convolutions.

    Args:
        chain: the convolutions, as operators with spatial axes.
        composed: returns the operator of a chain, as in `merging.merge`.

    Returns:
        A convolution with the same output size as the chain, for every input size.

    Raises:
        ValueError: the chain holds another element, or no smaller convolution has its output size.
    """
    if not all(isinstance(element, AffineOperator) and element.axes for element in chain):
        raise ValueError("only a series of convolutions can be approximated by one convolution")
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
    """Return the paths of the modules that may be replaced.

    These are convolutions with zero padding and batch norms, if they are called once and have no hooks. Subclasses are left
    out.

    Args:
        model: the model in eval mode.
        traced: its trace.
    """
    calls = collections.Counter(module_path(node) for node in traced.graph.nodes if node.op == "call_function")
    paths = collections.Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {
        name
        for name, module in model.named_modules()
        if type(module) in (*_CONVOLUTIONS, *_BATCH_NORMS)
        and calls[name] == paths[id(module)] == 1
        and getattr(module, "padding_mode", "zeros") == "zeros"
        and not has_hooks(module)
    }


@torch.no_grad()
def project(model: nn.Module, names: Sequence[str], calibrate: Callable[[nn.Module], object]) -> Projection:
    """Replace a series of modules by the one convolution with the smallest squared error on the calibration data.

    Args:
        model: the model in eval mode. It is changed in place; if an error is raised, it stays as it was.
        names: paths of the modules in call order. All of them must be affine. The output of each must go to the next one
            and nowhere else.
        calibrate: called as `calibrate(model)`; makes forward passes on the training data.

    Returns:
        The shape of the new convolution and its errors.

    Raises:
        ValueError: no convolution can replace the modules, or calibrate made no forward pass.
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
    """Set the statistics and weights of a batch norm such that it only adds a bias in eval mode.

    In training mode it normalises as usual.

    Args:
        norm: a batch norm, which is changed.
        mean: `[channels]`, the mean of its input.
        variance: `[channels]`, the variance of its input.
        bias: `[channels]`, what it adds.
    """
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(mean + bias)


def install(model: nn.Module, projection: Projection) -> tuple[Any, Any]:
    """Replace the modules of a projection by a new convolution, whose weights are not set yet.

    Args:
        model: the model, which is changed in place.
        projection: names the modules, and gives the shape of the convolution.

    Returns:
        The new convolution, and the new batch norm after it, or None if there is none.
    """
    modules = {name: model.get_submodule(name) for name in projection.modules}
    first = next(name for name, module in modules.items() if isinstance(module, _CONVOLUTIONS))
    from_first = itertools.dropwhile(lambda name: name != first, modules)
    norm = next((name for name in from_first if isinstance(modules[name], _BATCH_NORMS)), None)
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


class _Regression:
    """A least-squares fit of the weight and bias of a convolution to inputs and wanted outputs, in float64.

    The unknowns are the differences to a first guess. Each group of channels is fitted separately. Only sums are kept, not
    the observations. The error is measured on observations that were not fitted.

    Attributes:
        centre: the first guess, the centre of the exact kernel.
    """

    def __init__(self, guess: AffineOperator) -> None:
        """Begin with no observations and this first guess."""
        self.centre = guess
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
        ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean() * torch.eye(self._unknowns).to(products)
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
        chosen = torch.randperm(total, generator=self._generator)[:count].to(x.device)
        batch, *position = torch.unravel_index(chosen, shape)
        at: Any = (batch, slice(None), *position)
        patches, wanted = (values[at].double().reshape(count, self._groups, -1) for values in (windows, y))
        return patches.transpose(0, 1), wanted.transpose(0, 1)
