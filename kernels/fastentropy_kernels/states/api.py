"""The public functions that count states.

They check their arguments. In plain eager mode they then launch a kernel directly. They call the registered operator instead
if gradients are recorded, if a tracer, mode or transform is active, or if `x` is a subclass of Tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastentropy_kernels.dispatch import launches_directly
from fastentropy_kernels.states import dispatch, ops
from fastentropy_kernels.states.plan import ActivationPlan, CountPlan, make_count_plan, make_plan
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
    """Count the states of `x` for each neuron and add the counts to `counts` in place.

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides. Most tensors are read in place: contiguous ones,
            channels-last or transposed ones, and slices of the channel axis of `[rows, channels]`. Tensors with gaps inside
            planes, or with expanded or overlapping axes, are copied once.
        counts: int64 `[neurons, 3]`, contiguous, on the device of `x`. The columns are off (x < 0), zero (x == 0) and on
            (x > 0). With `edges` the shape is `[neurons, len(edges) + 1]`.
        channel_axis: the axis of `x` that runs over the neurons.
        mask: bool, with the shape of `x` without the channel axis. Positions at which it is False are not counted.
        nan: int64 `[neurons]`, contiguous. The number of NaN values of each neuron is added to it.
        edges: 1 to 15 numbers in rising order. Column i then counts the values with `edges[i - 1] <= x < edges[i]`, so
            `counts` is a histogram per neuron. The first column has no lower bound and the last has no upper bound. The
            comparison is exact, even if the dtype of `x` cannot represent an edge.
        impl: "auto" chooses Triton on CUDA, Numba on a CPU, and the reference for float64 and on other devices. "triton",
            "numba" and "reference" choose one of these, or raise if it cannot run.

    Raises:
        TypeError: a dtype is not supported. `counts` and `nan` are unchanged.
        ValueError: another argument does not fit. `counts` and `nan` are unchanged.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import count_states
        >>> x = torch.tensor([[-1.0, 2.0], [0.0, 3.0], [0.5, float("nan")]])
        >>> counts = torch.zeros(2, 3, dtype=torch.int64)
        >>> count_states(x, counts)
        >>> counts
        tensor([[1, 1, 1],
                [0, 0, 2]])
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
    gate: Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
    **parameters: float,
) -> Tensor:
    """Return the activation of `x`, times a gate if one is given, and add the counts of the states of `x` to `counts` in place.

    The result has a gradient if `x`, `weight` or `gate` requires one. torch.compile (fullgraph) and torch.export can trace the
    function, and a CUDA graph can capture it.

    Args:
        x: as for `count_states`.
        counts: as for `count_states`, with one column for each state.
        activation: a key of `activations.ACTIVATIONS`, such as "relu", "gelu" or "prelu".
        channel_axis: as for `count_states`.
        mask: as for `count_states`. The activation is computed at every position, also where `mask` is False.
        nan: as for `count_states`.
        states: "sign" counts off, zero and on. "regions" counts the values between the points that
            `linear_regions(activation, **parameters)` returns.
        edges: as for `count_states`. If they are given, they replace `states="sign"`; they cannot be combined with "regions".
        weight: the slopes of prelu, `[neurons]` or `[1]`, with the dtype and device of `x`.
        gate: a tensor with the shape, dtype and device of `x`, by which the activation is multiplied, as in the gated MLP of a
            language model: `act(x) * gate`. It is read in place if its strides are like those of `x` or if both are slices of
            rows, and copied otherwise.
        inplace: whether to write the result over `x` and return `x`. `x` must then neither require a gradient nor overlap
            itself, and there must be no gate.
        impl: as for `count_states`. Triton activates and counts in one pass for every activation. Numba does so for identity,
            relu and relu6 without edges. In all other cases Numba counts first, and PyTorch's own function then activates. See
            `is_fused`. With a gate, Triton does everything in one pass. Numba multiplies in the pass that counts, for float32
            without edges, after PyTorch's function where the activation is not one of the three.
        **parameters: parameters of the activation, named as in torch.nn.functional: `negative_slope` of leaky_relu, `alpha` of
            elu and celu, `beta` and `threshold` of softplus, `min_val` and `max_val` of hardtanh.

    Returns:
        The activation, with the dtype of `x` (also under autocast) and the strides of `torch.empty_like(x)`. For 16-bit dtypes
        it is computed in float32 and rounded once. The product is that of the rounded activation and the gate, rounded once
        more, as PyTorch computes `act(x) * gate`.

    Raises:
        TypeError: a dtype is not supported, or a parameter does not belong to the activation. `x`, `counts` and `nan` are
            unchanged.
        ValueError: another argument does not fit. `x`, `counts` and `nan` are unchanged.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import activation_states
        >>> x = torch.tensor([[-1.0, 2.0], [0.0, 3.0]])
        >>> counts = torch.zeros(2, 3, dtype=torch.int64)
        >>> activation_states(x, counts, "relu")
        tensor([[0., 2.],
                [0., 3.]])
        >>> counts
        tensor([[1, 1, 0],
                [0, 0, 2]])
    """
    request = activation_request(
        x, counts, activation, nan, channel_axis, mask, states, edges, weight, parameters, inplace, impl, gate
    )
    read = [tensor for tensor in (x, weight, gate) if tensor is not None]
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in read)
    if not needs_grad and launches_directly(x) and (gate is None or launches_directly(gate)):
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
    gate: Tensor | None = None,
    inplace: bool = False,
    **parameters: float,
) -> ActivationPlan | None:
    """Prepare `activation_states` for tensors like `x`, to make each call cheaper.

    A call of the plan skips most of the checks and most of the work before a kernel launch. Each call adds to `counts`. Making
    the plan counts nothing.

    Args:
        x: a tensor with the shape, strides, dtype and device of the tensors of later calls.
        counts: int64 `[neurons, 3]`, as for `activation_states`.
        activation: as for `activation_states`.
        channel_axis: as for `activation_states`.
        mask: a mask with the shape of the masks of later calls. None if the later calls have no mask.
        gate: a gate with the strides of the gates of later calls. None if the later calls have no gate.
        inplace: as for `activation_states`.
        **parameters: as for `activation_states`.

    Returns:
        The plan, which only one thread may use at a time. None if no kernel fuses the activation (see `is_fused`) or the
        product with the gate, if the activation is prelu, if `x` is empty, if `x` or the gate would be copied, or if there is a
        mask on a CPU.

    Raises:
        TypeError: as `activation_states`.
        ValueError: as `activation_states`.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import plan_activation_states
        >>> counts = torch.zeros(2, 3, dtype=torch.int64)
        >>> plan = plan_activation_states(torch.empty(4, 2), counts, "relu")
        >>> for _ in range(10):
        ...     x = torch.ones(4, 2)
        ...     y = plan(x) if plan.fits(x) else None
        >>> counts
        tensor([[ 0,  0, 40],
                [ 0,  0, 40]])
    """
    request = activation_request(
        x, counts, activation, None, channel_axis, mask, "sign", None, None, parameters, inplace, "auto", gate
    )
    return make_plan(x, counts, request, inplace)


def plan_count_states(x: Tensor, counts: Tensor, *, channel_axis: int = 1, mask: Tensor | None = None) -> CountPlan | None:
    """Prepare `count_states` for tensors like `x`, to make each call cheaper.

    Making the plan counts nothing.

    Args:
        x: a tensor with the shape, strides, dtype and device of the tensors of later calls.
        counts: int64 `[neurons, 3]`, as for `count_states`.
        channel_axis: as for `count_states`.
        mask: a mask with the shape of the masks of later calls. None if the later calls have no mask.

    Returns:
        The plan, which only one thread may use at a time. None if no kernel counts such a tensor, if `x` is empty or would be
        copied, or if there is a mask on a CPU.

    Raises:
        TypeError: as `count_states`.
        ValueError: as `count_states`.

    Examples:
        >>> import torch
        >>> from fastentropy_kernels import plan_count_states
        >>> counts = torch.zeros(2, 3, dtype=torch.int64)
        >>> plan = plan_count_states(torch.empty(4, 2), counts)
        >>> x = torch.ones(4, 2, requires_grad=True)
        >>> if plan.fits(x):
        ...     plan(x)
        >>> counts
        tensor([[0, 0, 4],
                [0, 0, 4]])
    """
    return make_count_plan(x, counts, count_request(x, counts, None, channel_axis, mask, None, "auto"))
