"""Every private name of PyTorch and of the C library that the kernels use, each in one function.

A name without a public counterpart can go with any release. A function that no longer finds its name raises RuntimeError: a
default in its place would count wrongly without a word.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_plain_eager(x: Tensor) -> bool:
    """Return whether nobody but the caller sees an operator on `x`: no tracer, mode, forward derivative or transform.

    A kernel that is launched directly is invisible to all of these; they get the registered operators instead. PyTorch has
    public context managers to enter each of them, and no public question whether one is active.

    Raises:
        RuntimeError: this release of PyTorch has one of the names no longer.
    """
    try:
        return (
            torch._C._get_tracing_state() is None
            and torch._C._len_torch_dispatch_stack() == 0
            and forward_ad._current_level < 0
            and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        )
    except AttributeError as error:
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no longer what tells whether a kernel may be launched directly ({error}); "
            'use impl="reference", or a release of PyTorch that the CHANGELOG of fastentropy names'
        ) from error


@cache
def openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Return GOMP_parallel(function, argument, threads, flags), which GNU's, LLVM's and Intel's OpenMP all have.

    `import torch` has put its own OpenMP into the global scope, and only its team leaves the cores to PyTorch's operators.
    There is no header for it in Python. None where there is none (Windows): the caller then uses one thread.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
