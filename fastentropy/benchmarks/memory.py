"""The peak memory of a call."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the peak number of bytes of tensors during a call.

    Args:
        function: the function to measure. It is called twice, and the second call is measured.
        device: the device on which the function allocates tensors.

    Returns:
        On a GPU, the peak of all tensors on the device. On a CPU, the peak of the tensors that the call itself allocated.
    """
    function()
    gc.collect()  # so that garbage of the first call does not count for the second one
    if device.type == "cpu":
        return _peak_on_cpu(function)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return int(torch.cuda.max_memory_allocated(device))


def _peak_on_cpu(function: Callable[[], object]) -> int:
    """Return the peak number of bytes that PyTorch's CPU allocator holds during a call of the function.

    The allocations and releases are read from the trace of PyTorch's profiler. Releases of blocks that are older than the call
    are ignored. Memory that an operator allocates directly from the operating system is not in the trace.
    """
    with _no_messages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    blocks: dict[int, int] = {}
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            blocks[address] = size
            held += size
            peak = max(peak, held)
        else:
            held -= blocks.pop(address, 0)
    return peak


@contextlib.contextmanager
def _no_messages() -> Iterator[None]:
    """Discard everything that is written to stderr during the `with` block, because the C++ code of the profiler logs to it."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
