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
    """Return the peak bytes of tensors during a call: on a GPU of all tensors, on a CPU of those that the call made."""
    function()
    gc.collect()  # the next call is not charged for garbage of this one
    if device.type == "cpu":
        return _peak_on_cpu(function)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return int(torch.cuda.max_memory_allocated(device))


def _peak_on_cpu(function: Callable[[], object]) -> int:
    """Return the peak of PyTorch's allocator, from the allocations and releases in the profiler's trace.

    Releases of older blocks are left out. Memory that an operator takes directly from the system is not seen.
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
    """Discard the messages that the C++ of the profiler writes to stderr."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
