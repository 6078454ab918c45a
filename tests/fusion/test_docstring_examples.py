"""The examples in the docstrings of chains, latency tables and projections run."""

import doctest

import pytest

from fastentropy.fusion import projection
from fastentropy.fusion.chains import finding, lowering
from fastentropy.fusion.latency import profiler, table


@pytest.mark.parametrize("module", [finding, lowering, profiler, projection, table], ids=lambda module: module.__name__)
def test_examples_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
