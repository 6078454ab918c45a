"""`activation_states` and `count_states` as registered operators of `torch.library`.

Tracers see registered operators, and `activation_states` has a gradient here. An operator that changes its arguments cannot
have one, so these operators return the counts of one call as new tensors. The public functions then add them to the caller's
counts. Plain eager calls bypass this module, because a registered operator costs 5 to 10 µs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastentropy_kernels import activations
from fastentropy_kernels.states import dispatch
from fastentropy_kernels.states.validation import Request


@torch.library.custom_op("fastentropy_kernels::activation_states", mutates_args=())
def activation_states(
    x: Tensor,
    activation: str,
    parameters: Sequence[float],
    weight: Tensor | None,
    channel_axis: int,
    mask: Tensor | None,
    edges: Sequence[float] | None,
    impl: str,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation of `x`, times the gate if there is one, its counts, and its numbers of NaN.

    The arguments are those of the public `activation_states`, already checked.

    Returns:
        The activation or the product; the counts, int64 `[neurons, states]`; the numbers of NaN values, int64 `[neurons]`.
    """
    request = Request(activation, tuple(parameters), weight, channel_axis, mask, _tuple(edges), impl, gate)
    counts, nan = _counters(x, channel_axis, edges)
    y = dispatch.activate_and_count(x, counts, nan, request, inplace=False)
    return y, counts, nan


@activation_states.register_fake
def _(
    x: Tensor,
    activation: str,
    parameters: Sequence[float],
    weight: Tensor | None,
    channel_axis: int,
    mask: Tensor | None,
    edges: Sequence[float] | None,
    impl: str,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_counters(x, channel_axis, edges)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save what `_backward` needs of the arguments and of the output."""
    x, ctx.activation, ctx.parameters, weight, ctx.channel_axis, *_, gate = inputs
    # The gradient of relu can be computed from y. The next operator keeps y anyway, so x can be freed before the backward
    # pass.
    ctx.save_for_backward(output[0] if ctx.activation == "relu" and gate is None else x, weight, gate)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    """Return the gradients of all arguments. Only those of `x`, of `weight` and of `gate` can be other than None."""
    x, weight, gate = ctx.saved_tensors
    grad_gate = None
    if gate is not None:
        # The activation is computed again: keeping it would take the memory that the one pass has saved.
        if ctx.needs_input_grad[-1]:
            grad_gate = grad * activations.activate(x, ctx.activation, ctx.parameters, weight, ctx.channel_axis)
        grad = grad * gate
    grad_x, grad_weight = activations.activate_backward(grad, x, ctx.activation, ctx.parameters, weight, ctx.channel_axis)
    return grad_x, None, None, grad_weight, None, None, None, None, grad_gate


activation_states.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("fastentropy_kernels::count_states", mutates_args=())
def count_states(
    x: Tensor, channel_axis: int, mask: Tensor | None, edges: Sequence[float] | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Return the counts of the states of `x`, and its numbers of NaN.

    The arguments are those of the public `count_states`, already checked.

    Returns:
        The counts, int64 `[neurons, states]`; the numbers of NaN values, int64 `[neurons]`.
    """
    counts, nan = _counters(x, channel_axis, edges)
    dispatch.count(x, counts, nan, Request("identity", (), None, channel_axis, mask, _tuple(edges), impl))
    return counts, nan


@count_states.register_fake
def _(x: Tensor, channel_axis: int, mask: Tensor | None, edges: Sequence[float] | None, impl: str) -> tuple[Tensor, Tensor]:
    return _counters(x, channel_axis, edges)


def _counters(x: Tensor, channel_axis: int, edges: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Return zeros for the counts, int64 `[neurons, states]`, and for the numbers of NaN, int64 `[neurons]`."""
    neurons, states = x.shape[channel_axis], 3 if edges is None else len(edges) + 1
    return x.new_zeros((neurons, states), dtype=torch.int64), x.new_zeros((neurons,), dtype=torch.int64)


def _tuple(edges: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if edges is None else tuple(edges)
