"""What collecting costs a whole model, beside inference alone and beside the published procedure.

    pytest bench/test_bench_collect.py --benchmark-group-by=group

Small images and batches, for a quick look. `record_collect.py` measures in turns, for ratios to be quoted, and the memory.
"""

import functools

import pytest
import torch
from collect_peers import MODELS, PROCEDURES, load_model

from fastentropy.isolation import copy_sharing_tensors

load_model_once = functools.cache(load_model)


@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_collect(benchmark, name, procedure):
    benchmark.group = name
    with torch.inference_mode(), procedure(copy_sharing_tensors(load_model_once(name))) as run:
        benchmark.pedantic(run, (torch.randn(4, 3, 96, 96),), rounds=10, warmup_rounds=2)
