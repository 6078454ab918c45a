"""Which activations go next: the published criterion, one that counts milliseconds, two controls, or one's own."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from fastentropy.collector.statistics import Statistics
from fastentropy.fusion.latency import LatencyTable

NamedCriterion = Literal["entropy", "entropy-per-latency", "random", "uniform"]

#: A function of the model as it is now and its statistics, that gives a score to each site that may go: the lowest go first.
Score: TypeAlias = Callable[[nn.Module, Statistics], Mapping[str, float]]
Criterion: TypeAlias = NamedCriterion | Score

CRITERIA: tuple[str, ...] = get_args(NamedCriterion)


def scores(criterion: Criterion, model: nn.Module, statistics: Statistics, sites: Sequence[str]) -> dict[str, float]:
    """The score of each site that is left, by a criterion that judges sites one by one.

    sites: those of the dense model in call order; statistics has those that are left.
    "entropy" is the layer entropy (arXiv 2404.18949, equation 4), "random" is drawn from torch's default generator, and
    "uniform" prefers what is farthest from all sites that are removed, and from both ends of the network.
    Raises ValueError where a function gives something else than numbers for sites of the model.
    """
    names = list(statistics)
    if criterion == "entropy":
        return statistics.layer_entropy()
    if criterion == "random":
        return dict(zip(names, torch.rand(len(names)).tolist(), strict=True))
    if criterion == "uniform":
        return _nearness(sites, names)
    assert callable(criterion)
    answer = criterion(model, statistics)
    if not isinstance(answer, Mapping):
        raise ValueError(f"criterion returned a {type(answer).__name__}; expected a dict of scores by site")
    given = {name: float(score) for name, score in answer.items()}
    if unknown := [name for name in given if name not in statistics]:
        raise ValueError(f"criterion scored {', '.join(unknown)}; expected some of the sites {', '.join(names)}")
    if wrong := [f"{name}: {score}" for name, score in given.items() if math.isnan(score)]:
        raise ValueError(f"criterion scored {', '.join(wrong)}; expected numbers, the lowest for what goes first")
    return {name: given[name] for name in names if name in given}


def lowest(scored: Mapping[str, float], count: int) -> tuple[str, ...]:
    """The names of the `count` sites with the lowest score; of equal ones, those that come first."""
    return tuple(sorted(scored, key=lambda name: scored[name])[: max(count, 0)])


def best_trade(
    table: LatencyTable, losses: Mapping[str, float], removed: Collection[str], limit: int, budget: float | None
) -> frozenset[str]:
    """The set of at most `limit` sites that loses least entropy for each millisecond that it saves; empty if none saves any.

    losses: bits that each site which may go would lose. budget: milliseconds; only what belongs to the set of least loss that
    keeps to it is taken then, of those with at most `limit` sites if there are any.
    """
    now = table.fastest(removed).milliseconds
    wanted = losses.keys() if budget is None else _optimum(table, losses, removed, limit, budget)
    best, best_ratio = frozenset[str](), math.inf
    for sites in table.candidates():
        sites = sites - set(removed)
        if not sites or len(sites) > limit or not sites <= wanted:
            continue
        saved = now - table.fastest([*removed, *sites]).milliseconds
        if saved > 0 and (ratio := sum(losses[site] for site in sites) / saved) < best_ratio:
            best, best_ratio = sites, ratio
    return best


def check_budget(table: LatencyTable, sites: Collection[str], budget: float) -> None:
    """Raise ValueError where not even the removal of all these sites is predicted to meet a budget in milliseconds."""
    least = max(table.fastest(sites).milliseconds, 1e-9)
    if least > budget:
        raise ValueError(
            f"a latency of {budget:.3f} ms cannot be reached: without any activation that may go, one call is predicted to "
            f"take {least:.3f} ms, {table.original / least:.2f} times as fast as the dense model; ask for less"
        )


def _optimum(
    table: LatencyTable, losses: Mapping[str, float], removed: Collection[str], limit: int, budget: float
) -> frozenset[str]:
    """The sites of least loss without which the network keeps to a budget."""
    choices = table.choices({**losses, **dict.fromkeys(removed, 0.0)})
    enough = [choice.removed for choice in choices if choice.milliseconds <= budget]
    small = [sites for sites in enough if len(sites - set(removed)) <= limit]
    return next(iter([*small, *enough]), frozenset(losses))


def _nearness(sites: Sequence[str], left: Collection[str]) -> dict[str, float]:
    """Minus the distance of each site that is left to the nearest one that is not, or end of the network, in sites."""
    taken = [-1, *(place for place, name in enumerate(sites) if name not in left), len(sites)]
    return {name: -min(abs(place - other) for other in taken) for place, name in enumerate(sites) if name in left}
