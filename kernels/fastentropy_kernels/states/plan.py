"""A prepared `activation_states` for one call site of an activation.

The plan makes every decision in advance that is the same for each call. This saves Python before the kernel starts. After a
convolution the caches are cold: 50 µs of Python take 300 µs. On a GPU, the Python before a launch takes longer than the
kernel, except for large tensors.
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

# For each type of device, the number that the address of a tensor must be a multiple of. On a GPU, a prepared kernel is
# specialised for accesses of 16 bytes, the widest.
_ALIGNMENT = {"cpu": 1, "cuda": 16}


class ActivationPlan:
    """A prepared `activation_states` for tensors with one shape, one set of strides, one dtype and one device.

    `plan_activation_states` makes the plan. Before each call, ask `fits` whether the plan may be called with a tensor. A call
    adds to the counts for which the plan was made. Only one thread may use a plan at a time.

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
        """Prepare the launch. `make_plan` calls this only if a kernel can be launched without a copy.

        Args:
            x: a tensor like those of later calls.
            counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
            arranged: `x` and the mask as rows or planes, without a copy.
            request: the other arguments of `activation_states`, checked.
            inplace: whether the activation is written over `x`.
        """
        y = arranged.values if inplace else torch.empty_like(arranged.values)
        self._launch, self._alignment = _prepare(arranged, counts, y, request), _ALIGNMENT[x.device.type]
        self._counts, self.inplace = counts, inplace
        self._shape, self._strides, self._dtype, self._device = x.shape, x.stride(), x.dtype, x.device
        self._mask_shape = None if request.mask is None else request.mask.shape

    def fits(self, x: Tensor, mask: Tensor | None = None) -> bool:
        """Return whether the plan may be called with `x` and `mask`.

        It may if all of this holds:

        - `x` and `mask` have the shapes, strides, dtypes and devices for which the plan was made. On a GPU, their addresses
          are multiples of 16.
        - The settings of the thread have not changed: on a CPU, the number of threads and whether subnormals are flushed to
          zero; on a GPU, the current device.
        - No tracer, mode or transform is active, and no gradient is recorded.

        Args:
            x: the tensor to activate.
            mask: bool, with the shape of `x` without the channel axis. None if the plan was made without a mask.

        Returns:
            True if `plan(x, mask)` does the same as `activation_states`.
        """
        return (
            type(x) is Tensor
            and is_plain_eager(x)  # first: a tracer would note the comparisons of sizes
            and x.layout is torch.strided
            and not x.is_nested  # such a tensor has no shape
            and x.shape == self._shape
            and x.dtype is self._dtype
            and x.stride() == self._strides
            and x.device == self._device
            and not x.is_neg()
            and (self._alignment == 1 or x.data_ptr() % self._alignment == 0)
            and not (x.requires_grad and torch.is_grad_enabled())
            and self._launch.is_current()
            and (self._mask_shape is None if mask is None else self._fits_mask(mask))
        )

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the activation of `x`, and add the counts of the states of `x` to the plan's counts.

        Args:
            x: a tensor for which `fits` returns True. Nothing is checked here.
            mask: a mask for which `fits` returns True, or None.

        Returns:
            The activation. It is `x` itself if the plan works in place.
        """
        y = x if self.inplace else torch.empty_like(x)
        if mask is None:
            self._launch(x.data_ptr(), y.data_ptr())
        else:
            self._launch(x.data_ptr(), y.data_ptr(), mask.data_ptr())
        if not torch.is_inference_mode_enabled():  # asked here too, to save a call
            increment_versions(self._counts, x if self.inplace else None)
        return y

    def with_counts(self, counts: Tensor) -> ActivationPlan | None:
        """Return a plan for the same calls that adds to other counts, in a tenth of the time that it takes to make one.

        Args:
            counts: int64 `[neurons, 3]`, contiguous, on the same device and with as many neurons. Nothing is checked here.

        Returns:
            The plan. None if the kernel was specialised for another alignment of the counts, on a GPU.
        """
        launch = self._launch.with_counts(counts)
        if launch is None:
            return None
        plan = object.__new__(ActivationPlan)
        plan.__dict__.update(self.__dict__, _launch=launch, _counts=counts)
        return plan

    def _fits_mask(self, mask: Tensor) -> bool:
        """Return whether `mask` is contiguous, aligned, and otherwise like the mask for which the plan was made."""
        return (
            mask.shape == self._mask_shape
            and mask.dtype is torch.bool
            and mask.is_contiguous()
            and mask.device == self._device
            and mask.data_ptr() % self._alignment == 0
        )


def make_plan(x: Tensor, counts: Tensor, request: Request, inplace: bool) -> ActivationPlan | None:
    """Return a plan for tensors like `x`, or None if there can be none.

    There is none if no kernel fuses the activation, for prelu, for an empty tensor, if `x` or the mask would be copied, if
    their addresses are not aligned, for a mask on a CPU, or if `fits` would refuse `x` itself.

    Args:
        x: a tensor like those of later calls.
        counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
        request: the other arguments of `activation_states`, checked.
        inplace: whether the activation is written over the tensor of a call.
    """
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
    """Prepare the launch of the kernel, for Numba on a CPU and for Triton otherwise.

    Args:
        arranged: a tensor like those of later calls, as rows or planes, with its mask.
        counts: int64 `[neurons, 3]`. Each launch adds to it.
        y: the output, with the layout of `arranged.values`, or `arranged.values` itself to work in place.
        request: the other arguments of `activation_states`, checked.

    Returns:
        A function that takes the addresses of x, of y and, if there is one, of the mask, and runs the kernel.
    """
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
