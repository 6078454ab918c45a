"""The oracle: activations, their gradients and the states, in plain PyTorch: any floating dtype, any strides, any device."""

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

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848, 1.0507009873554804934
"""The constants of SELU (Klambauer et al. 2017, equation 14)."""


class Activation(NamedTuple):
    """One activation: `function(x, *parameters)` and `backward(gradient of y, x, *parameters)`.

    `parameters` maps their names, those of torch.nn.functional, to their defaults, in order. `regions(*parameters)`
    gives the points where one formula ends and the next begins, for an activation that is defined piece by piece.
    """

    function: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    parameters: Mapping[str, float] = MappingProxyType({})
    regions: Callable[..., tuple[float, ...]] | None = None


def _quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x) (Hendrycks and Gimpel 2016), in float32 for the 16-bit formats, as PyTorch does for gelu."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    sigmoid = torch.sigmoid(1.702 * wide)
    return (grad * sigmoid * (1 + 1.702 * wide * (1 - sigmoid))).to(x.dtype)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """As PyTorch does: its operator has no derivative, so where one may be asked for, the formula."""
    if not torch.is_grad_enabled():
        return cast(Tensor, aten.silu_backward(grad, x))
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return cast(Tensor, aten.mish_backward(grad, x))
    tanh = torch.tanh(F.softplus(x))
    return grad * (tanh + x * torch.sigmoid(x) * (1 - tanh * tanh))


def _at_zero(*parameters: float) -> tuple[float, ...]:
    return (0.0,)


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
        # prelu has a weight for each neuron besides, see `activate`.
        "prelu": Activation(
            lambda x, weight: torch.where(x > 0, x, weight * x),
            lambda grad, x, weight: torch.where(x > 0, grad, weight * grad),
            regions=_at_zero,
        ),
    }
)
"""Name -> activation. Names and parameters are those of torch.nn.functional; gelu_tanh is gelu with approximate="tanh",
relu2 the square of relu and quick_gelu x sigmoid(1.702 x), as in Hugging Face's transformers. No function returns its
argument."""


def activate(
    x: Tensor, activation: str, parameters: Sequence[float] = (), weight: Tensor | None = None, channel_axis: int = 1
) -> Tensor:
    """Return the activation of `x`, a new tensor; `weight` [neurons] or [1] is that of prelu."""
    weights = () if weight is None else (along_axis(weight, x.ndim, channel_axis),)
    return ACTIVATIONS[activation].function(x, *weights, *parameters)


def activate_backward(
    grad: Tensor, x: Tensor, activation: str, parameters: Sequence[float], weight: Tensor | None, channel_axis: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `x` and of `weight` (None where that is None) from the gradient of y."""
    if weight is None:
        return ACTIVATIONS[activation].backward(grad, x, *parameters), None
    grad_x = ACTIVATIONS[activation].backward(grad, x, along_axis(weight, x.ndim, channel_axis))
    others = [axis for axis in range(x.ndim) if weight.numel() == 1 or axis != channel_axis % x.ndim]
    slopes = torch.where(x > 0, 0, x * grad)
    return grad_x, (slopes.sum(others) if others else slopes).view_as(weight)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off, which would make a float32 y of some activations, and 16-bit sums of some products."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()


def along_axis(weight: Tensor, ndim: int, channel_axis: int) -> Tensor:
    """View a tensor of one axis so that it broadcasts along `channel_axis` of a tensor with `ndim` axes."""
    return weight.view([-1 if axis == channel_axis % ndim else 1 for axis in range(ndim)])


def add_states(
    x: Tensor,
    counts: Tensor,
    channel_axis: int,
    *,
    edges: Sequence[float] | None = None,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
) -> None:
    """Add, per neuron, how many values lie in each state to `counts`, and how many are NaN to `nan`, in place.

    Without `edges` the states are below, equal to and above zero: `counts` is [neurons, 3]. With them, state i holds
    `edges[i - 1] <= x < edges[i]`: `counts` is [neurons, len(edges) + 1]. NaN is in no state. `mask` (bool, the shape
    of `x` without the channel axis) says which positions count. The sums are integers: exact for any number of values.
    """
    by_position = x.detach().movedim(channel_axis, -1).unsqueeze(0)
    by_position = by_position.flatten(0, -2) if mask is None else by_position[mask.unsqueeze(0)]
    if edges is None:
        states = [by_position < 0, by_position == 0, by_position > 0]
    else:
        wide, borders = by_position.double(), [-torch.inf, *edges]
        at_least = [wide >= border for border in borders] + [torch.zeros_like(wide, dtype=torch.bool)]
        states = [at_least[i] & ~at_least[i + 1] for i in range(len(borders))]
    counts += torch.stack([state.sum(0) for state in states], dim=1)
    if nan is not None:
        nan += by_position.isnan().sum(0)
