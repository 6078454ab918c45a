"""What compiles the frames of a thread, and frames that are never compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

from torch._C._dynamo import eval_frame as _frames

from fastentropy._compat.lookup import attribute, named

#: What compiles the frames of a thread: a function of Dynamo. None if frames run as they are, False if only code that was
#: compiled before runs.
Compiler = Callable[..., Any] | bool | None

#: Return what compiles the frames that this thread runs. It is the function of PyTorch, since it runs in each call of a module.
current_compiler: Callable[[], Compiler] = attribute(_frames, "get_eval_frame_callback")
#: Let frames of this thread be compiled by something else from now on, and return what compiled them before.
set_compiler: Callable[[Compiler], Compiler] = attribute(_frames, "set_eval_frame")


class _Compiling(threading.local):
    """Whether a thread is compiling a frame."""

    now = False


_COMPILING = _Compiling()


@contextmanager
def compiling() -> Iterator[None]:
    """Let `is_compiling_here` return True in this thread inside the block."""
    before, _COMPILING.now = _COMPILING.now, True
    try:
        yield
    finally:
        _COMPILING.now = before


def is_compiling_here() -> bool:
    """Return whether this thread is compiling a frame that `CompilerWith` compiles."""
    return _COMPILING.now


def never_compile(*codes: CodeType) -> None:
    """Let frames of these codes run as they are. What they call is compiled as before."""
    for code in codes:
        named("torch._dynamo.eval_frame", "skip_code")(code)


def run_as_it_is() -> None:
    """Let the function of torch.compile that is being called run as it is, without an error if it needs to be one graph."""
    set_count = getattr(_frames, "set_fullgraph_compiled_frame_count", None)  # new in PyTorch 2.14
    if set_count is not None:
        set_count(-1)  # its frames are not counted
