"""The table of activations: value, gradient, parameters and linear regions of each, in plain PyTorch.

Each activation is one entry of `ACTIVATIONS`. The public functions, their registered operators, the references and the
compilation without a GPU (`aot`) read the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

# The constants of SELU (Klambauer et al. 2017, equation 14).
SELU_ALPHA, SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934


class Activation(NamedTuple):
    """An entry of the table of activations.

    Attributes:
        function: `function(x, *parameters)` returns the activation of `x` as a new tensor.
        backward: `backward(grad, x, *parameters)` returns the gradient of `x`, given `grad`, the gradient of the activation.
        parameters: the parameters' names, as in torch.nn.functional, and their defaults, in the order of the arguments.
        regions: `regions(*parameters)` returns the points at which a piecewise activation changes from one formula to the
            next. None for an activation that is not piecewise.
    """

    function: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    parameters: Mapping[str, float] = MappingProxyType({})
    regions: Callable[..., tuple[float, ...]] | None = None


def _quick_gelu(x: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x) (Hendrycks and Gimpel 2016).

    16-bit formats are computed in float32 and rounded once, as in PyTorch's gelu.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x for `_quick_gelu`, computed in the same precision."""
    wide = x if x.dtype == torch.float64 else x.float()
    sigmoid = torch.sigmoid(1.702 * wide)
    return (grad * sigmoid * (1 + 1.702 * wide * (1 - sigmoid))).to(x.dtype)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x for silu.

    PyTorch's operator for it has no derivative itself. If gradients are recorded, the differentiable formula is used instead.
    """
    if not torch.is_grad_enabled():
        return cast(Tensor, aten.silu_backward(grad, x))
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x for mish. The two cases are those of `_silu_backward`."""
    if not torch.is_grad_enabled():
        return cast(Tensor, aten.mish_backward(grad, x))
    tanh = torch.tanh(F.softplus(x))
    return grad * (tanh + x * torch.sigmoid(x) * (1 - tanh * tanh))


def _at_zero(*parameters: float) -> tuple[float, ...]:
    """Return the only edge of an activation that changes its formula at 0, whatever its parameters."""
    return (0.0,)


# Names and parameters are those of torch.nn.functional, with four additions. identity returns a copy. gelu_tanh is gelu with
# approximate="tanh". relu2 is the square of relu. quick_gelu is x sigmoid(1.702 x), as in Hugging Face's transformers. No
# function returns its argument itself.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "identity": Activation(torch.clone, lambda grad, x: grad.clone()),
        "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0), regions=_at_zero),
        "relu6": Activation(F.relu6, lambda grad, x: aten.hardtanh_backward(grad, x, 0, 6), regions=lambda: (0.0, 6.0)),
        "leaky_relu": Activation(
            F.leaky_relu,
            lambda grad, x, slope: aten.leaky_relu_backward(grad, x, slope, False),
            {"negative_slope": 0.01},
            _at_zero,
        ),
        "elu": Activation(F.elu, lambda grad, x, alpha: aten.elu_backward(grad, alpha, 1, 1, False, x), {"alpha": 1.0}),
        "selu": Activation(F.selu, lambda grad, x: aten.elu_backward(grad, SELU_ALPHA, SELU_SCALE, 1, False, x)),
        "celu": Activation(
            F.celu, lambda grad, x, alpha: aten.elu_backward(grad, alpha, 1, 1 / alpha, False, x), {"alpha": 1.0}
        ),
        "gelu": Activation(F.gelu, aten.gelu_backward),
        "gelu_tanh": Activation(partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
        "silu": Activation(F.silu, _silu_backward),
        "mish": Activation(F.mish, _mish_backward),
        "softplus": Activation(F.softplus, aten.softplus_backward, {"beta": 1.0, "threshold": 20.0}),
        "hardswish": Activation(F.hardswish, aten.hardswish_backward, regions=lambda: (-3.0, 3.0)),
        "hardtanh": Activation(
            F.hardtanh, aten.hardtanh_backward, {"min_val": -1.0, "max_val": 1.0}, lambda low, high: (low, high)
        ),
        "relu2": Activation(lambda x: F.relu(x).square(), lambda grad, x: 2 * F.relu(x) * grad, regions=_at_zero),
        "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
        # prelu takes a tensor of slopes in addition; see `activate`.
        "prelu": Activation(
            lambda x, weight: torch.where(x > 0, x, weight * x),
            lambda grad, x, weight: torch.where(x > 0, grad, weight * grad),
            regions=_at_zero,
        ),
    }
)


def linear_regions(activation: str, **parameters: float) -> tuple[float, ...]:
    """Return the points at which a piecewise activation changes from one formula to the next.

    `activation_states(..., states="regions")` counts how many values lie in each interval between these points.

    Args:
        activation: the name of an activation, as for `activation_states`.
        **parameters: parameters of the activation, as for `activation_states`.

    Returns:
        The points in rising order: (0.0,) for relu, (-3.0, 3.0) for hardswish.

    Raises:
        TypeError: a parameter does not belong to the activation, or is not a number.
        ValueError: the activation is unknown or is not piecewise, or a parameter is out of range.

    Examples:
        >>> from fastentropy_kernels import linear_regions
        >>> linear_regions("relu6")
        (0.0, 6.0)
        >>> linear_regions("hardtanh", max_val=2.0)
        (-1.0, 2.0)
    """
    values = checked_parameters(activation, parameters)
    regions = ACTIVATIONS[activation].regions
    if regions is None:
        piecewise = ", ".join(name for name, entry in ACTIVATIONS.items() if entry.regions)
        raise ValueError(f"activation: {activation} has no linear regions, expected one of {piecewise} (or give edges=)")
    return tuple(float(edge) for edge in regions(*values))


def activate(
    x: Tensor, activation: str, parameters: Sequence[float] = (), weight: Tensor | None = None, channel_axis: int = 1
) -> Tensor:
    """Return the activation of `x` as a new tensor.

    Args:
        x: a floating-point tensor of any shape.
        activation: a key of `ACTIVATIONS`.
        parameters: the parameters of the activation, in the order of the table.
        weight: the slopes of prelu, `[neurons]` or `[1]`. None for every other activation.
        channel_axis: the axis of `x` along which the slopes lie.
    """
    weights = () if weight is None else (along_axis(weight, x.ndim, channel_axis),)
    return ACTIVATIONS[activation].function(x, *weights, *parameters)


def activate_backward(
    grad: Tensor, x: Tensor, activation: str, parameters: Sequence[float], weight: Tensor | None, channel_axis: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `x` and of `weight`, given the gradient of the activation.

    Args:
        grad: the gradient of the activation, with the shape of `x`.
        x: the argument of the activation.
        activation: a key of `ACTIVATIONS`.
        parameters: the parameters of the activation, in the order of the table.
        weight: the slopes of prelu, `[neurons]` or `[1]`. None for every other activation.
        channel_axis: the axis of `x` along which the slopes lie.

    Returns:
        The gradient of `x` and the gradient of `weight`. The second is None if `weight` is None.
    """
    if weight is None:
        return ACTIVATIONS[activation].backward(grad, x, *parameters), None
    grad_x = ACTIVATIONS[activation].backward(grad, x, along_axis(weight, x.ndim, channel_axis))
    others = [axis for axis in range(x.ndim) if weight.numel() == 1 or axis != channel_axis % x.ndim]
    slopes = torch.where(x > 0, 0, x * grad)
    return grad_x, (slopes.sum(others) if others else slopes).view_as(weight)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which autocast is disabled on this type of device.

    Under autocast, some activations would return float32, and some matrix products would be computed in 16 bits.
    """
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def along_axis(weight: Tensor, ndim: int, channel_axis: int) -> Tensor:
    """Return a view of the 1-d tensor `weight` that broadcasts along `channel_axis` of a tensor with `ndim` axes."""
    return weight.view([-1 if axis == channel_axis % ndim else 1 for axis in range(ndim)])


def checked_parameters(activation: str, parameters: Mapping[str, float]) -> tuple[float, ...]:
    """Check the parameters of an activation, and return all of them in the order of the table.

    Args:
        activation: the name of an activation.
        parameters: numbers by name. A parameter that is missing gets its default.

    Raises:
        TypeError: a parameter does not belong to the activation, or is not a number.
        ValueError: the activation is unknown, or a parameter is out of range.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    defaults = ACTIVATIONS[activation].parameters
    if not defaults and not parameters:
        return ()
    for name, value in parameters.items():
        if name not in defaults:
            takes = " and ".join(defaults) or "none"
            raise TypeError(f"{name}: not a parameter of {activation}, which takes {takes}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    values = tuple(float(parameters.get(name, default)) for name, default in defaults.items())
    if activation == "hardtanh" and not values[0] < values[1]:
        raise ValueError(f"min_val: got {values[0]}, expected less than max_val, which is {values[1]}")
    if activation in ("celu", "softplus") and values[0] == 0:
        raise ValueError(f"{next(iter(defaults))}: got 0.0, expected another number: {activation} divides by it")
    return values
