"""Comparisons of statistics."""

from collections.abc import Sequence

import torch

import fastentropy as fe
from tests._helpers.oracle import Call
from tests.collector.test_architectures import assert_names


def assert_same_counts(statistics: fe.Statistics, calls: Sequence[Call]) -> None:
    """Compare the i-th site with the i-th call: name, neurons, every count."""
    assert_names(list(statistics), calls)
    pairs = zip(statistics.items(), calls, strict=True)
    assert [name for (name, site), call in pairs if not torch.equal(site.counts, call.counts)] == []
    assert not any(site.nan for site in statistics.values())
