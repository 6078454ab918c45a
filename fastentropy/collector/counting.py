"""Count forward passes. Each pass has its own counters, which are added to the total when the pass is complete."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastentropy._compat import in_dispatch_mode, is_fake, wait_tensor, without_modes
from fastentropy.collector.counters import Counters, Layout
from fastentropy.collector.site_statistics import SiteStatistics, state_entropy
from fastentropy.sites.activations import FusedActivation, fused_activation
from fastentropy.sites.interception import original_class
from fastentropy.sites.padding import positions_to_count
from fastentropy.sites.sharding import local_tensor
from fastentropy.sites.site import Call, Site
from fastentropy_kernels import activation_states, count_states, is_fused, plan_activation_states

_COUNTABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PassCounting:
    """Count the forward passes that a `SiteWatcher` reports, and own the counters.

    Attributes:
        is_paused: if True, passes that begin now are not counted.
        has_counted: whether any pass has been counted.
    """

    def __init__(self, per_batch: bool, after_pass: Callable[[], None], note: Callable[[str], None]) -> None:
        """Begin with nothing counted.

        Args:
            per_batch: whether to sum the neuron entropies of each pass as well.
            after_pass: a function that is called after each counted pass.
            note: a function that is given a sentence about an input that could not be counted.
        """
        self.is_paused = self.has_counted = False
        self._per_batch, self._after_pass, self._note = per_batch, after_pass, note
        self._layout, self._lock = Layout(), threading.Lock()
        self._total = Counters(self._layout)
        self._idle: list[Counters] = []
        self._captured: list[Counters] = []
        self._batch_entropies: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}

    def begin_pass(self) -> Counters | None:
        """Return counters for a new pass, or None if passes are not counted at the moment."""
        if self.is_paused:
            return None
        with self._lock:
            return self._idle.pop() if self._idle else Counters(self._layout)

    def run_activation(self, counters: Counters | None, call: Call) -> Any:
        """Run an activation and count the states of its input.

        Args:
            counters: the counters of the pass, or None if the pass is not counted.
            call: the call of the activation.

        Returns:
            The output of the activation.
        """
        return call.run() if counters is None else _run_and_count(call, counters)

    def end_pass(self, counters: Counters | None, completed: bool) -> None:
        """Add the counters of a completed pass to the total, then clear them for another pass."""
        if counters is None:
            return
        with self._lock:
            if completed:
                counters.flush()
                self._total.add(counters)
                self.has_counted = True
                if self._per_batch:
                    self._add_batch_entropies(counters)
            counters.clear()
            self._keep(counters)
        if completed:
            self._after_pass()

    def reset(self) -> None:
        """Set the total to zero. Counters keep their addresses."""
        with self._lock:
            self._total.clear()
            self._batch_entropies.clear()
            self._batches.clear()

    def statistics(self, sites: Mapping[str, Site]) -> dict[str, SiteStatistics]:
        """Return the total of each site in `sites`, by name, on the CPU."""
        with self._lock:
            return {name: self._site_statistics(site) for name, site in list(sites.items())}

    def _site_statistics(self, site: Site) -> SiteStatistics:
        """Return the total of one site. The values that were read but are in none of the three states are NaN."""
        counts, positions = self._total.total(site)
        nan = positions * site.neurons - int(counts.sum())
        entropies = self._batch_entropies.get(site.name)
        statistics = SiteStatistics(site.activation, counts, nan, axis_is_inferred=site.axis_is_inferred)
        if entropies is None:
            return statistics
        return replace(statistics, batch_entropies=entropies.clone(), batches=self._batches[site.name])

    def _keep(self, counters: Counters) -> None:
        """Keep cleared counters for another pass.

        If their buffers differ from those of the total, new counters with the same buffers as the total are kept instead. Then
        whole buffers can be added at the end of a pass.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self._captured.append(counters)  # the graph writes to these, so no other pass may use them
        else:
            self._idle.append(counters if counters.same_layout(self._total) else self._total.empty_like())

    def _add_batch_entropies(self, counters: Counters) -> None:
        """Add the neuron entropies of one pass to the sums over passes.

        The sum of a site is float64 [neurons, 2]. The first column discards zeros, the second counts them as on.
        """
        for site in counters.sites.values():
            counts, _ = counters.total(site)
            entropies = torch.stack([state_entropy(counts, "discard"), state_entropy(counts, "on")], dim=1)
            self._batch_entropies[site.name] = self._batch_entropies.get(site.name, 0) + entropies
            self._batches[site.name] = self._batches.get(site.name, 0) + 1


def _run_and_count(call: Call, counters: Counters) -> Any:
    """Run an activation, count the states of its input, and return its output.

    If a kernel computes the activation as well, it does both in one pass over the input. Otherwise the input is counted before
    the activation runs. Tensors without values (on the meta device, or fake tensors) are not counted.
    """
    site, x = call.site, call.x
    local = local_tensor(x)
    if local.is_meta or (type(local) is not Tensor and is_fake(local)):
        return call.run()
    mask = positions_to_count(call.is_token, local, site.channel_axis, call.token_axes)
    plan = counters.plans.get(site.name)
    if plan is not None and plan.inplace is getattr(call.module, "inplace", False) and plan.fits(x, mask):
        y = plan(x, mask)
        _add_positions(counters, site, x, mask)
        return y
    counter = counters.of(site, local.device)
    fused = _fused(call)
    if fused is None or site.channel_axis is None:
        with torch.no_grad(), without_modes():
            local = wait_tensor(local)
            values = local if local.dtype in _COUNTABLE else local.float()
            axis = site.channel_axis
            values = values.detach() if axis is not None else values.detach().unsqueeze(-1)
            count_states(values, counter.counts, channel_axis=-1 if axis is None else axis, mask=mask)
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
    """Return the activation that a kernel can compute in place of this call, or None if no kernel can.

    It is None for functions, for tensor subclasses, while gradients are recorded, and while a TorchDispatchMode is active.
    """
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
    """Record how many values of each neuron were read.

    The number is recorded on the host, except in two cases: only the device knows it (a mask), or a CUDA graph is being
    captured, whose replays must repeat the addition.
    """
    positions = x.numel() // max(site.neurons, 1)
    if mask is not None:
        counters.add_masked_positions(counters.of(site, x.device), mask)
    elif x.is_cuda and torch.cuda.is_current_stream_capturing():
        counters.add_repeated_positions(counters.of(site, x.device), positions)
    else:
        counters.add_positions(site, positions)
