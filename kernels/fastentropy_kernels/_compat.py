"""The private names of PyTorch, of Triton and of the C library that the kernels use, each wrapped in one function.

A release may drop a private name. The functions for PyTorch and Triton then raise RuntimeError, because any default answer
could lead to wrong counts without an error. `openmp_parallel` returns None, and its caller then runs on one thread: the counts
are right, and the user is told on Linux, where the name is always there.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

_logger = logging.getLogger(__name__)


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
    except (AttributeError, OSError, TypeError) as error:
        if sys.platform.startswith("linux"):
            _logger.warning("fastentropy finds no OpenMP in this process (%s): its CPU kernels run on one thread", error)
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@contextmanager
def triton_driver(driver: Any) -> Iterator[None]:
    """Make `driver` the active driver of Triton inside the block, and the one before it afterwards.

    Triton has a public method that sets the active driver. Its public property that returns it fails without a GPU.

    Args:
        driver: an object with the methods of a Triton driver that the block uses.

    Raises:
        RuntimeError: this release of Triton lacks the private name of the active driver.
    """
    import triton

    config = triton.runtime.driver
    try:
        before = config._active
    except AttributeError as error:
        raise RuntimeError(f"Triton {triton.__version__} no longer tells which driver is active ({error})") from error
    config.set_active(driver)
    try:
        yield
    finally:
        config.set_active(before)
