"""Fused chains next to the same with batch norm folded, the original, and torch.compile.

pytest bench/test_bench_fuse.py --benchmark-group-by=group

`fastentropy bench fuse` measures more of them, in turns, for ratios to quote.
"""

import functools

import pytest
import torch

from fastentropy.benchmarks.fusing import FORMS, fuse_case
from fastentropy.benchmarks.networks import mobilenet_blocks, moved, vit_mlp

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NETWORKS = {
    "mobilenet_v2 features.2": lambda: mobilenet_blocks(1)["mobilenet_v2 features.2"],
    "vit_b_16 MLP": lambda: vit_mlp(1),
}


@functools.cache
def case(name):
    return fuse_case(name, moved(NETWORKS[name](), DEVICE, torch.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_fuse(measured, name, form):
    measured(case(name), form)
