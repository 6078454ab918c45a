"""Choose the sites (calls of activations) that are removed next: by entropy, by latency, by a control, or by a function."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from fastentropy.collector.statistics import Statistics
from fastentropy.fusion.latency import LatencyTable

NamedCriterion = Literal["entropy", "entropy-per-latency", "random", "uniform"]

#: A function of the current model and its statistics. It returns a dict from site to score; the lowest are removed first.
Score: TypeAlias = Callable[[nn.Module, Statistics], Mapping[str, float]]
Criterion: TypeAlias = NamedCriterion | Score

CRITERIA: tuple[str, ...] = get_args(NamedCriterion)


def scores(
    criterion: Criterion, model: nn.Module, statistics: Statistics, entropies: Mapping[str, float], sites: Sequence[str]
) -> dict[str, float]:
    """Score each site (call of an activation) that has not been removed yet.

    Args:
        criterion: how the sites are scored.
            "entropy": by their layer entropy.
            "random": by a number from torch's default generator.
            "uniform": the site farthest from all removed sites and from both ends of the network has the lowest score.
            A function is called as `criterion(model, statistics)` and returns a dict from site to score. Sites that are missing
            from the dict are not removed.
        model: the current model, without the activations that have been removed.
        statistics: the statistics of the remaining sites.
        entropies: the layer entropy (arXiv 2404.18949, equation 4), in bits, of each remaining site.
        sites: the names of all sites of the dense model, in call order.

    Returns:
        The scores by name of the site, in call order. Sites with the lowest scores are removed first.

    Raises:
        ValueError: the function returns something other than numbers for remaining sites.
    """
    names = list(statistics)
    if criterion == "entropy":
        return dict(entropies)
    if criterion == "random":
        return dict(zip(names, torch.rand(len(names), dtype=torch.float32, device="cpu").tolist(), strict=True))
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
        raise ValueError(f"criterion scored {', '.join(wrong)}; expected numbers, the lowest for the first to remove")
    return {name: given[name] for name in names if name in given}


def lowest(scored: Mapping[str, float], count: int) -> tuple[str, ...]:
    """Return the names of the sites with the lowest scores.

    Args:
        scored: the score of each site, by name.
        count: how many names to return. Among equal scores, the first sites in `scored` are taken.
    """
    return tuple(sorted(scored, key=lambda name: scored[name])[: max(count, 0)])


def best_trade(
    table: LatencyTable, losses: Mapping[str, float], removed: Collection[str], limit: int, budget: float | None
) -> frozenset[str]:
    """Return the set of sites that loses the least entropy per millisecond saved; an empty set if none saves any time.

    Args:
        table: the measured latencies of the dense network and of its parts.
        losses: the layer entropy, in bits, of each site that may be removed. It is the loss of the removal.
        removed: the names of the sites that have been removed.
        limit: the largest number of sites in the result.
        budget: how many milliseconds one call may take, or None. With a budget, the result is a part of a larger set: the sites
            whose removal meets the budget at the least loss. If the budget can be met by removing at most `limit` further
            sites, only such sets are considered.
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
    """Raise ValueError if the network is predicted to miss a budget even when all of `sites` are removed.

    Args:
        table: the measured latencies of the dense network.
        sites: the names of all sites that may be removed.
        budget: how many milliseconds one call may take.
    """
    least = max(table.fastest(sites).milliseconds, 1e-9)
    if least > budget:
        raise ValueError(
            f"a latency of {budget:.3f} ms cannot be reached: without all removable activations, one call is predicted to "
            f"take {least:.3f} ms, {table.original / least:.2f} times as fast as the dense model; set a larger budget"
        )


def _optimum(
    table: LatencyTable, losses: Mapping[str, float], removed: Collection[str], limit: int, budget: float
) -> frozenset[str]:
    """Return the sites whose removal meets the budget at the least loss. The arguments are those of `best_trade`.

    If no choice of sites meets the budget, all sites are returned.
    """
    choices = table.choices({**losses, **dict.fromkeys(removed, 0.0)})
    enough = [choice.removed for choice in choices if choice.milliseconds <= budget]
    small = [sites for sites in enough if len(sites - set(removed)) <= limit]
    return next(iter([*small, *enough]), frozenset(losses))


def _nearness(sites: Sequence[str], left: Collection[str]) -> dict[str, float]:
    """Score each remaining site by minus its distance to the nearest removed site or end of the network.

    Args:
        sites: the names of all sites of the dense model, in call order. The distance is counted in sites.
        left: the names of the remaining sites.
    """
    taken = [-1, *(index for index, name in enumerate(sites) if name not in left), len(sites)]
    return {name: -min(abs(index - other) for other in taken) for index, name in enumerate(sites) if name in left}
