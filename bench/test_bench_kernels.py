"""The time of the kernels that count the states (off, zero or on) of values, next to an activation, a copy and the baselines.

pytest bench/test_bench_kernels.py --benchmark-group-by=group

For ratios that can be quoted, run `fastentropy bench kernels`, which measures the same operations in alternation. It also draws
a roofline.
"""

import pytest
import torch

from fastentropy.benchmarks.kernels import LAYOUTS, OPERATIONS, kernel_case

SIZES = {"cpu": 2**22, "cuda": 2**26}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels(measured, device, layout, dtype, operation):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    measured(kernel_case(torch.device(device), dtype, layout, SIZES[device], "relu"), operation)
