"""The time of fused networks, next to the same networks with batch norm folded, the originals, and those in other runtimes.

pytest bench/test_bench_fuse.py --benchmark-group-by=group

For ratios that can be quoted, run `fastentropy bench fuse`, which measures the forms of a network in alternation. It also
measures more networks.
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
    if form not in case(name).operations:
        pytest.skip(f"{form} runs on a CPU only")
    measured(case(name), form)
