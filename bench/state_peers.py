"""What is measured side by side: the activation with and without its states, and the ways of counting that need no kernel."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastentropy_kernels import activation_states, count_states

# Name -> shape, with the channels on axis 1. On a CPU 4 and 13 million values; on a GPU 33 and 134 million, which are
# 64 MB and 256 MB in bfloat16.
SHAPES = {
    "cpu": {
        "planes 4M": (21, 64, 56, 56),
        "planes 13M": (16, 64, 112, 112),
        "rows 4M": (4096, 1024),
        "rows 13M": (4096, 3072),
    },
    "cuda": {
        "planes 33M": (41, 256, 56, 56),
        "planes 134M": (167, 64, 112, 112),
        "rows 33M": (8192, 4096),
        "rows 134M": (32768, 4096),
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def relu(x: Tensor, counts: Tensor) -> Tensor:
    """The activation alone."""
    return torch.relu(x)


def relu_with_states(x: Tensor, counts: Tensor) -> Tensor:
    """The activation and the states of its input, fused."""
    return activation_states(x, counts, "relu")


def states_alone(x: Tensor, counts: Tensor) -> None:
    """The states in a pass of their own."""
    count_states(x, counts)


def relu_and_states_in_pytorch(x: Tensor, counts: Tensor) -> Tensor:
    """The activation, then the same counts in plain PyTorch."""
    dims = [axis for axis in range(x.ndim) if axis != 1]
    counts += torch.stack([(x < 0).sum(dims), (x == 0).sum(dims), (x > 0).sum(dims)], 1)
    return torch.relu(x)


def relu_and_published_procedure(x: Tensor, counts: Tensor) -> tuple[Tensor, float]:
    """The activation, then what EASIER's code does with its input."""
    return torch.relu(x), published_entropy(x)


def published_entropy(x: Tensor, *, neurons_last: bool = False) -> float:
    """The steps of EASIER's code (VGCQ/EASIER, utils.py) for one layer and one mini-batch, in bits.

    Shares of the batch at or above zero, and below, at every position; their means per neuron, which are on axis 1 or, as
    that code has it for Swin, on the last axis; the entropy of the two; its mean as a number.
    """
    entropy = torch.zeros((), device=x.device)
    for state in (x >= 0, x < 0):
        share = state.sum(0) / x.shape[0]
        while share.ndim > 1:
            share = share.mean(0 if neurons_last else 1)
        entropy = entropy - share * torch.log2(share.clamp(min=1e-10))
    return entropy.mean().item()


def copy(x: Tensor, counts: Tensor) -> Tensor:
    """The roof: x read and written once, by PyTorch's own copy."""
    return x.clone()


PASSES: dict[Callable[[Tensor, Tensor], object], int] = {
    copy: 2,
    relu: 2,
    relu_with_states: 2,
    states_alone: 1,
    relu_and_states_in_pytorch: 2,
    relu_and_published_procedure: 2,
}
"""Operation -> how often it goes over the memory of x at least: read, and written where there is a y."""


def operands(device: str, shape: str, dtype: str) -> tuple[Tensor, Tensor]:
    """Return fresh normal values and the counts for them."""
    x = torch.randn(SHAPES[device][shape], device=device).to(DTYPES[dtype])
    return x, torch.zeros(x.shape[1], 3, dtype=torch.int64, device=device)
