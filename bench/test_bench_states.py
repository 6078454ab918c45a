"""What counting costs beside the activation alone, and beside the ways of counting that need no kernel.

    pytest bench/test_bench_states.py --benchmark-group-by=group

On a GPU add --benchmark-timer=torch.utils.benchmark.utils.timer.timer, which synchronises. `bytes` in the extra
information is what the operation has to move at least: x read, y written.
"""

import pytest
import torch

from fastentropy_kernels import activation_states, count_states

SHAPES = {"planes": (21, 64, 56, 56), "rows": (4096, 1024)}  # 4.2 million values: NCHW, and tokens x hidden
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def relu(x, counts):
    return torch.relu(x)


def relu_with_states(x, counts):
    return activation_states(x, counts, "relu")


def states_alone(x, counts):
    count_states(x, counts)


def relu_and_states_in_pytorch(x, counts):
    dims = [axis for axis in range(x.ndim) if axis != 1]
    counts += torch.stack([(x < 0).sum(dims), (x == 0).sum(dims), (x > 0).sum(dims)], 1)
    return torch.relu(x)


def relu_and_published_procedure(x, counts):
    """EASIER's code, per mini-batch as in its forward hook: on or not in floats, a mean per neuron, its entropy."""
    y = torch.relu(x)
    state = (x > 0).float()
    p = state.transpose(0, 1).reshape(x.shape[1], -1).mean(1)
    entropy = -(p * torch.log2(p.clamp(min=1e-5)) + (1 - p) * torch.log2((1 - p).clamp(min=1e-5)))
    return y, entropy


OPERATIONS = {  # -> how often the operation passes over the memory of x, at least
    relu: 2,
    relu_with_states: 2,
    states_alone: 1,
    relu_and_states_in_pytorch: 2,
    relu_and_published_procedure: 2,
}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_states(benchmark, device, layout, dtype, operation):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    benchmark.group = f"{device} {layout} {dtype}"
    x = torch.randn(SHAPES[layout], device=device).to(DTYPES[dtype])
    counts = torch.zeros(x.shape[1], 3, dtype=torch.int64, device=device)
    benchmark.extra_info["bytes"] = OPERATIONS[operation] * x.numel() * x.element_size()
    benchmark.pedantic(operation, (x, counts), rounds=30, warmup_rounds=3)
