"""Compute an activation when it is multiplied, in one pass with the product and the counts: the gated MLP of a language model.

`sites/products` tells which calls of activations are multiplied at once, and nowhere else visible.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastentropy._compat import has_values, in_dispatch_mode, in_function_mode, runs_only_forward, without_intercepting
from fastentropy.collector.counters import Counters, SitePlan
from fastentropy.collector.launches import add_positions, fits
from fastentropy.collector.values import is_plain
from fastentropy.sites.activations import fused_activation, kernel_of
from fastentropy.sites.site import Call
from fastentropy_kernels import plan_activation_states

#: Runs an activation now, counts it, and returns its output.
_Run = Callable[[Counters, Call], Any]
#: The product of tensors, as it was before anybody could replace it.
_MULTIPLY = Tensor.__mul__


class DeferredActivation:
    """Stand for the output of an activation between its call and the product, and compute the product.

    Only the instruction that multiplies gets this object from the interpreter. If its other factor is not as expected, the
    activation runs first, as without this object.
    """

    __slots__ = ("_call", "_counters", "_planned", "_run")

    def __init__(self, call: Call, counters: Counters, planned: SitePlan, run: _Run) -> None:
        """Wait for the product.

        Args:
            call: the call of the activation.
            counters: the counters of the pass.
            planned: the prepared launch of the kernel that computes the product.
            run: what runs the activation if it is not multiplied as expected.
        """
        self._call, self._counters, self._planned, self._run = call, counters, planned, run

    def __mul__(self, gate: Any) -> Any:
        """Return the product of the activation and another value, as PyTorch computes it, and count."""
        counters, planned, (site, x, _, module, *_) = self._counters, self._planned, self._call
        if type(gate) is not Tensor or in_function_mode() or Tensor.__mul__ is not _MULTIPLY:
            return self.run() * gate
        if module is None or not fits(planned, module, x, None, gate):
            return self.run() * gate
        counters.deferred = None
        counter = planned.counter
        with without_intercepting():
            y = planned.plan(x, None, counter.buffer, counter.offset, gate)
        if planned.positions is None:
            add_positions(counters, site, x.numel(), x, None)
        else:
            counters.add_positions(site, planned.positions)
        return y

    def run(self) -> Any:
        """Run the activation alone, count it, and return its output."""
        self._counters.deferred = None
        with without_intercepting():
            return self._run(self._counters, self._call)


def defer(call: Call, counters: Counters, run: _Run) -> DeferredActivation | None:
    """Return an object that computes an activation and its product in one pass; None if no prepared kernel does.

    Args:
        call: the call of an activation that is a factor of a product.
        counters: the counters of the pass.
        run: what runs an activation, counts it, and returns its output.
    """
    site, x, is_token, module, *_ = call
    if counters.deferred is not None:  # the code has caught an error of the layer that came before its product
        counters.deferred()
    if type(x) is not Tensor or module is None or is_token is not None or site.channel_axis is None or in_function_mode():
        return None
    if x.requires_grad and torch.is_grad_enabled():
        return None
    planned = counters.gated_plans.get(site.name)
    if planned is None or planned.site.channel_axis != site.channel_axis or not fits(planned, module, x, None, x):
        planned = _plan(call, counters)
        if planned is None:
            return None
    deferred = DeferredActivation(call, counters, planned, run)
    counters.deferred = deferred.run
    return deferred


def _plan(call: Call, counters: Counters) -> SitePlan | None:
    """Return a prepared launch for a call and a gate like its input, which shares the launch of another site if possible.

    A site without one is not asked again: what prevents it is mostly its dtype.
    """
    site, x, _, module, *_ = call
    plans, axis = counters.gated_plans, site.channel_axis
    if module is None or axis is None or (site.name in plans and plans[site.name] is None):
        return None
    counter, other = counters.of(site, x.device), plans.get(type(module))
    is_like = other is not None and other.site.channel_axis == axis and fits(other, module, x, None, x)
    if other is not None and is_like and other.plan.adds_to(counter.buffer, counter.offset):
        planned = plans[site.name] = other._replace(counter=counter, site=site)
        return planned
    if kernel_of(type(module)) is None or not is_plain(x) or not has_values(x) or in_dispatch_mode():
        return None
    fused = fused_activation(module) if runs_only_forward(module) else None
    if fused is None or fused.inplace or not counters.repeats_call(site, x, fused):
        return None
    options: dict[str, Any] = {"channel_axis": axis, "gate": x, **fused.parameters}
    plan = plan_activation_states(x, counter.counts, fused.activation, **options)
    if plan is None:
        plans[site.name] = None
        return None
    positions = None if x.is_cuda else x.numel() // site.neurons
    planned = plans[site.name] = plans[type(module)] = SitePlan(plan, counter, fused, site, positions)
    return planned
