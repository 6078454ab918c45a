"""Approximate a series of convolutions by one convolution that is smaller and faster than the exact merged operator.

There are no activations between the convolutions. Two 3×3 convolutions merge into a 5×5 convolution, which takes more
multiplications than the two. A 3×3 convolution can only approximate them. The centre of the 5×5 kernel is a first guess. The
3×3 convolution with the smallest squared error on the network's own data is found by least squares: a linear regression from
input patches to outputs.
"""

import collections
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fastentropy._compat import has_hooks
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Chain
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.merging import compose_chain
from fastentropy.fusion.chains.nodes import module_path
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.memory_format import like_format
from fastentropy.fusion.regression import Regression
from fastentropy.fusion.tracing import export, inference_module

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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
    regression: Regression | None = None
    stretch = copy.deepcopy(nn.Sequential(*(model.get_submodule(name) for name in names)))

    def observe(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        nonlocal regression
        x = inputs[0] if inputs else named["input"]
        if regression is None:
            program = export(stretch, Inputs((x[:2].clone(),)))
            (chain,) = find_chains(inference_module(program))
            regression = Regression(central_kernel(chain.elements))
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
