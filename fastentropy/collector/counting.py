"""Run one activation and count the states of its input."""

from typing import Any

import torch
from torch import Tensor

from fastentropy._compat import in_dispatch_mode, is_fake, wait_tensor, without_modes
from fastentropy.collector.counters import Counters
from fastentropy.sites.activations import FusedActivation, fused_activation
from fastentropy.sites.interception import original_class
from fastentropy.sites.padding import positions_to_count
from fastentropy.sites.sharding import local_tensor
from fastentropy.sites.site import Call, Site
from fastentropy_kernels import activation_states, count_states, is_fused, plan_activation_states

_COUNTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def run_and_count(call: Call, counters: Counters) -> Any:
    """Run an activation and count the states of its input: in one pass where a kernel does both, else before it runs."""
    site, x = call.site, call.x
    local = local_tensor(x)
    if local.is_meta or is_fake(local):
        return call.run()
    mask = positions_to_count(call.is_token, local, site.channel_axis)
    plan = counters.plans.get(site.name)
    if plan is not None and plan.inplace is getattr(call.module, "inplace", False) and plan.fits(x, mask):
        y = plan(x, mask)
        _add_positions(counters, site, x, mask)
        return y
    counter = counters.of(site, local.device)
    fused = _fused(call)
    if fused is None:
        with torch.no_grad(), without_modes():
            local = wait_tensor(local)
            values = local if local.dtype in _COUNTABLE else local.float()
            count_states(values.detach(), counter.counts, channel_axis=site.channel_axis, mask=mask)
            _add_positions(counters, site, local, mask)
        return call.run()
    options = {"channel_axis": site.channel_axis, "mask": mask, "inplace": fused.inplace, **fused.parameters}
    if counters.repeats_shape(site, x):
        plan = plan_activation_states(x, counter.counts, fused.activation, **options)
        if plan is not None:
            counters.plans[site.name] = plan
    y = activation_states(x, counter.counts, fused.activation, **options)
    _add_positions(counters, site, x, mask)
    return y


def _fused(call: Call) -> FusedActivation | None:
    """What a kernel can compute in place of the activation, where nobody looks on and nothing is differentiated."""
    x = call.x
    if call.module is None or "forward" in vars(call.module) or type(x) is not Tensor:
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or in_dispatch_mode():
        return None
    fused = fused_activation(call.module, original_class(call.module))
    if fused is None or not is_fused(fused.activation, x):
        return None
    if fused.activation == "softplus" and torch.is_autocast_enabled(x.device.type):
        return None  # autocast makes its output float32
    return fused


def _add_positions(counters: Counters, site: Site, x: Tensor, mask: Tensor | None) -> None:
    """Note how many values of each neuron were read: on the host, unless only the device knows or a CUDA graph repeats it."""
    positions = x.numel() // max(site.neurons, 1)
    if mask is not None:
        counters.add_masked_positions(counters.of(site, x.device), mask)
    elif x.is_cuda and torch.cuda.is_current_stream_capturing():
        counters.add_repeated_positions(counters.of(site, x.device), positions)
    else:
        counters.add_positions(site, positions)
