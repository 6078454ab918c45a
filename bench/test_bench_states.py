"""What counting costs beside the activation alone, and beside the ways of counting that need no kernel.

    pytest bench/test_bench_states.py --benchmark-group-by=group

On a GPU add --benchmark-timer=torch.utils.benchmark.utils.timer.timer, which synchronises. In the extra information are
`bytes`, what the operation has to move at least (x read, y written), and `copy_percent`: how fast it moves them, in
percent of a copy of x measured just before. `record_states.py` measures all of them in turns, for ratios to be quoted.
"""

import pytest
import torch
from state_peers import DTYPES, PASSES, SHAPES, copy, operands

from fastentropy.timing import measure_times

CASES = [
    pytest.param(device, shape, dtype, marks=[pytest.mark.gpu] if device == "cuda" else [])
    for device, shapes in SHAPES.items()
    for shape in shapes
    for dtype in DTYPES
]


@pytest.mark.parametrize("operation", PASSES, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize(("device", "shape", "dtype"), CASES)
def test_states(benchmark, device, shape, dtype, operation):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x, counts = operands(device, shape, dtype)
    benchmark.group = f"{device} {shape} {dtype}"
    copied = measure_times({copy: lambda: copy(x, counts)})[copy]
    benchmark.pedantic(operation, (x, counts), rounds=30, warmup_rounds=3)
    size = x.numel() * x.element_size()
    benchmark.extra_info["bytes"] = PASSES[operation] * size
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["copy_percent"] = 100 * (PASSES[operation] * size / seconds) / (2 * size / copied * 1e3)
