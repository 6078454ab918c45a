"""Run functions of our own in place of operators, and find the code that calls them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch

from fastentropy._compat.frames import is_compiling_here, never_compile, set_compiler
from fastentropy._compat.lookup import named

# A dispatch key that no part of PyTorch uses. Its kernels run, and cost something, only in a thread that includes the key.
_INTERCEPTED = "TESTING_ONLY_GenericMode"
_libraries: list[torch.library.Library] = []  # a library takes its kernels back when it is deleted


@functools.cache
def _intercepted_key() -> Any:
    """Return the dispatch key of the kernels that intercept operators."""
    return named("torch._C", "_dispatch_key_parse")(_INTERCEPTED)


@functools.cache
def _intercepted_keys() -> Any:
    """Return the set with only this dispatch key."""
    return named("torch._C", "DispatchKeySet")(_intercepted_key())


@functools.cache
def intercept_operators(operators: tuple[Any, ...], run: Callable[..., Any]) -> None:
    """Let `run(operator, args, kwargs)` run in place of some ATen operators, in threads that are `set_intercepting`.

    A TorchFunctionMode would see every function and cost microseconds for each. Here all other operators cost nothing. An
    operator is intercepted wherever it is called, also in C++ and in functions that TorchScript has compiled.

    Args:
        operators: overloads of operators, such as `torch.ops.aten.relu_.default`.
        run: the function that runs in their place. Nothing is intercepted while it runs.
    """
    _leave_other_operators_alone()
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)

    def kernel(operator: Any) -> Callable[..., Any]:
        def intercepted(*args: Any, **kwargs: Any) -> Any:
            if is_compiling_here():  # not with the key excluded: what is compiled depends on the keys that are included
                with without_intercepting():
                    return operator(*args, **kwargs)
            compiler = set_compiler(None)  # between two graphs of a compiled model
            try:
                with without_intercepting():
                    return run(operator, args, kwargs)
            finally:
                if compiler is not None:
                    set_compiler(compiler)

        never_compile(intercepted.__code__)
        return intercepted

    for operator in operators:
        library.impl(operator, kernel(operator), _INTERCEPTED)


@functools.cache
def _leave_other_operators_alone() -> None:
    """Let operators without a kernel under the dispatch key run as if there were no such key, higher-order operators too."""
    named("torch._ops", "_HIGHER_ORDER_OP_DEFAULT_FALLTHROUGH_DISPATCH_KEYS").append(_intercepted_key())
    for operator in named("torch._ops", "_higher_order_ops").values():
        operator.fallthrough(_intercepted_key())
    library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    library.fallback(torch.library.fallthrough_kernel, _INTERCEPTED)
    _libraries.append(library)


def set_intercepting(is_on: bool) -> None:
    """Intercept operators in this thread from now on (see `intercept_operators`), or no longer."""
    named("torch._C", "_dispatch_tls_set_dispatch_key_included")(_intercepted_key(), is_on)


def without_intercepting() -> AbstractContextManager[object]:
    """Return a context in which this thread intercepts no operators."""
    guard: AbstractContextManager[object] = _guard_without_key()()
    return guard


@functools.cache
def _guard_without_key() -> Callable[[], Any]:
    """Return the function that makes such a context."""
    return functools.partial(named("torch._C", "_ExcludeDispatchKeyGuard"), _intercepted_keys())


#: Return the stack frame that lies a number of calls above this one. `inspect.stack` would read source files.
stack_frame: Callable[[int], FrameType] = sys._getframe
