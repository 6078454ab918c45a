"""The public functions that count states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastentropy_kernels.dispatch import launches_directly
from fastentropy_kernels.states import dispatch, ops
from fastentropy_kernels.states.plan import ActivationPlan, make_plan
from fastentropy_kernels.states.validation import States, activation_request, count_request


def count_states(
    x: Tensor,
    counts: Tensor,
    *,
    channel_axis: int = 1,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
    edges: Sequence[float] | None = None,
    impl: str = "auto",
) -> None:
    """Add the states of `x`, per neuron, to `counts` in place.

    Args:
        x: float16, bfloat16, float32 or float64, any strides. Rows, planes and what becomes one of them by reordering
            axes (channels-last, transposed, slices of the channel axis of rows) are read where they are; gaps inside of
            planes, expanded and overlapping axes take one copy.
        counts: int64 `[neurons, 3]`, contiguous, on the device of `x`: columns off, zero, on. With edges it is
            `[neurons, len(edges) + 1]`.
        channel_axis: the axis of `x` that runs over the neurons.
        mask: bool, the shape of `x` without the channel axis; positions where it is False are not counted.
        nan: int64 `[neurons]`; the number of NaN values is added to it.
        edges: 1 to 15 rising numbers. Column i then counts `edges[i - 1] <= x < edges[i]`, a histogram per neuron.
            They are compared exactly, also where they have no representation in the dtype of `x`.
        impl: "auto" takes Triton on CUDA, Numba on a CPU, and the reference for float64 and other devices.
            "triton", "numba" and "reference" run as named or raise.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: any other argument does not fit. In both cases `counts` and `nan` are unchanged.
    """
    request = count_request(x, counts, nan, channel_axis, mask, edges, impl)
    if launches_directly(x):
        dispatch.count(x, counts, nan, request)
        return
    added, added_nan = ops.count_states(x, request.channel_axis, mask, request.edges, impl)
    counts += added
    if nan is not None:
        nan += added_nan


def activation_states(
    x: Tensor,
    counts: Tensor,
    activation: str,
    *,
    channel_axis: int = 1,
    mask: Tensor | None = None,
    nan: Tensor | None = None,
    states: States = "sign",
    edges: Sequence[float] | None = None,
    weight: Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
    **parameters: float,
) -> Tensor:
    """Return the activation of `x` and add the states of `x` to `counts` in place.

    Args:
        x: as in `count_states`. `y` gets its dtype, also under autocast, and the strides of `torch.empty_like(x)`.
        counts: as in `count_states`, with a column for each state.
        activation: a key of `reference.ACTIVATIONS`. `y` is computed at every position, also where `mask` is False, in
            float32 and rounded once for the 16-bit formats.
        channel_axis: as in `count_states`, and so are mask, nan and impl.
        mask: see above.
        nan: see above.
        states: "sign" counts off, zero and on; "regions" counts between `linear_regions(activation, **parameters)`.
        edges: as in `count_states`, in place of `states`.
        weight: the slopes of prelu, `[neurons]` or `[1]`, dtype and device of `x`.
        inplace: write y over `x`, which must not need a gradient nor overlap itself, and return `x`.
        impl: Triton does both in one pass for every activation. Numba does for identity, relu and relu6; for the others
            it counts, and PyTorch's own vectorised function makes y. See `is_fused`.
        **parameters: those of torch.nn.functional: `negative_slope` of leaky_relu, `alpha` of elu and celu, `beta` and
            `threshold` of softplus, `min_val` and `max_val` of hardtanh.

    `y` has a gradient where `x` or `weight` requires one. The function can be traced by torch.compile (fullgraph) and
    torch.export, and captured in a CUDA graph.

    Raises:
        TypeError: a dtype is not supported, or a parameter is not one of the activation's.
        ValueError: any other argument does not fit. In both cases `x`, `counts` and `nan` are unchanged.
    """
    request = activation_request(
        x, counts, activation, nan, channel_axis, mask, states, edges, weight, parameters, inplace, impl
    )
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad))
    if not needs_grad and launches_directly(x):
        return dispatch.activate_and_count(x, counts, nan, request, inplace)
    y, added, added_nan = ops.activation_states(x, *request)
    counts += added
    if nan is not None:
        nan += added_nan
    return x.copy_(y) if inplace else y


def plan_activation_states(
    x: Tensor,
    counts: Tensor,
    activation: str,
    *,
    channel_axis: int = 1,
    mask: Tensor | None = None,
    inplace: bool = False,
    **parameters: float,
) -> ActivationPlan | None:
    """Work out `activation_states` for tensors like `x`, so that a call costs a fraction of the checks and of the launch.

    Arguments and errors are those of `activation_states`. The plan adds to `counts` each time: `plan(x, mask)` where
    `plan.fits(x, mask)`. It is for one thread at a time. None where no kernel fuses the activation (`is_fused`), for a tensor
    that would be copied, and with a mask on a CPU.
    """
    request = activation_request(
        x, counts, activation, None, channel_axis, mask, "sign", None, None, parameters, inplace, "auto"
    )
    return make_plan(x, counts, request, inplace)
