"""Collect the states of every activation while the user's own loop runs the model."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy.sites import Site, SiteWatcher
from fastentropy.statistics import Average, SiteStatistics, Statistics, state_entropy
from fastentropy_kernels import count_states


class EntropyCollector:
    """Counts, per neuron, how often the input of each activation is off, zero and on, while it is attached to a model.

    Only integers are kept: 24 bytes per neuron. Inputs are read before the activation runs, so in-place ones count right.
    Made by `collect`; also a context manager that attaches and detaches.
    """

    def __init__(
        self, model: nn.Module, *, average: Average = "dataset", channel_axis: Mapping[str, int] | None = None
    ) -> None:
        """See `collect`."""
        if average not in ("dataset", "batch"):
            raise ValueError(f"average={average!r}: expected 'dataset' or 'batch'")
        self._watcher = SiteWatcher(model, self._count, self._begin_batch, self._end_batch, channel_axis)
        self._per_batch = average == "batch"
        self._paused = False
        self.reset()

    def attach(self) -> None:
        """Begin to count. Raises RuntimeError where a collector is attached to the model already."""
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside of the block: for warm-up batches."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reset(self) -> None:
        """Forget what was counted."""
        self._counts: dict[str, Tensor] = {}
        self._values: dict[str, int] = {}
        self._before_batch: dict[str, Tensor] = {}
        self._batch_entropies: dict[str, Tensor] = {}
        self._batches: dict[str, int] = {}

    def compute(self) -> Statistics:
        """The statistics so far, on the CPU, independent of what is counted later.

        Raises RuntimeError where no forward pass was counted.
        """
        if not self._counts:
            raise RuntimeError("nothing was counted: run the model while the collector is attached, then call compute()")
        return Statistics(
            {name: self._site_statistics(site) for name, site in self._watcher.sites.items() if name in self._counts}
        )

    def _site_statistics(self, site: Site) -> SiteStatistics:
        counts = self._counts[site.name].cpu().clone()
        batch_entropies = self._batch_entropies.get(site.name)
        return SiteStatistics(
            site.activation,
            counts,
            self._values[site.name] - int(counts.sum()),
            None if batch_entropies is None else batch_entropies.cpu().clone(),
            self._batches.get(site.name, 0),
        )

    def _count(self, site: Site, x: Tensor) -> None:
        if self._paused:
            return
        if site.name not in self._counts:
            self._counts[site.name] = _zeros((site.neurons, 3), torch.int64, x.device)
            self._values[site.name] = 0
        count_states(x, self._counts[site.name], channel_axis=site.channel_axis)
        self._values[site.name] += x.numel()

    def _begin_batch(self) -> None:
        if self._per_batch:
            self._before_batch = {name: counts.clone() for name, counts in self._counts.items()}

    def _end_batch(self) -> None:
        if not self._per_batch or self._paused:
            return
        for name, counts in self._counts.items():
            batch = counts - self._before_batch.get(name, 0)
            entropies = torch.stack([state_entropy(batch, "discard"), state_entropy(batch, "on")], dim=1)
            self._batch_entropies[name] = self._batch_entropies.get(name, 0) + entropies
            self._batches[name] = self._batches.get(name, 0) + 1


def collect(
    model: nn.Module, *, average: Average = "dataset", channel_axis: Mapping[str, int] | None = None
) -> EntropyCollector:
    """A collector for the model's activation modules, to be used as `with fe.collect(model) as collector:`.

    The model is unchanged afterwards, also when the block raises. average="batch" keeps, besides the exact counts, the mean of
    the batches' own entropies. channel_axis gives the neuron axis of sites by name where it should not be inferred.

    Raises ValueError where the model has no known activation module.
    """
    return EntropyCollector(model, average=average, channel_axis=channel_axis)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """Zeros that may be added to in any mode, also when the first forward pass runs in inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=dtype, device=device)
