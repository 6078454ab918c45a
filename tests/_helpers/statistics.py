"""Comparisons of collected statistics with the calls that an independent oracle recorded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import fastentropy as fe

if TYPE_CHECKING:  # the import takes seconds
    from tests._helpers.oracle import Call


def assert_same_counts(statistics: fe.Statistics, calls: Sequence[Call]) -> None:
    """Assert that the i-th site of the statistics agrees with the i-th call: in its name, its neurons and every count.

    Args:
        statistics: the collected statistics by site (call of an activation).
        calls: the calls that the oracle recorded, in order.
    """
    assert_names(list(statistics), calls)
    pairs = zip(statistics.items(), calls, strict=True)
    assert [name for (name, site), call in pairs if not torch.equal(site.counts, call.counts)] == []
    assert not any(site.nan for site in statistics.values())


def assert_names(names: Sequence[str], calls: Sequence[Call]) -> None:
    """Assert that `names` are the names of the calls, in order. A call whose name is None may have any name."""
    expected = [call.name or name for name, call in itertools.zip_longest(names, calls) if call]
    assert list(names) == expected


def counted(collector: fe.EntropyCollector) -> dict[str, int]:
    """Return the number of values that the collector counted at each site, by name."""
    return {name: site.observations for name, site in collector.compute().items()}
