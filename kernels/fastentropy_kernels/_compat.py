"""Every private name of PyTorch and of the C library that the kernels use, each in one function.

Any release may drop a private name. A function that no longer finds its name raises RuntimeError, because a default would
count wrongly in silence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad


def is_plain_eager(x: Tensor) -> bool:
    """Return whether no tracer, mode, forward derivative or transform would see an operator on `x`.

    A kernel that is launched directly is invisible to all of these, so they get the registered operators instead. PyTorch has
    public context managers that enter them, but no public function that tells whether one is active.

    Raises:
        RuntimeError: this release of PyTorch lacks one of the names.
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
    """Return GOMP_parallel(function, argument, threads, flags), an entry point of GNU's, LLVM's and Intel's OpenMP.

    `import torch` loads its own OpenMP into the global scope, and only that team leaves the cores to PyTorch's operators.
    Python has no public function that starts it. Where there is no such name (Windows), None is returned and the caller uses
    one thread.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
