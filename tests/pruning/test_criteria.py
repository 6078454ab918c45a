import itertools
import math

import pytest
import torch

from fastentropy import SiteStatistics, Statistics
from fastentropy.fusion.latency.table import LatencyTable, Part, Section, Stretch
from fastentropy.pruning.criteria import best_trade, check_budget, lowest, scores


def statistics(**shares):
    """Return sites with one neuron each, which is on in the given percentage of its inputs."""
    return Statistics({name: SiteStatistics("relu", torch.tensor([[100 - on, 0, on]])) for name, on in shares.items()})


FOUR = statistics(a=50, b=1, c=30, d=100)
SITES = ("a", "b", "c", "d")


def test_lowest_breaks_ties_by_call_order():
    assert lowest({"b": 0.5, "c": 0.1, "a": 0.1, "d": 0.1}, 2) == ("c", "a")


def test_entropy_scores():
    assert scores("entropy", None, FOUR, {"b": 0.5, "a": 1.0}, SITES) == {"b": 0.5, "a": 1.0}


def test_random_scores_ignore_entropies():
    firsts = set()
    for seed in range(40):
        torch.manual_seed(seed)
        scored = scores("random", None, FOUR, {}, SITES)
        torch.manual_seed(seed)
        assert scored == scores("random", None, FOUR, {}, SITES)
        firsts |= set(lowest(scored, 1))
    assert firsts == set(SITES)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 17])
def test_uniform_removals_halve_the_longest_gaps(count):
    """After 2^n − 1 removals, no gap is more than twice as long as another, apart from rounding."""
    names = [f"s{index:02}" for index in range(count)]
    left, order = list(names), []
    while left:
        (name,) = lowest(scores("uniform", None, statistics(**dict.fromkeys(left, 50)), {}, names), 1)
        left.remove(name)
        order.append(names.index(name))
        if len(order) in (1, 3, 7, 15):
            taken = [-1, *sorted(order), count]
            gaps = [b - a for a, b in itertools.pairwise(taken)]
            assert max(gaps) <= 2 * min(gaps) + 1
    assert order[0] == (count - 1) // 2
    assert sorted(order) == list(range(count))


def test_scores_of_a_function():
    seen = []

    def depth(model, given):
        seen.append((model, given))
        return {"d": 2, "b": 1.5}

    assert scores(depth, "the model", FOUR, {}, SITES) == {"b": 1.5, "d": 2.0}
    assert seen == [("the model", FOUR)]


@pytest.mark.parametrize(
    ("given", "message"),
    [({"e": 1.0}, "criterion scored e; expected some"), ({"a": math.nan}, "a: nan"), (None, "criterion returned a NoneType")],
)
def test_invalid_scores_of_a_function(given, message):
    with pytest.raises(ValueError, match=message):
        scores(lambda model, statistics: given, None, FOUR, {}, SITES)


#: Four activations between operators. Without c and d, all operators after b merge into one; removing a alone saves little.
TABLE = LatencyTable(
    12.0,
    1.5,
    (
        Section(
            (
                Part(1.0),
                Part(0.2, "a"),
                Part(1.0),
                Part(0.1, "b"),
                Part(2.0),
                Part(0.1, "c"),
                Part(2.0),
                Part(0.1, "d"),
                Part(2.0),
            ),
            (Stretch(0, 3, 1.9, frozenset("a")), Stretch(4, 9, 1.0, frozenset("cd"))),
        ),
    ),
)


def test_best_trade_loses_least_per_millisecond():
    losses = {"a": 0.5, "b": 0.9, "c": 0.8, "d": 0.8}
    assert best_trade(TABLE, losses, [], 4, None) == {"c", "d"}
    assert best_trade(TABLE, losses, [], 1, None) == {"a"}  # a set of two is too large
    assert best_trade(TABLE, losses, ["c", "d"], 4, None) == {"a"}
    assert best_trade(TABLE, losses, ["c"], 4, None) == {"d"}  # a removed site costs nothing
    assert best_trade(TABLE, {"a": 0.5}, [], 4, None) == {"a"}  # the others are protected


def test_best_trade_without_a_saving():
    section = Section((Part(1.0), Part(0.0, "a"), Part(1.0)), (Stretch(0, 3, 2.5, frozenset("a")),))
    assert best_trade(LatencyTable(2.0, 0.0, (section,)), {"a": 0.0}, [], 1, None) == frozenset()


def test_best_trade_under_a_budget():
    """A greedy choice would begin with c and d, which are not needed for 9.7 ms."""
    losses = {"a": 0.5, "b": 0.9, "c": 0.8, "d": 0.8}
    assert best_trade(TABLE, losses, [], 4, 9.7) == {"a"}
    assert best_trade(TABLE, losses, [], 4, 5.0) == {"c", "d"}


def test_best_trade_under_a_budget_and_limit():
    """b and c lose least for 9.85 ms, but are two sites; a alone meets it, too."""
    losses = {"a": 0.5, "b": 0.01, "c": 0.02, "d": 0.9}
    assert best_trade(TABLE, losses, [], 2, 9.85) <= {"b", "c"}
    assert best_trade(TABLE, losses, [], 1, 9.85) == {"a"}


def test_budget_out_of_reach():
    check_budget(TABLE, SITES, 4.5)
    with pytest.raises(
        ValueError, match=r"a latency of 2\.000 ms cannot be reached: .* to take 4\.4\d\d ms, 2\.\d\d times as fast"
    ):
        check_budget(TABLE, SITES, 2.0)
