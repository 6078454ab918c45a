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
    in_function_mode,
    wait_tensor,
    without_modes,
    without_transforms,
)
from fastentropy.collector.compiled.compilers import CountingCompilers
from fastentropy.collector.counters import Counters, Layout
from fastentropy.collector.launches import add_positions, count_as_planned, run_fused, run_repeated
from fastentropy.collector.products import defer
from fastentropy.collector.site_statistics import SiteStatistics, state_entropy
from fastentropy.collector.values import UncountableError, is_plain, plain_parts
from fastentropy.sites.graphs import GraphReader
from fastentropy.sites.observer import NOT_RUN
from fastentropy.sites.padding import positions_to_count
from fastentropy.sites.sharding import local_tensor
from fastentropy.sites.site import Call, Site
from fastentropy_kernels import count_states


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
        self._compilers = CountingCompilers(note)
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
            The output of the activation. If the caller multiplies it by that of a linear layer, and a kernel computes the
            product, this is an object that computes the product when it is multiplied.
        """
        if counters is None:
            return call.run()
        if call.is_factor and (deferred := defer(call, counters, self._run_now)) is not None:
            return deferred
        return self._run_now(counters, call)

    def _run_now(self, counters: Counters, call: Call) -> Any:
        """Run an activation as `run_activation`, and return its output in any case."""
        # A mode of the user and a subclass of Tensor would see what is asked of the tensor, so they are ruled out first.
        if type(call.x) is Tensor and not in_function_mode():
            y = run_fused(call, counters)
            if y is not None:
                return y
            if count_as_planned(call, counters):
                return call.run()
        with without_modes(), torch.no_grad():
            _count(call, counters, self._note)
        return call.run()

    def run_repeated(
        self,
        counters: Counters | None,
        name: str,
        activation: str,
        x: Tensor,
        module: nn.Module | None,
        run: Callable[[], Any],
    ) -> Any:
        """Run an activation with the prepared launch of its site; see `Observer.run_repeated`."""
        if counters is None or type(x) is not Tensor or in_function_mode():
            return NOT_RUN
        return run_repeated(counters, name, activation, x, module, run)

    def choose_compiler(self, counters: Counters | None, graphs: GraphReader, compiler: Compiler) -> Compiler:
        """Return what compiles a function of torch.compile in a pass: what counts, too. Counts of a paused pass are dropped."""
        return self._compilers.choose(graphs, compiler)

    def end_pass(self, counters: Counters | None, completed: bool) -> None:
        """Add the counters of a completed pass to the total, then clear them for another pass."""
        if counters is None:
            return
        if completed and counters.deferred is not None:
            counters.deferred()
        with self._lock, without_modes(), without_transforms():
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
    add_positions(counters, site, sum(part.numel() for part, _ in parts), local, mask)
