"""Collect the states of every activation while the user's own loop runs the model."""

import contextlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy.collector.counters import Counters, Layout
from fastentropy.collector.counting import run_and_count
from fastentropy.collector.distributed import sum_over_ranks
from fastentropy.collector.statistics import Average, SiteStatistics, Statistics, state_entropy
from fastentropy.sites.interception import original_class
from fastentropy.sites.padding import Mask
from fastentropy.sites.sharding import RankShare
from fastentropy.sites.site import Call, Site
from fastentropy.sites.watcher import SiteWatcher, no_sites

_ANOTHER_RANK = "the state that was loaded is of another rank, or of other ranks; load on each rank the state that it saved"


class EntropyCollector:
    """Counts, per neuron, how often the input of each activation is off, zero and on, while it is attached to a model.

    Only integers are kept. A pass is counted as a whole when it is complete: one that raises leaves nothing. Made by `collect`;
    also a context manager that attaches and detaches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        average: Average = "dataset",
        channel_axis: Mapping[str, int] | None = None,
        mask: Mask = "attention_mask",
    ) -> None:
        """See `collect`."""
        if average not in ("dataset", "batch"):
            raise ValueError(f"average={average!r}: expected 'dataset' or 'batch'")
        self._model, self._per_batch = model, average == "batch"
        self._watcher = SiteWatcher(model, _Counting(self), channel_axis, mask)
        self._layout, self._lock = Layout(), threading.Lock()
        self._total, self._idle, self._captured = Counters(self._layout), list[Counters](), list[Counters]()
        self._restored, self._restored_shares = Statistics({}), dict[str, RankShare]()
        self._batch_entropies: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}
        self._is_paused = self._recommended = self._has_counted = False

    def attach(self) -> None:
        """Begin to count. Raises RuntimeError where a collector is attached to the model, or a part of it, already."""
        self._watcher.attach()

    def detach(self) -> None:
        """Stop counting and leave the model as it was; what was counted stays."""
        self._watcher.detach()

    def __enter__(self) -> "EntropyCollector":
        """Attach."""
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach, also after an exception."""
        self.detach()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with a batch, count it and return the output: update, compute, reset and sync as in torchmetrics.

        Attaches for the call where the collector is not attached.
        """
        with contextlib.nullcontext() if self._watcher.is_attached else self:
            return self._model(*args, **kwargs)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count no pass that begins inside of the block: for warm-up batches. Their sites are discovered all the same."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def reset(self) -> None:
        """Forget what was counted. Counters keep their addresses, so a CUDA graph that was captured goes on counting."""
        with self._lock:
            self._total.clear()
            self._restored, self._restored_shares = Statistics({}), {}
            self._batch_entropies.clear()
            self._batches.clear()

    def compute(self) -> Statistics:
        """The statistics so far, on the CPU, independent of what is counted later: those of this rank and of its neurons.

        Raises RuntimeError where no forward pass was counted, and ValueError where the model calls no known activation.
        """
        statistics = self._statistics()
        if statistics:
            return statistics
        if self._has_counted and not self._watcher.sites:
            raise ValueError(no_sites(self._model))
        raise RuntimeError("nothing was counted: run the model while the collector is attached, then call compute()")

    def sync(self) -> Statistics:
        """The statistics of all ranks of torch.distributed together; those of `compute` where it is not initialised.

        Data-parallel ranks add up. Neurons that tensor-parallel ranks divide among them are put together in order, and what
        these ranks have all of is counted once. Stages of a pipeline, which have different sites, are put together by rank.
        Batches are told apart at sites of which a rank has whole batches, not some of their tokens.

        The counts of this rank stay as they are, so it can be called at any time, by all ranks.

        Raises ValueError on all ranks where they run different models, or where what a rank has of a site is not known.
        """
        return sum_over_ranks(self._statistics(), self._shares(), self._watcher.activations)

    def state_dict(self) -> dict[str, Any]:
        """What this rank counted, as tensors and plain values, to be saved with torch.save or as `stats.save` does.

        Where its neurons are a part of those of all ranks, or the same as another's, `shares` tells so by site.
        """
        statistics, shares = self._statistics(), self._shares()
        state = statistics.state_dict()
        divided = {name: shares[name] for name, site in statistics.items() if shares[name] != RankShare(0, site.neurons)}
        return {**state, "shares": {name: share._asdict() for name, share in divided.items()}} if divided else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: it takes the place of what was counted so far, and later passes are added to it.

        Each rank loads its own. Raises ValueError where it is no state of a collector, or of a model with other sites; nothing
        is changed then.
        """
        restored = Statistics.from_state_dict(state)
        try:
            shares = {name: RankShare(**share) for name, share in state.get("shares", {}).items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not the state of a collector (make one with collector.state_dict()): {error!r}") from error
        for name, site in restored.items():
            known = self._watcher.sites.get(name)
            if known and (known.activation, known.neurons) != (site.activation, site.neurons):
                raise ValueError(
                    f"site {name!r} is {known.activation} with {known.neurons} neurons in this model and {site.activation} "
                    f"with {site.neurons} in the state; load the state of the same model"
                )
        self.reset()
        self._restored = restored
        self._restored_shares = {name: shares.get(name, RankShare(0, site.neurons)) for name, site in restored.items()}

    def _shares(self) -> dict[str, RankShare]:
        """What the counts of each site are among those of all ranks."""
        shares = {site.name: self._watcher.share(site) for site in list(self._watcher.sites.values())}
        for name, share in self._restored_shares.items():
            is_another = shares.setdefault(name, share) != share
            shares[name] = share._replace(trouble=_ANOTHER_RANK) if is_another else share
        return shares

    def _statistics(self) -> Statistics:
        with self._lock:
            counted = {site.name: self._site_statistics(site) for site in list(self._watcher.sites.values())}
        counted = {name: site for name, site in counted.items() if site.observations + site.nan}
        names = [*self._restored, *(name for name in counted if name not in self._restored)]
        parts = {name: [part[name] for part in (self._restored, counted) if name in part] for name in names}
        return Statistics({name: reduce(add, sites) for name, sites in parts.items()})

    def _recommend_isolation(self) -> None:
        names = sorted(self._watcher.functional_sites)
        if not names or self._recommended:
            return
        self._recommended = True
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(
            f"{original_class(self._model).__name__} calls {len(names)} of its activations as functions ({shown}); they are "
            "counted by a slower route, and fe.isolate(model, example_inputs) makes modules of them",
            stacklevel=2,
        )

    def _site_statistics(self, site: Site) -> SiteStatistics:
        counts, positions = self._total.total(site)
        nan = positions * site.neurons - int(counts.sum())
        entropies = self._batch_entropies.get(site.name)
        if entropies is None:
            return SiteStatistics(site.activation, counts, nan)
        return SiteStatistics(site.activation, counts, nan, entropies.clone(), self._batches[site.name])


class _Counting:
    """The collector as an observer of forward passes: each counts into counters of its own until it is complete."""

    def __init__(self, collector: EntropyCollector) -> None:
        self._collector = collector

    def begin_pass(self) -> Counters | None:
        collector = self._collector
        if collector._is_paused:
            return None
        with collector._lock:
            return collector._idle.pop() if collector._idle else Counters(collector._layout)

    def run_activation(self, counters: Counters | None, call: Call) -> Any:
        return call.run() if counters is None else run_and_count(call, counters)

    def end_pass(self, counters: Counters | None, completed: bool) -> None:
        if counters is None:
            return
        collector = self._collector
        with collector._lock:
            if completed:
                counters.settle()
                collector._total.add(counters)
                collector._has_counted = True
                if collector._per_batch:
                    self._add_batch_entropies(counters)
            counters.clear()
            self._keep(counters)
        if completed:
            collector._recommend_isolation()

    def _keep(self, counters: Counters) -> None:
        """Keep counters for another pass; in the place of those that met their sites one by one, others with whole buffers."""
        collector = self._collector
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            collector._captured.append(counters)  # nobody else may use what a graph writes to
        else:
            collector._idle.append(counters if counters.is_like(collector._total) else collector._total.empty_like())

    def _add_batch_entropies(self, counters: Counters) -> None:
        collector = self._collector
        for site in counters.sites.values():
            counts, _ = counters.total(site)
            entropies = torch.stack([state_entropy(counts, "discard"), state_entropy(counts, "on")], dim=1)
            collector._batch_entropies[site.name] = collector._batch_entropies.get(site.name, 0) + entropies
            collector._batches[site.name] = collector._batches.get(site.name, 0) + 1


def collect(
    model: nn.Module,
    *,
    average: Average = "dataset",
    channel_axis: Mapping[str, int] | None = None,
    mask: Mask = "attention_mask",
) -> EntropyCollector:
    """A collector for all activations of a model, to be used as `with fe.collect(model) as collector:`.

    The model is unchanged afterwards, also when the block raises. What was compiled with torch.compile runs eagerly inside.
    In a gated MLP (SwiGLU, GeGLU) the site is the activation of the gate: a state is the sign of the gate's pre-activation, and
    where it never changes the MLP is still a product of gate and value, not linear.

    Args:
        model: any module.
        average: "batch" keeps, besides the exact counts, the mean of the batches' own entropies.
        channel_axis: the neuron axis of sites, by name, where it should not be inferred from the operator that made their
            input.
        mask: the name of the argument, of the model or of a part of it, that says which tokens are no padding:
            [batch, tokens], 0 at padding, which is not counted. Or a function of (args, kwargs) of a call that returns it, or
            None for no mask.

    Raises:
        ValueError: average is something else.
    """
    return EntropyCollector(model, average=average, channel_axis=channel_axis, mask=mask)
