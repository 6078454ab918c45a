"""Run activations, or count their inputs, with launches of kernels that were prepared before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import has_values, in_dispatch_mode, runs_only_forward
from fastentropy.collector.counters import Counters, SiteCountPlan, SitePlan
from fastentropy.collector.values import COUNTABLE, is_plain
from fastentropy.sites.activations import FusedActivation, fused_activation, kernel_of
from fastentropy.sites.observer import NOT_RUN
from fastentropy.sites.padding import positions_to_count
from fastentropy.sites.site import Call, Site
from fastentropy_kernels import activation_states, is_fused, plan_activation_states, plan_count_states


def run_repeated(
    counters: Counters, name: str, activation: str, x: Tensor, module: nn.Module | None, run: Callable[[], Any]
) -> Any:
    """Run an activation with the launch that was prepared for its site, and count its input.

    A launch fits only inputs and modules like those that it was made for, so nothing else need be asked of the call. For a
    layer of a few neurons, asking would take longer than the launch.

    Args:
        counters: the counters of the pass.
        name: the name of the site.
        activation: the name of the activation.
        x: its input, of the class Tensor.
        module: the activation module; None if a function is called.
        run: runs the activation and returns its output.

    Returns:
        The output of the activation; NOT_RUN if no launch fits.
    """
    if module is not None and not (x.requires_grad and torch.is_grad_enabled()):
        planned = counters.plans.get(name)
        if planned is not None and planned.site.activation == activation and fits(planned, module, x, None):
            return _run_with(planned, counters, x, None)
    counting = counters.count_plans.get(name)
    if counting is None or counting.site.activation != activation or not counting.plan.fits(x):
        return NOT_RUN
    _count_with(counting, counters, x)
    return run()


def run_fused(call: Call, counters: Counters) -> Tensor | None:
    """Run an activation with a kernel that also counts its input, and return its output. None if no kernel can."""
    site, x, is_token, module, _, _, token_axes, _ = call
    if module is None or site.channel_axis is None or (x.requires_grad and torch.is_grad_enabled()):
        return None
    mask = None
    if is_token is not None:
        if x.is_nested:
            return None
        mask = positions_to_count(is_token, x, site.channel_axis, token_axes)
    planned = counters.plans.get(site.name)
    if planned is None or planned.site.channel_axis != site.channel_axis or not fits(planned, module, x, mask):
        planned = _shared_plan(counters, site, module, x, mask)
    if planned is not None:
        return _run_with(planned, counters, x, mask)
    fused = _fused(module, x)
    if fused is None:
        return None
    counter = counters.of(site, x.device)
    counts = counter.counts
    options: dict[str, Any] = {"channel_axis": site.channel_axis, "mask": mask, "inplace": fused.inplace, **fused.parameters}
    if counters.repeats_call(site, x, fused):
        plan = plan_activation_states(x, counts, fused.activation, **options)
        if plan is not None:
            positions = None if mask is not None or x.is_cuda else x.numel() // site.neurons
            planned = SitePlan(plan, counter, fused, site, positions)
            counters.plans[site.name] = counters.plans_of_class[fused.kind] = planned
    y = activation_states(x, counts, fused.activation, **options)
    add_positions(counters, site, x.numel(), x, mask)
    return y


def count_as_planned(call: Call, counters: Counters) -> bool:
    """Count the input of an activation with a prepared launch of the kernel that counts. Return whether there is one."""
    site, x, is_token, *_ = call
    if is_token is not None or site.channel_axis is None:
        return False
    planned = counters.count_plans.get(site.name)
    if planned is None or planned.site.channel_axis != site.channel_axis or not planned.plan.fits(x):
        planned = _new_count_plan(counters, site, x, site.channel_axis)
        if planned is None:
            return False
        counters.count_plans[site.name] = planned
    _count_with(planned, counters, x)
    return True


def _new_count_plan(counters: Counters, site: Site, x: Tensor, axis: int) -> SiteCountPlan | None:
    """Return a plan to count the inputs of a site, which shares another site's launch if possible; None if there is none."""
    latest = counters.latest_count_plan
    if latest is not None and latest.site.channel_axis == axis and latest.plan.fits(x):
        counter = counters.of(site, x.device)
        if latest.plan.adds_to(counter.buffer, counter.offset):
            return SiteCountPlan(latest.plan, counter, site, latest.positions)
    if not is_plain(x) or not has_values(x) or x.dtype not in COUNTABLE or in_dispatch_mode() or not is_fused("identity", x):
        return None
    if counters.unplanned.get(site.name) == (x.shape, x.stride()) or not counters.repeats_call(site, x, None):
        return None
    counter = counters.of(site, x.device)
    plan = plan_count_states(x.detach(), counter.counts, channel_axis=axis)
    if plan is None:
        counters.unplanned[site.name] = x.shape, x.stride()
        return None
    positions = None if x.is_cuda else x.numel() // site.neurons
    counters.latest_count_plan = planned = SiteCountPlan(plan, counter, site, positions)
    return planned


def _run_with(planned: SitePlan, counters: Counters, x: Tensor, mask: Tensor | None) -> Tensor:
    """Run an activation with a launch that fits, and count its input."""
    counter = planned.counter
    y = planned.plan(x, mask, counter.buffer, counter.offset)
    if planned.positions is None:
        add_positions(counters, planned.site, x.numel(), x, mask)
    else:
        counters.add_positions(planned.site, planned.positions)
    return y


def _count_with(planned: SiteCountPlan, counters: Counters, x: Tensor) -> None:
    """Count the input of an activation with a launch that fits."""
    counter = planned.counter
    planned.plan(x, None, counter.buffer, counter.offset)
    if planned.positions is None:
        add_positions(counters, planned.site, x.numel(), x, None)
    else:
        counters.add_positions(planned.site, planned.positions)


def fits(planned: SitePlan, module: nn.Module, x: Tensor, mask: Tensor | None, gate: Tensor | None = None) -> bool:
    """Return whether a plan still does the same as running the activation: whether nothing that made it has changed."""
    return (
        planned.fused.is_of(module)
        and runs_only_forward(module)
        and not (planned.fused.activation == "softplus" and _casts(x))
        and planned.plan.fits(x, mask, gate)
    )


def _shared_plan(counters: Counters, site: Site, module: nn.Module, x: Tensor, mask: Tensor | None) -> SitePlan | None:
    """Return a plan for a site that shares the launch of another site, whose inputs are alike; None if there is none."""
    other = counters.plans_of_class.get(type(module))
    if other is None or other.site.channel_axis != site.channel_axis or not fits(other, module, x, mask):
        return None
    counter = counters.of(site, x.device)
    if not other.plan.adds_to(counter.buffer, counter.offset):
        return None
    planned = counters.plans[site.name] = SitePlan(other.plan, counter, other.fused, site, other.positions)
    return planned


def _fused(module: nn.Module, x: Tensor) -> FusedActivation | None:
    """Return the activation that a kernel can compute in place of an activation module, or None if no kernel can.

    It is None for tensors that are not plain, while gradients are recorded, and while a TorchDispatchMode is active.
    """
    kernel = kernel_of(type(module))
    if kernel is None or not is_fused(kernel, x) or (kernel == "softplus" and _casts(x)):
        return None
    if not is_plain(x) or not has_values(x) or (x.requires_grad and torch.is_grad_enabled()) or in_dispatch_mode():
        return None
    fused = fused_activation(module) if runs_only_forward(module) else None
    return fused if fused is not None and is_fused(fused.activation, x) else None


def _casts(x: Tensor) -> bool:
    """Return whether autocast is enabled on the device of `x`. Softplus then returns float32."""
    return torch.is_autocast_enabled(x.device.type)


def add_positions(counters: Counters, site: Site, values: int, x: Tensor, mask: Tensor | None) -> None:
    """Record how many values of each neuron were read.

    The number is recorded on the host, except in two cases: only the device knows it (a mask), or a CUDA graph is being
    captured, whose replays must repeat the addition.

    Args:
        counters: the counters of the pass.
        site: the site of the activation.
        values: the number of values in the input.
        x: the input, whose device is asked for.
        mask: bool, True at the positions that were counted. None if all were.
    """
    positions = values // max(site.neurons, 1)
    if mask is not None:
        counters.add_masked_positions(counters.of(site, x.device), mask)
    elif x.is_cuda and torch.cuda.is_current_stream_capturing():
        counters.add_repeated_positions(counters.of(site, x.device), positions)
    else:
        counters.add_positions(site, positions)
