"""Count the states (off, zero, on) of every activation's input while the user's own loop runs the model."""

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from torch import nn

from fastentropy._utils.errors import reason
from fastentropy.collector.counting import PassCounting
from fastentropy.collector.distributed import sum_over_ranks
from fastentropy.collector.site_statistics import Average
from fastentropy.collector.statistics import Statistics
from fastentropy.sites.finding import no_sites
from fastentropy.sites.inputs import check_model
from fastentropy.sites.padding import Mask
from fastentropy.sites.registry import Misfits
from fastentropy.sites.sharding import RankShare
from fastentropy.sites.watcher import SiteWatcher

_ANOTHER_RANK = "the loaded state was saved by another rank, or by other ranks; load on each rank the state that it saved"


class EntropyCollector:
    """Count, for each neuron, how often an activation's input is off, zero and on, while attached to a model.

    An input is off below 0, zero at 0, and on above 0. Counts are kept separately for each site (call of an activation). Create
    a collector with `collect`. Use it as a context manager, or call `attach` and `detach`. No activation is stored. A forward
    pass is counted when it is complete; a pass that raises is not counted.

    Args:
        model: the model whose activations are counted; any module.
        average: "dataset" keeps only counts; "batch" also keeps the entropies of each batch.
        channel_axis: the axis of the neurons, by name of the site, for sites where it should not be inferred.
        mask: the name of the argument that holds the padding mask; a function that returns this mask; or None. See `collect`.
        exclude: names of sites that are not counted, or patterns of names.
        misfits: what happens to a site of which an input has another number of neurons. See `collect`.

    Raises:
        TypeError: `model` is not a module, `channel_axis` is no mapping, or `exclude` is a string.
        ValueError: `average` or `misfits` has another value.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> collector = fe.EntropyCollector(model)
        >>> collector.attach()
        >>> y = model(torch.randn(5, 3))
        >>> collector.detach()
        >>> collector.compute()["1"].observations
        20
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        average: Average = "dataset",
        channel_axis: Mapping[str, int] | None = None,
        mask: Mask = "attention_mask",
        exclude: Collection[str] = (),
        misfits: Misfits = "raise",
    ) -> None:
        """Prepare to count; see `collect` for the arguments."""
        check_model(model)
        if average not in ("dataset", "batch"):
            raise ValueError(f"average={average!r}: expected 'dataset' or 'batch'")
        is_named = channel_axis is None or isinstance(channel_axis, Mapping)
        if not is_named or not all(isinstance(axis, int) for axis in dict(channel_axis or {}).values()):
            raise TypeError(f"channel_axis: got {channel_axis!r}, expected axes by site: channel_axis={{'name': 1}}")
        if not (mask is None or isinstance(mask, str) or callable(mask)):
            raise TypeError(f"mask: got {mask!r}, expected the name of an argument, a function, or None: mask='attention_mask'")
        if isinstance(exclude, str) or not isinstance(exclude, Collection):
            raise TypeError(f"exclude: got {exclude!r}, expected a list of names or patterns: exclude=['name']")
        if misfits not in ("raise", "skip"):
            raise ValueError(f"misfits={misfits!r}: expected 'raise' or 'skip'")
        self._model = model
        self._counting = PassCounting(model, average == "batch", self._recommend_isolation, self._note)
        self._watcher = SiteWatcher(model, self._counting, channel_axis, mask, exclude, misfits)
        self._restored, self._restored_shares = Statistics({}), dict[str, RankShare]()
        self._notes: list[str] = []

    def attach(self) -> None:
        """Begin to count.

        Raises:
            RuntimeError: a collector is already attached to the model or to a part of it.
            ValueError: activations of the model are compiled by TorchScript.
        """
        self._watcher.attach()

    def detach(self) -> None:
        """Stop counting and leave the model as it was before `attach`. The counts are kept."""
        self._watcher.detach()

    def __enter__(self) -> "EntropyCollector":
        """Attach the collector and return it."""
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach the collector, even after an exception."""
        self.detach()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with a batch, count this call, and return the output.

        The methods `update`, `compute`, `reset` and `sync` form the interface of a metric of torchmetrics. If the collector is
        not attached, it is attached for this call only.

        Args:
            *args: the model's positional inputs.
            **kwargs: the model's keyword inputs.

        Returns:
            The model's output.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> collector = fe.collect(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()))
            >>> collector.update(torch.randn(5, 3)).shape
            torch.Size([5, 4])
            >>> collector.compute()["1"].observations
            20
        """
        with contextlib.nullcontext() if self._watcher.is_attached else self:
            return self._model(*args, **kwargs)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the forward passes that begin inside the block out of the counts, for example warm-up batches.

        Sites are still discovered in these passes.

        Returns:
            A context manager for the block.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
            >>> with fe.collect(model) as collector:
            ...     with collector.paused():
            ...         y = model(torch.randn(100, 3))
            ...     y = model(torch.randn(5, 3))
            >>> collector.compute()["1"].observations
            20
        """
        before, self._counting.is_paused = self._counting.is_paused, True
        try:
            yield
        finally:
            self._counting.is_paused = before

    def reset(self) -> None:
        """Set all counts to zero.

        The counters keep their addresses in memory, so a CUDA graph that was captured before still counts.
        """
        self._counting.reset()
        self._notes.clear()
        self._restored, self._restored_shares = Statistics({}), {}

    def compute(self) -> Statistics:
        """Return what this process has counted so far.

        In torch.distributed this covers the batches and the neurons of this rank only; `sync` combines all ranks.

        Returns:
            A copy on the CPU. Later passes do not change it.

        Raises:
            RuntimeError: no forward pass was counted, or no value in it.
            ValueError: the model calls no known activation.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> model = torch.nn.Sequential(torch.nn.ReLU())
            >>> with fe.collect(model) as collector:
            ...     y = model(torch.tensor([[-1.0, 0.0], [2.0, 3.0]]))
            >>> collector.compute()["0"].counts
            tensor([[1, 0, 1],
                    [0, 1, 1]])
        """
        if self._watcher.sites:
            for sentence in self._watcher.registry.unused():
                self._note(sentence)
        statistics = self._statistics()
        if statistics:
            return statistics
        if left_out := self._watcher.registry.left_out:
            raise RuntimeError(f"nothing was counted: all sites that ran are left out ({', '.join(left_out)}); see exclude=")
        if self._counting.has_counted and not self._watcher.sites:
            raise ValueError(no_sites(self._model))
        if statistics.notes:
            raise RuntimeError(f"nothing was counted: {'; '.join(statistics.notes)}")
        raise RuntimeError("nothing was counted: run the model while the collector is attached, then call compute()")

    def sync(self) -> Statistics:
        """Combine the statistics of all ranks of torch.distributed.

        This is a collective operation, so all ranks must call it. It leaves the counts of each rank unchanged, so it may be
        called at any time. If torch.distributed is not initialised, it returns the statistics of this process. Counts that were
        made on GPUs, one for each rank, are added over the backend of the GPUs (NCCL), others over that of the CPU.

        - Data-parallel ranks: the counts are added.
        - Tensor-parallel ranks that each hold some neurons of a site: the parts are concatenated in order.
        - Ranks that all hold the same values of a site: the site is counted once.
        - Stages of a pipeline, which have different sites: the result lists the sites of all stages in the order of the ranks.

        A site keeps its entropies per batch only if every rank processes whole batches, not some of their tokens.

        Returns:
            The same statistics on every rank.

        Raises:
            ValueError: the ranks run different models, it is not known which part of a site a rank holds, or the process group
                has no backend for a device of this process. All ranks raise.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> collector = fe.collect(torch.nn.Sequential(torch.nn.ReLU()))
            >>> y = collector.update(torch.ones(2, 3))
            >>> collector.sync()["0"].observations  # of one process
            6
        """
        modules = self._watcher.modules.activations
        return sum_over_ranks(self._statistics(), self._shares(), modules, self._counting.devices)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of this rank as tensors and plain values, to be saved with `torch.save`.

        The state has a key `shares` if this rank holds only a part of the neurons of a site, or the same values as another
        rank. `shares` then tells, by name of the site, where this rank's counts belong in the counts of all ranks.

        Returns:
            The state of `compute()` (see `Statistics.state_dict`), with `shares` if they are needed.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> collector = fe.collect(torch.nn.Sequential(torch.nn.ReLU()))
            >>> y = collector.update(torch.ones(2, 3))
            >>> sorted(collector.state_dict())
            ['0/counts', 'sites']
        """
        statistics, shares = self._statistics(), self._shares()
        state = statistics.state_dict()
        divided = {name: shares[name] for name, site in statistics.items() if shares[name] != RankShare(0, site.neurons)}
        return {**state, "shares": {name: share._asdict() for name, share in divided.items()}} if divided else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the counts by those of a saved state. Later passes are added to these counts.

        In torch.distributed, each rank must load the state that it saved itself.

        Args:
            state: a state that `state_dict` returned.

        Raises:
            ValueError: `state` is not the state of a collector, or it belongs to a model with other sites. Nothing is changed.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> model = torch.nn.Sequential(torch.nn.ReLU())
            >>> first, second = fe.collect(model), fe.collect(model)
            >>> y = first.update(torch.ones(2, 3))
            >>> second.load_state_dict(first.state_dict())
            >>> y = second.update(torch.ones(5, 3))
            >>> second.compute()["0"].observations
            21
        """
        restored = Statistics.from_state_dict(state)
        try:
            shares = {name: RankShare(**share) for name, share in state.get("shares", {}).items()}
        except (AttributeError, TypeError) as error:
            raise ValueError(f"not the state of a collector (make one with collector.state_dict()): {reason(error)}") from error
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
        """Return, by name of the site, where this rank's counts belong in the counts of all ranks.

        A state that was loaded has shares of its own. If a share differs from the one that the model has now, the state was
        saved by another rank. The share then has this as its `trouble`, and `sync` raises.
        """
        shares = {site.name: self._watcher.registry.share(site) for site in list(self._watcher.sites.values())}
        for name, share in self._restored_shares.items():
            is_another = shares.setdefault(name, share) != share
            shares[name] = share._replace(trouble=_ANOTHER_RANK) if is_another else share
        return shares

    def _statistics(self) -> Statistics:
        """Return the loaded counts plus everything counted since, without sites that have no values yet."""
        axis_from_end = self._watcher.registry.axis_from_end
        counted = {
            name: replace(site, channel_axis=axis_from_end(name))
            for name, site in self._counting.statistics(self._watcher.sites).items()
            if site.observations + site.nan
        }
        names = [*self._restored, *(name for name in counted if name not in self._restored)]
        parts = {name: [part[name] for part in (self._restored, counted) if name in part] for name in names}
        notes = tuple(dict.fromkeys((*self._restored.notes, *self._notes, *self._watcher.registry.notes)))
        return Statistics({name: reduce(add, sites) for name, sites in parts.items()}, notes)

    def _note(self, text: str) -> None:
        """Add a sentence to the notes and warn of it, unless it is among them already."""
        if text not in self._notes:
            self._notes.append(text)
            warnings.warn(text, stacklevel=2)

    def _recommend_isolation(self) -> None:
        """Warn, once, if the model calls activations as functions, because these are counted more slowly."""
        self._watcher.registry.recommend_isolation(type(self._model).__name__)
