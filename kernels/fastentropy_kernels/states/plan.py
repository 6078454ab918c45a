"""The fused pass for one call site of an activation, with everything decided that does not change from call to call.

After a convolution the caches are cold: 50 µs of Python take 300 µs. On a GPU, the Python before a launch takes longer than
the kernel for all but large tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastentropy_kernels._compat import is_plain_eager
from fastentropy_kernels.dispatch import increment_versions
from fastentropy_kernels.layout import Arranged, arrange
from fastentropy_kernels.states.dispatch import is_fused, state_kernels
from fastentropy_kernels.states.validation import Request

# Device type -> what addresses must be multiples of. On a GPU, kernels are specialised for the widest access, of 16 bytes.
_ALIGNMENT = {"cpu": 1, "cuda": 16}


class ActivationPlan:
    """`activation_states` for tensors with one shape, one set of strides, one dtype and one device.

    `plan_activation_states` makes it. Call it with a tensor that `fits`; it adds to the counts for which it was made. It is for
    one thread at a time.

    Attributes:
        inplace: whether the plan writes the activation over its argument.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import plan_activation_states
        >>> counts = torch.zeros(3, 3, dtype=torch.int64)
        >>> plan = plan_activation_states(torch.empty(2, 3), counts, "relu")
        >>> x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0]])
        >>> plan.fits(x), plan.fits(x.double())
        (True, False)
        >>> plan(x)
        tensor([[0., 0., 1.],
                [0., 0., 2.]])
        >>> counts
        tensor([[2, 0, 0],
                [0, 2, 0],
                [0, 0, 2]])
    """

    def __init__(self, x: Tensor, counts: Tensor, arranged: Arranged, request: Request, inplace: bool) -> None:
        """Prepare the launch. `make_plan` has checked that there is one."""
        y = arranged.values if inplace else torch.empty_like(arranged.values)
        self._launch, self._alignment = _prepare(arranged, counts, y, request), _ALIGNMENT[x.device.type]
        self._counts, self.inplace = counts, inplace
        self._shape, self._strides, self._dtype, self._device = x.shape, x.stride(), x.dtype, x.device
        self._mask_shape = None if request.mask is None else request.mask.shape

    def fits(self, x: Tensor, mask: Tensor | None = None) -> bool:
        """Return whether the plan may be called with a tensor and its mask.

        It may where both are like those that the plan was made for, where the settings of the thread are the same, and where no
        tracer, mode or transform is active and no gradient is recorded.

        Args:
            x: the tensor to activate.
            mask: bool, with the shape of `x` without the channel axis. None where the plan was made without a mask.

        Returns:
            True where `plan(x, mask)` does what `activation_states` would do.
        """
        return (
            type(x) is Tensor
            and x.shape == self._shape
            and x.dtype is self._dtype
            and x.stride() == self._strides
            and x.device == self._device
            and not x.is_neg()
            and is_plain_eager(x)
            and x.data_ptr() % self._alignment == 0
            and not (x.requires_grad and torch.is_grad_enabled())
            and self._launch.is_current()
            and (self._mask_shape is None if mask is None else self._fits_mask(mask))
        )

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the activation of `x` and add the states of `x` to the counts.

        Args:
            x: a tensor that fits. Nothing is checked.
            mask: a mask that fits.

        Returns:
            The activation, which is `x` itself where the plan is in place.
        """
        y = x if self.inplace else torch.empty_like(x)
        self._launch(*(tensor.data_ptr() for tensor in ((x, y) if mask is None else (x, y, mask))))
        increment_versions(self._counts, x if self.inplace else None)
        return y

    def _fits_mask(self, mask: Tensor) -> bool:
        return (
            mask.shape == self._mask_shape
            and mask.dtype is torch.bool
            and mask.is_contiguous()
            and mask.device == self._device
            and mask.data_ptr() % self._alignment == 0
        )


def make_plan(x: Tensor, counts: Tensor, request: Request, inplace: bool) -> ActivationPlan | None:
    """Return a plan for tensors like `x`; None where no kernel fuses the activation, or where `x` would be copied."""
    if x.device.type not in _ALIGNMENT or not x.numel() or request.weight is not None:
        return None
    if (x.is_cpu and request.mask is not None) or not is_fused(request.activation, x):
        return None
    if x.data_ptr() % _ALIGNMENT[x.device.type]:
        return None
    arranged = arrange(x, request.channel_axis, request.mask)
    given = [x] if request.mask is None else [x, request.mask]
    read = [arranged.values] if arranged.mask is None else [arranged.values, arranged.mask]
    if [tensor.data_ptr() for tensor in given] != [tensor.data_ptr() for tensor in read]:
        return None
    if not (inplace or torch.empty_like(x).stride() == x.stride()):
        return None
    plan = ActivationPlan(x, counts, arranged, request, inplace)
    return plan if plan.fits(x, request.mask) else None


def _prepare(arranged: Arranged, counts: Tensor, y: Tensor, request: Request) -> Any:
    """Return the launch of the kernel, which takes the addresses."""
    if arranged.values.is_cpu:
        return state_kernels("numba").prepare(arranged.values, counts, y=y, activation=request.activation)
    return state_kernels("triton").prepare(
        arranged.values,
        counts,
        mask=arranged.mask,
        y=y,
        activation=request.activation,
        parameters=request.parameters,
    )
