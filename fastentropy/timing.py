"""Time functions against each other on a machine that is never quite idle."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def measure_times(
    functions: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 15,
    round_seconds: float = 0.002,
    graphs_on: torch.device | None = None,
) -> dict[Key, float]:
    """The time of one call of each function in milliseconds: the median over interleaved rounds.

    Interleaving lets what else the machine does fall on all of them alike. A round repeats a short function until it fills
    `round_seconds`. An accelerator is synchronised before the clock is read. graphs_on: the GPU on which they run as CUDA
    graphs, which leaves out how long Python takes to ask for the work; for functions that never wait for the GPU, since after a
    capture that fails PyTorch draws no random numbers any more.
    """
    if graphs_on is not None:
        functions = _captured(functions, graphs_on)
    repeats = {}
    for key, function in functions.items():
        function()
        repeats[key] = max(1, int(round_seconds / max(measure_seconds(function), 1e-7)))
    samples: dict[Key, list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            samples[key].append(measure_seconds(function, repeats[key]))
    return {key: 1e3 * statistics.median(values) for key, values in samples.items()}


def _captured(functions: Mapping[Key, Callable[[], object]], device: torch.device) -> Mapping[Key, Callable[[], object]]:
    """The replays of the functions' CUDA graphs. `torch.cuda.graph` collects garbage for each, which takes longer than that."""
    replays = {}
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for key, function in functions.items():
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            try:
                function()
            finally:
                graph.capture_end()
            replays[key] = graph.replay
    return replays


def measure_seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """The mean time of so many calls, to the end of what they asked of an accelerator."""
    start = _clock()
    for _ in range(repeats):
        function()
    return (_clock() - start) / repeats


def _clock() -> float:
    """Seconds, once everything that was asked of an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
