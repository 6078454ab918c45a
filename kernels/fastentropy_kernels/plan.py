"""The fused pass for one place in a network, with all that does not change from call to call worked out before.

After a long loop Python starts from cold caches: what takes 50 microseconds in a benchmark takes 300 in a network.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from .arguments import Request
from .dispatch import is_fused, tell_autograd
from .layout import Arranged, arrange


class ActivationPlan:
    """`activation_states` for CPU tensors with the shape, strides and dtype of one. For one thread at a time."""

    def __init__(self, x: Tensor, counts: Tensor, arranged: Arranged, activation: str, inplace: bool) -> None:
        """See `make_plan`."""
        from . import states_numba

        y = arranged.values if inplace else torch.empty_like(arranged.values)
        self._launch = states_numba.prepare(arranged.values, counts, y=y, activation=activation)
        self._counts, self.inplace = counts, inplace
        self._shape, self._strides, self._dtype = x.shape, x.stride(), x.dtype

    def fits(self, x: Tensor) -> bool:
        """Whether x is a tensor that the plan was made for, under the same settings, and nobody looks on."""
        return (
            type(x) is Tensor
            and _get_tracing_state() is None
            and x.shape == self._shape
            and x.dtype is self._dtype
            and x.stride() == self._strides
            and x.is_cpu
            and not x.is_neg()
            and _len_torch_dispatch_stack() == 0
            and forward_ad._current_level < 0
            and not is_functorch_wrapped_tensor(x)
            and not (x.requires_grad and torch.is_grad_enabled())
            and self._launch.is_current()
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return the activation of an x that fits, which is x itself in place, and add its states to the counts."""
        y = x if self.inplace else torch.empty_like(x)
        self._launch(x.data_ptr(), y.data_ptr())
        tell_autograd(self._counts, x if self.inplace else None)
        return y


def make_plan(x: Tensor, counts: Tensor, request: Request, inplace: bool) -> ActivationPlan | None:
    """A plan for tensors like x; None but for a CPU, where Numba fuses the activation and x is read where it lies."""
    if x.device.type != "cpu" or not x.numel() or request.mask is not None or not is_fused(request.activation, x):
        return None
    arranged = arrange(x, request.channel_axis, None)
    if arranged.values.data_ptr() != x.data_ptr() or not (inplace or torch.empty_like(x).stride() == x.stride()):
        return None
    return ActivationPlan(x, counts, arranged, request.activation, inplace)
