"""The examples in the docstrings of the collector run, also those of methods."""

import doctest

import pytest

from fastentropy.collector import collector, site_statistics, statistics


@pytest.mark.parametrize("module", [collector, site_statistics, statistics], ids=lambda module: module.__name__)
def test_examples_run(module):
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
