"""A prepared `activation_states` or `count_states` for one call site of an activation.

The plan makes every decision in advance that is the same for each call. This saves Python before the kernel starts. After a
convolution the caches are cold: 50 µs of Python take 300 µs. On a GPU, the Python before a launch takes longer than the
kernel, except for large tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastentropy_kernels._compat import is_plain_eager
from fastentropy_kernels.activations import activate
from fastentropy_kernels.dispatch import increment_versions
from fastentropy_kernels.layout import Arranged, arrange
from fastentropy_kernels.states.dispatch import is_fused, state_kernels
from fastentropy_kernels.states.validation import Request

# For each type of device, the number that the address of a tensor must be a multiple of. On a GPU, a prepared kernel is
# specialised for accesses of 16 bytes, the widest.
_ALIGNMENT = {"cpu": 1, "cuda": 16}


class Plan:
    """A prepared launch for tensors with one shape, one set of strides, one dtype and one device.

    Before each call, ask `fits` whether the plan may be called with a tensor. A call adds to the counts for which the plan was
    made, or to others. Only one thread may use a plan at a time.
    """

    _activates = False
    _gate_strides: Sequence[int] | None = None  # None without a gate
    _function: Callable[[Tensor], Tensor] | None = None  # PyTorch's activation, where the kernel only multiplies

    def _prepare(self, x: Tensor, counts: Tensor, arranged: Arranged, request: Request, y: Tensor | None) -> None:
        """Prepare the launch.

        Args:
            x: a tensor like those of later calls.
            counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
            arranged: `x` and the mask as rows or planes, without a copy.
            request: the other arguments of `activation_states` or `count_states`, checked.
            y: the output, with the layout of `arranged.values`. None to count only.
        """
        self._launch, self._alignment = _prepare(arranged, counts, y, request), _ALIGNMENT[x.device.type]
        self._counts, self._counts_are_aligned = counts, counts.data_ptr() % 16 == 0
        self._shape, self._strides, self._dtype, self._device = x.shape, x.stride(), x.dtype, x.device
        self._mask_shape = None if request.mask is None else request.mask.shape

    def fits(self, x: Tensor, mask: Tensor | None = None, gate: Tensor | None = None) -> bool:
        """Return whether the plan may be called with `x`, `mask` and `gate`.

        It may if all of this holds:

        - `x`, `mask` and `gate` have the shapes, strides, dtypes and devices for which the plan was made. On a GPU, their
          addresses are multiples of 16.
        - The settings of the thread have not changed: on a CPU, the number of threads and whether subnormals are flushed to
          zero; on a GPU, the current device.
        - No tracer, mode or transform is active. If the plan activates, no gradient is recorded.

        Args:
            x: the tensor to activate or to count.
            mask: bool, with the shape of `x` without the channel axis. None if the plan was made without a mask.
            gate: what the activation is multiplied by. None if the plan was made without a gate, as plans that only count are.

        Returns:
            True if the call of the plan does the same as `activation_states` or `count_states`.
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
            and not (self._activates and x.requires_grad and torch.is_grad_enabled())
            and self._launch.is_current()
            and (self._mask_shape is None if mask is None else self._fits_mask(mask))
            and (self._gate_strides is None if gate is None else self._fits_gate(gate))
        )

    def adds_to(self, counts: Tensor, offset: int) -> bool:
        """Return whether calls may add to other counts, which lie in `counts` from an offset on (see `__call__`).

        On a GPU, the kernel was specialised for whether the address of the counts is a multiple of 16.
        """
        return self._alignment == 1 or ((counts.data_ptr() + 8 * offset) % 16 == 0) == self._counts_are_aligned

    def _fits_mask(self, mask: Tensor) -> bool:
        """Return whether `mask` is contiguous, aligned, and otherwise like the mask for which the plan was made."""
        return (
            mask.shape == self._mask_shape
            and mask.dtype is torch.bool
            and mask.is_contiguous()
            and mask.device == self._device
            and mask.data_ptr() % self._alignment == 0
        )

    def _fits_gate(self, gate: Tensor) -> bool:
        """Return whether `gate` is like the gate for which the plan was made, and nothing records or changes the product."""
        return (
            type(gate) is Tensor
            and is_plain_eager(gate)
            and gate.layout is torch.strided
            and not gate.is_nested
            and gate.shape == self._shape
            and gate.dtype is self._dtype
            and gate.stride() == self._gate_strides
            and gate.device == self._device
            and not gate.is_neg()
            and gate.data_ptr() % self._alignment == 0
            and not (gate.requires_grad and torch.is_grad_enabled())
            and not (self._function is not None and torch.is_autocast_enabled(gate.device.type))
        )


class ActivationPlan(Plan):
    """A prepared `activation_states` for tensors with one shape, one set of strides, one dtype and one device.

    `plan_activation_states` makes the plan. Before each call, ask `fits` whether the plan may be called with a tensor. A call
    adds to the counts for which the plan was made, or to others. Only one thread may use a plan at a time.

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

    _activates = True

    def __init__(self, x: Tensor, counts: Tensor, arranged: Arranged, request: Request, inplace: bool) -> None:
        """Prepare the launch. `make_plan` calls this only if a kernel can be launched without a copy.

        Args:
            x: a tensor like those of later calls.
            counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
            arranged: `x` and the mask as rows or planes, without a copy.
            request: the other arguments of `activation_states`, checked.
            inplace: whether the activation is written over `x`.
        """
        self.inplace = inplace
        if request.gate is not None:
            self._gate_strides = request.gate.stride()
            if not is_fused(request.activation, x):
                self._function = partial(activate, activation=request.activation, parameters=request.parameters)
        y = arranged.values if inplace else torch.empty_like(arranged.values)
        self._prepare(x, counts, arranged, request, y)

    def __call__(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        counts: Tensor | None = None,
        offset: int = 0,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return the activation of `x`, and add the counts of the states of `x` to the plan's counts, or to others.

        Args:
            x: a tensor for which `fits` returns True. Nothing is checked here.
            mask: a mask for which `fits` returns True, or None.
            counts: int64, contiguous, on the device of `x`. It replaces the plan's counts if `adds_to` returns True. Unlike the
                plan's counts it must be no tensor that autograd saves, since its version counter is not incremented.
            offset: the index in the flat `counts` at which the counts `[neurons, 3]` begin.
            gate: a gate for which `fits` returns True, or None.

        Returns:
            The activation, times the gate if there is one. It is `x` itself if the plan works in place.
        """
        y = x if self.inplace else torch.empty_like(x) if self._function is None else self._function(x)
        address = (self._counts if counts is None else counts).data_ptr() + 8 * offset
        if gate is not None:
            masks = () if mask is None else (mask.data_ptr(),)
            self._launch(x.data_ptr(), y.data_ptr(), address, *masks, gate=gate.data_ptr())
        elif mask is None:
            self._launch(x.data_ptr(), y.data_ptr(), address)
        else:
            self._launch(x.data_ptr(), y.data_ptr(), address, mask.data_ptr())
        if self.inplace or counts is None:
            increment_versions(self._counts if counts is None else None, x if self.inplace else None)
        return y


class CountPlan(Plan):
    """A prepared `count_states` for tensors with one shape, one set of strides, one dtype and one device.

    `plan_count_states` makes the plan. It is used like an `ActivationPlan`, but also where gradients are recorded.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import plan_count_states
        >>> counts = torch.zeros(3, 3, dtype=torch.int64)
        >>> plan = plan_count_states(torch.empty(2, 3), counts)
        >>> x = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0]])
        >>> plan.fits(x)
        True
        >>> plan(x)
        >>> counts
        tensor([[2, 0, 0],
                [0, 2, 0],
                [0, 0, 2]])
    """

    def __init__(self, x: Tensor, counts: Tensor, arranged: Arranged, request: Request) -> None:
        """Prepare the launch. `make_count_plan` calls this only if a kernel can be launched without a copy.

        Args:
            x: a tensor like those of later calls.
            counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
            arranged: `x` and the mask as rows or planes, without a copy.
            request: the other arguments of `count_states`, checked.
        """
        self._prepare(x, counts, arranged, request, None)

    def __call__(self, x: Tensor, mask: Tensor | None = None, counts: Tensor | None = None, offset: int = 0) -> None:
        """Add the counts of the states of `x` to the plan's counts, or to others; see `ActivationPlan.__call__`."""
        address = (self._counts if counts is None else counts).data_ptr() + 8 * offset
        if mask is None:
            self._launch(x.data_ptr(), 0, address)
        else:
            self._launch(x.data_ptr(), 0, address, mask.data_ptr())
        if counts is None:
            increment_versions(self._counts)


def make_plan(x: Tensor, counts: Tensor, request: Request, inplace: bool) -> ActivationPlan | None:
    """Return a plan for tensors like `x`, or None if there can be none.

    There is none if no kernel fuses the activation or the product with the gate, for prelu, for an empty tensor, if `x`, the
    mask or the gate would be copied, if their addresses are not aligned, for a mask on a CPU, or if `fits` would refuse `x`
    itself.

    Args:
        x: a tensor like those of later calls.
        counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
        request: the other arguments of `activation_states`, checked.
        inplace: whether the activation is written over the tensor of a call.
    """
    if request.weight is not None or not (is_fused(request.activation, x) or _is_multiplied(x, request)):
        return None
    arranged = _arranged_in_place(x, request)
    if arranged is None or not (inplace or torch.empty_like(x).stride() == x.stride()):
        return None
    if request.gate is not None and not (_is_multiplied(x, request) and arranged.view(request.gate) is not None):
        return None
    plan = ActivationPlan(x, counts, arranged, request, inplace)
    return plan if plan.fits(x, request.mask, request.gate) else None


def make_count_plan(x: Tensor, counts: Tensor, request: Request) -> CountPlan | None:
    """Return a plan that counts tensors like `x`, or None if there can be none, as for `make_plan`.

    Args:
        x: a tensor like those of later calls.
        counts: int64 `[neurons, 3]`. Each call of the plan adds to it.
        request: the other arguments of `count_states`, checked.
    """
    arranged = _arranged_in_place(x, request) if is_fused(request.activation, x) else None
    plan = None if arranged is None else CountPlan(x, counts, arranged, request)
    return plan if plan is not None and plan.fits(x, request.mask) else None


def _is_multiplied(x: Tensor, request: Request) -> bool:
    """Return whether a kernel computes the product of the activation and the gate in the pass that counts.

    Where it multiplies what PyTorch's activation has written, that must have the strides of `x`.
    """
    if request.gate is None or not is_fused("identity", x):
        return False
    if not state_kernels("numba" if x.is_cpu else "triton").multiplies(x.dtype, None):
        return False
    return is_fused(request.activation, x) or activate(x.to("meta"), *request[:2]).stride() == x.stride()


def _arranged_in_place(x: Tensor, request: Request) -> Arranged | None:
    """Return a tensor and its mask as rows or planes; None if no kernel can be prepared for them, or not without a copy."""
    if x.device.type not in _ALIGNMENT or not x.numel() or (x.is_cpu and request.mask is not None):
        return None
    if x.data_ptr() % _ALIGNMENT[x.device.type]:
        return None
    arranged = arrange(x, request.channel_axis, request.mask)
    given = [x] if request.mask is None else [x, request.mask]
    read = [arranged.values] if arranged.mask is None else [arranged.values, arranged.mask]
    return arranged if [tensor.data_ptr() for tensor in given] == [tensor.data_ptr() for tensor in read] else None


def _prepare(arranged: Arranged, counts: Tensor, y: Tensor | None, request: Request) -> Any:
    """Prepare the launch of the kernel, for Numba on a CPU and for Triton otherwise.

    Args:
        arranged: a tensor like those of later calls, as rows or planes, with its mask.
        counts: int64 `[neurons, 3]`, like those that the launches add to.
        y: the output, with the layout of `arranged.values`; `arranged.values` itself to work in place; None to count only.
        request: the other arguments of `activation_states`, checked.

    Returns:
        A function that takes the addresses of x, of y (0 if there is none), of the counts and, if there are any, of the mask
        and of the gate, and runs the kernel.
    """
    gate = None if request.gate is None else arranged.view(request.gate)
    if arranged.values.is_cpu:
        activation = request.activation if is_fused(request.activation, arranged.values) else None
        return state_kernels("numba").prepare(arranged.values, y=y, activation=activation, gate=gate)
    return state_kernels("triton").prepare(
        arranged.values,
        counts,
        mask=arranged.mask,
        y=y,
        activation=request.activation,
        parameters=request.parameters,
        gate=gate,
    )
