"""Collect the states of every activation while the user's own loop runs the model."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import Any

from torch import nn

from fastentropy.collector.counting import PassCounting
from fastentropy.collector.distributed import sum_over_ranks
from fastentropy.collector.site_statistics import Average
from fastentropy.collector.statistics import Statistics
from fastentropy.sites.finding import no_sites
from fastentropy.sites.interception import original_class
from fastentropy.sites.padding import Mask
from fastentropy.sites.sharding import RankShare
from fastentropy.sites.watcher import SiteWatcher

_ANOTHER_RANK = "the loaded state was saved by another rank, or by other ranks; load on each rank the state that it saved"


class EntropyCollector:
    """Count, per neuron, how often the input of each activation is off, zero and on, while attached to a model.

    Make one with `collect`. Use it as a context manager, or call `attach` and `detach`. Only integers are kept. A pass is
    counted as a whole when it is complete; a pass that raises leaves nothing.

    Args:
        model: see `collect`.
        average: see `collect`.
        channel_axis: see `collect`.
        mask: see `collect`.

    Raises:
        ValueError: `average` is neither "dataset" nor "batch".

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
    ) -> None:
        """Prepare to count; see `collect` for the arguments."""
        if average not in ("dataset", "batch"):
            raise ValueError(f"average={average!r}: expected 'dataset' or 'batch'")
        self._model = model
        self._counting = PassCounting(average == "batch", self._recommend_isolation)
        self._watcher = SiteWatcher(model, self._counting, channel_axis, mask)
        self._restored, self._restored_shares = Statistics({}), dict[str, RankShare]()

    def attach(self) -> None:
        """Begin to count.

        Raises:
            RuntimeError: a collector is attached to the model, or to a part of it, already.
            ValueError: activations of the model are compiled by TorchScript.
        """
        self._watcher.attach()

    def detach(self) -> None:
        """Stop counting and leave the model as it was. The counts stay."""
        self._watcher.detach()

    def __enter__(self) -> "EntropyCollector":
        """Attach."""
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach, also after an exception."""
        self.detach()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with a batch, count it and return the output.

        With `compute`, `reset` and `sync` this is the interface of torchmetrics. A collector that is not attached attaches for
        the call.

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
        """Count no pass that begins inside the block, as for warm-up batches. Their sites are discovered all the same.

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
        """Set all counts to zero. Counters keep their addresses, so a captured CUDA graph goes on counting."""
        self._counting.reset()
        self._restored, self._restored_shares = Statistics({}), {}

    def compute(self) -> Statistics:
        """Return the statistics so far: those of this rank, with its neurons.

        Returns:
            A copy on the CPU, which later counting does not change.

        Raises:
            RuntimeError: no forward pass was counted.
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
        statistics = self._statistics()
        if statistics:
            return statistics
        if self._counting.has_counted and not self._watcher.sites:
            raise ValueError(no_sites(self._model))
        raise RuntimeError("nothing was counted: run the model while the collector is attached, then call compute()")

    def sync(self) -> Statistics:
        """Return the statistics of all ranks of torch.distributed together; those of `compute` where it is not initialised.

        All ranks must call it. It can be called at any time: the counts of this rank stay as they are.

        The counts of data-parallel ranks add up. Neurons that tensor-parallel ranks divide among them are put together in
        order. A site whose values all ranks hold is counted once. The stages of a pipeline have different sites, which are put
        together by rank. Batches are told apart at a site where each rank has whole batches, not some of their tokens.

        Returns:
            The same statistics on every rank.

        Raises:
            ValueError: on all ranks, where they run different models, or where it is not known which part of a site a rank has.

        Examples:
            >>> import torch
            >>> import fastentropy as fe
            >>> collector = fe.collect(torch.nn.Sequential(torch.nn.ReLU()))
            >>> y = collector.update(torch.ones(2, 3))
            >>> collector.sync()["0"].observations  # of one process
            6
        """
        return sum_over_ranks(self._statistics(), self._shares(), self._watcher.activations)

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank counted, as tensors and plain values.

        Save it with `torch.save`. Where this rank has a part of the neurons, or the same ones as another rank, the key `shares`
        holds this by site.

        Returns:
            The state of `compute()` (see `Statistics.state_dict`), with `shares` where they are needed.

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
        """Replace the counts by those of a saved state; later passes are added to it.

        Each rank loads the state that it saved.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: `state` is not the state of a collector, or it is of a model with other sites. Nothing is changed.

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
        """Return where this rank's counts of each site belong in the counts of all ranks."""
        shares = {site.name: self._watcher.registry.share(site) for site in list(self._watcher.sites.values())}
        for name, share in self._restored_shares.items():
            is_another = shares.setdefault(name, share) != share
            shares[name] = share._replace(trouble=_ANOTHER_RANK) if is_another else share
        return shares

    def _statistics(self) -> Statistics:
        counted = self._counting.statistics(self._watcher.sites)
        counted = {name: site for name, site in counted.items() if site.observations + site.nan}
        names = [*self._restored, *(name for name in counted if name not in self._restored)]
        parts = {name: [part[name] for part in (self._restored, counted) if name in part] for name in names}
        return Statistics({name: reduce(add, sites) for name, sites in parts.items()})

    def _recommend_isolation(self) -> None:
        self._watcher.registry.recommend_isolation(original_class(self._model).__name__)


def collect(
    model: nn.Module,
    *,
    average: Average = "dataset",
    channel_axis: Mapping[str, int] | None = None,
    mask: Mask = "attention_mask",
) -> EntropyCollector:
    """Make a collector for all activations of a model, to be used as `with fe.collect(model) as collector:`.

    The model is unchanged afterwards, also when the block raises. Inside the block, parts that were compiled with torch.compile
    run eagerly. In a gated MLP (SwiGLU, GeGLU) the site is the activation of the gate, and a state is the sign of the gate's
    pre-activation. An MLP whose gate never changes its state is still a product of gate and value, not linear.

    Args:
        model: any module.
        average: "batch" also keeps the mean of the entropies of single batches; "dataset" keeps the counts only. The counts are
            exact in both.
        channel_axis: the neuron axis of sites, by name, where it should not be inferred from the operator before them.
        mask: name of the argument, of the model or of a part of it, that holds the padding mask: [batch, tokens], 0 at
            padding. Padding is not counted. Or a function that returns the mask for the (args, kwargs) of a call; or None for
            no mask.

    Returns:
        A collector that is not attached yet.

    Raises:
        ValueError: `average` is neither "dataset" nor "batch".

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> with fe.collect(model) as collector:
        ...     for _ in range(10):
        ...         y = model(torch.randn(5, 3))
        >>> statistics = collector.compute()
        >>> statistics["1"].neurons, statistics["1"].observations
        (4, 200)
    """
    return EntropyCollector(model, average=average, channel_axis=channel_axis, mask=mask)
