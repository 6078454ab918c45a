"""Count forward passes. Each pass has its own counters, which are added to the total when the pass is complete."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import (
    Compiler,
    has_values,
    in_dispatch_mode,
    in_function_mode,
    runs_only_forward,
    wait_tensor,
    without_modes,
)
from fastentropy.collector.compiled.compilers import CountingCompilers
from fastentropy.collector.counters import Counters, Layout, SiteCountPlan, SitePlan
from fastentropy.collector.site_statistics import SiteStatistics, state_entropy
from fastentropy.collector.values import COUNTABLE, UncountableError, is_plain, plain_parts
from fastentropy.sites.activations import FusedActivation, fused_activation, kernel_of
from fastentropy.sites.graphs import GraphReader
from fastentropy.sites.padding import positions_to_count
from fastentropy.sites.sharding import local_tensor
from fastentropy.sites.site import Call, Site
from fastentropy_kernels import activation_states, count_states, is_fused, plan_activation_states, plan_count_states


class PassCounting:
    """Count the forward passes that a `SiteWatcher` reports, and own the counters.

    Attributes:
        is_paused: if True, passes that begin now are not counted.
        has_counted: whether any pass has been counted.
    """

    def __init__(self, model: nn.Module, per_batch: bool, after_pass: Callable[[], None], note: Callable[[str], None]) -> None:
        """Begin with nothing counted.

        Args:
            model: the model that is counted.
            per_batch: whether to sum the neuron entropies of each pass as well.
            after_pass: a function that is called after each counted pass.
            note: a function that is given a sentence about an input that could not be counted.
        """
        self.is_paused = self.has_counted = False
        self._per_batch, self._after_pass, self._note = per_batch, after_pass, note
        self._layout, self._lock = Layout(), threading.Lock()
        self._compilers = CountingCompilers(model, note)
        self._total = Counters(self._layout)
        self._idle: list[Counters] = []
        self._captured: list[Counters] = []
        self._batch_sums: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}

    def begin_pass(self) -> Counters | None:
        """Return counters for a new pass, or None if passes are not counted at the moment."""
        if self.is_paused:
            return None
        with self._lock:
            return self._idle.pop() if self._idle else Counters(self._layout)

    def run_activation(self, counters: Counters | None, call: Call) -> Any:
        """Run an activation and count the states of its input.

        If a kernel computes the activation as well, it does both in one pass over the input. Otherwise the input is counted
        before the activation runs.

        Args:
            counters: the counters of the pass, or None if the pass is not counted.
            call: the call of the activation.

        Returns:
            The output of the activation.
        """
        if counters is None:
            return call.run()
        # A mode of the user and a subclass of Tensor would see what is asked of the tensor, so they are ruled out first.
        if type(call.x) is Tensor and not in_function_mode():
            y = _run_fused(call, counters)
            if y is not None:
                return y
            if _count_as_planned(call, counters):
                return call.run()
        with without_modes(), torch.no_grad():
            _count(call, counters, self._note)
        return call.run()

    def choose_compiler(self, counters: Counters | None, graphs: GraphReader, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile in a pass: what counts, too. Counts of a paused pass are dropped."""
        return self._compilers.choose(graphs, compiler)

    def end_pass(self, counters: Counters | None, completed: bool) -> None:
        """Add the counters of a completed pass to the total, then clear them for another pass."""
        if counters is None:
            return
        with self._lock, without_modes():
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

    @property
    def devices(self) -> list[torch.device]:
        """Return the devices on which values were counted."""
        return list(self._total.buffers)

    def reset(self) -> None:
        """Set the total to zero. Counters keep their addresses."""
        with self._lock, without_modes():
            self._total.clear()
            self._batch_sums.clear()
            self._batches.clear()

    def statistics(self, sites: Mapping[str, Site]) -> dict[str, SiteStatistics]:
        """Return the total of each site in `sites`, by name, on the CPU."""
        with self._lock, without_modes():
            known = list(sites.values())
            totals = self._total.totals(known)
            return {site.name: self._site_statistics(site, *totals[site.name]) for site in known if site.name in totals}

    def _site_statistics(self, site: Site, counts: Tensor, positions: int) -> SiteStatistics:
        """Return the statistics of one site. The values that were read but are in none of the three states are NaN."""
        nan = positions * site.neurons - int(counts.sum())
        statistics = SiteStatistics(site.activation, counts, nan, axis_is_inferred=site.axis_is_inferred)
        sums = self._batch_sums.get(site.name)
        if not self._per_batch or sums is None:
            return statistics
        entropies, batches = sums[:, :2].clone(), self._batches[site.name]
        return replace(statistics, batch_entropies=entropies, batches=batches, neuron_batches=sums[:, 2].long())

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

        The sum of a site is float64 [neurons, 3]. The first column has the entropies that discard zeros, the second those that
        count zeros as on, the third the number of passes. A pass in which a neuron had no value counts as none for it.
        """
        totals = counters.totals(counters.sites.values())
        if not totals:
            return
        counts = torch.cat([counts for counts, _ in totals.values()])
        observed = (counts > 0).any(1)
        rows = torch.stack([state_entropy(counts, "discard"), state_entropy(counts, "on"), observed.double()], dim=1)
        parts = torch.split(rows, [len(counts) for counts, _ in totals.values()])
        for name, part in zip(totals, parts, strict=True):
            before = self._batch_sums.get(name)
            self._batch_sums[name] = part.clone() if before is None else before.add_(part)
            self._batches[name] = self._batches.get(name, 0) + bool(part[:, 2].any())


def _run_fused(call: Call, counters: Counters) -> Tensor | None:
    """Run an activation with a kernel that also counts its input, and return its output. None if no kernel can."""
    site, x, is_token, module, _, _, token_axes = call
    if module is None or site.channel_axis is None or (x.requires_grad and torch.is_grad_enabled()):
        return None
    mask = None
    if is_token is not None:
        if x.is_nested:
            return None
        mask = positions_to_count(is_token, x, site.channel_axis, token_axes)
    planned = counters.plans.get(site.name)
    if planned is None or not _fits(planned, site, module, x, mask):
        planned = _shared_plan(counters, site, module, x, mask)
    if planned is not None:
        counter = planned.counter
        y = planned.plan(x, mask, counter.buffer, counter.offset)
        if planned.positions is None:
            _add_positions(counters, site, x.numel(), x, mask)
        else:
            counters.add_positions(site, planned.positions)
        return y
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
            planned = SitePlan(plan, counter, fused, site.channel_axis, positions)
            counters.plans[site.name] = counters.plans_of_class[fused.kind] = planned
    y = activation_states(x, counts, fused.activation, **options)
    _add_positions(counters, site, x.numel(), x, mask)
    return y


def _count_as_planned(call: Call, counters: Counters) -> bool:
    """Count the input of an activation with a prepared launch of the kernel that counts. Return whether there is one."""
    site, x, is_token, *_ = call
    if is_token is not None or site.channel_axis is None:
        return False
    planned = counters.count_plans.get(site.name)
    if planned is None or planned.channel_axis != site.channel_axis or not planned.plan.fits(x):
        planned = _new_count_plan(counters, site, x, site.channel_axis)
        if planned is None:
            return False
        counters.count_plans[site.name] = planned
    counter = planned.counter
    planned.plan(x, None, counter.buffer, counter.offset)
    if planned.positions is None:
        _add_positions(counters, site, x.numel(), x, None)
    else:
        counters.add_positions(site, planned.positions)
    return True


def _new_count_plan(counters: Counters, site: Site, x: Tensor, axis: int) -> SiteCountPlan | None:
    """Return a plan to count the inputs of a site, which shares another site's launch if possible; None if there is none."""
    latest = counters.latest_count_plan
    if latest is not None and latest.channel_axis == axis and latest.plan.fits(x):
        counter = counters.of(site, x.device)
        if latest.plan.adds_to(counter.buffer, counter.offset):
            return SiteCountPlan(latest.plan, counter, latest.channel_axis, latest.positions)
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
    counters.latest_count_plan = planned = SiteCountPlan(plan, counter, axis, positions)
    return planned


def _fits(planned: SitePlan, site: Site, module: nn.Module, x: Tensor, mask: Tensor | None) -> bool:
    """Return whether a plan still does the same as running the activation: whether nothing that made it has changed."""
    return (
        planned.channel_axis == site.channel_axis
        and planned.fused.is_of(module)
        and runs_only_forward(module)
        and not (planned.fused.activation == "softplus" and _casts(x))
        and planned.plan.fits(x, mask)
    )


def _shared_plan(counters: Counters, site: Site, module: nn.Module, x: Tensor, mask: Tensor | None) -> SitePlan | None:
    """Return a plan for a site that shares the launch of another site, whose inputs are alike; None if there is none."""
    other = counters.plans_of_class.get(type(module))
    if other is None or not _fits(other, site, module, x, mask):
        return None
    counter = counters.of(site, x.device)
    if not other.plan.adds_to(counter.buffer, counter.offset):
        return None
    planned = counters.plans[site.name] = SitePlan(other.plan, counter, other.fused, other.channel_axis, other.positions)
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


def _count(call: Call, counters: Counters, note: Callable[[str], None]) -> None:
    """Count the states of the input of an activation, without running the activation.

    Tensors without values (on the meta device, or in a tracer) are not counted. Values that cannot be counted are left out,
    with a note.
    """
    site, local = call.site, local_tensor(call.x)
    if not has_values(local):
        return
    local, mask = wait_tensor(local), None
    if call.is_token is not None and not local.is_nested:  # the components of a nested tensor have no padding
        mask = positions_to_count(call.is_token, local, site.channel_axis, call.token_axes)
    try:
        parts = plain_parts(local, site.channel_axis)
        counts = counters.of(site, local.device).counts
        for part, axis in parts:
            count_states(part, counts, channel_axis=axis, mask=mask)
    except UncountableError as error:
        note(f"site {site.name!r} was not counted in some calls: its input {error}")
        return
    except Exception:
        if is_plain(local):
            raise
        note(f"site {site.name!r} was not counted in some calls: its input is a {type(local).__name__}")
        return
    _add_positions(counters, site, sum(part.numel() for part, _ in parts), local, mask)


def _add_positions(counters: Counters, site: Site, values: int, x: Tensor, mask: Tensor | None) -> None:
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
