"""Comparisons of statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

import fastentropy as fe

if TYPE_CHECKING:  # it takes seconds to import
    from tests._helpers.oracle import Call


def assert_same_counts(statistics: fe.Statistics, calls: Sequence[Call]) -> None:
    """Compare the i-th site with the i-th call: name, neurons, every count."""
    assert_names(list(statistics), calls)
    pairs = zip(statistics.items(), calls, strict=True)
    assert [name for (name, site), call in pairs if not torch.equal(site.counts, call.counts)] == []
    assert not any(site.nan for site in statistics.values())


def assert_names(names: Sequence[str], calls: Sequence[Call]) -> None:
    """The names that calls should have, in their order; any name is right where no rule gives one."""
    expected = [call.name or name for name, call in itertools.zip_longest(names, calls) if call]
    assert list(names) == expected


def counted(collector: fe.EntropyCollector) -> dict[str, int]:
    """How many values each site saw."""
    return {name: site.observations for name, site in collector.compute().items()}
