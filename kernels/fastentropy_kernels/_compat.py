"""The private names of PyTorch and of the C library that the kernels use, each wrapped in one function.

A release of PyTorch may drop a private name. `is_plain_eager` then raises RuntimeError, because any default answer could lead
to wrong counts without an error. `openmp_parallel` returns None if its name is missing, and its caller then runs on one
thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad


def is_plain_eager(x: Tensor) -> bool:
    """Return whether an operator on `x` would run in plain eager mode, without a tracer, mode or transform.

    The result is False if PyTorch traces, if a `TorchDispatchMode` or forward-mode differentiation is active, or if `x` is
    wrapped by a transform of `torch.func`. A kernel that is launched directly is invisible to all of these, so the caller must
    use the registered operator instead. PyTorch has public context managers that enter them, but no public function that tells
    whether one is active.

    Args:
        x: any tensor. Its values are not read.

    Raises:
        RuntimeError: this release of PyTorch lacks one of the private names.
    """
    try:
        return (
            _C._get_tracing_state() is None
            and _C._len_torch_dispatch_stack() == 0
            and forward_ad._current_level < 0
            and not _C._functorch.is_functorch_wrapped_tensor(x)
        )
    except AttributeError as error:
        raise RuntimeError(
            f"PyTorch {torch.__version__} no longer tells whether a kernel may be launched directly ({error}); "
            "use a release of PyTorch that the CHANGELOG of fastentropy names"
        ) from error


@cache
def openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Return the C function `GOMP_parallel(function, argument, threads, flags)`, or None if it is missing.

    GNU's, LLVM's and Intel's OpenMP all export this function. It calls `function(argument)` once on each thread of a team.
    Python has no public function that does so. `import torch` loads its OpenMP library into the global scope. The kernels use
    the same library, because the threads of a second library would compete with PyTorch's threads for the cores. The function
    is missing on Windows, for example. The caller then uses one thread.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
