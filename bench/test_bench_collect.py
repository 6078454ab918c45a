"""The time of inference while statistics are collected from whole models, next to plain inference and the baselines.

pytest bench/test_bench_collect.py --benchmark-group-by=group

The batches are small, for a quick look. For ratios that can be quoted, run `fastentropy bench collect`, which measures the
operations in alternation. It also measures the memory.
"""

import contextlib

import pytest
import torch

from fastentropy.benchmarks.collecting import NETWORKS, PROCEDURES, network_cases
from fastentropy.benchmarks.networks import small_llama, vision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("name", NETWORKS["cpu"])
def test_collect(measured, name, procedure):
    with DEVICE:
        network = small_llama(batch=2) if name == "small llama" else vision(name, batch=2, size=96)
    with contextlib.closing(network_cases(name, network, DEVICE)) as cases:
        measured(next(cases), procedure)
