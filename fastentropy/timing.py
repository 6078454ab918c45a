"""Time functions against each other on a machine that is never quite idle."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)


def measure_times(
    functions: Mapping[Key, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 15,
    round_seconds: float = 0.002,
) -> dict[Key, float]:
    """The time of one call of each function in milliseconds: the median over interleaved rounds.

    Interleaving lets what else the machine does fall on all of them alike. A round repeats a short function until it fills
    `round_seconds`. An accelerator is synchronised before the clock is read. On a GPU the functions run as CUDA graphs, which
    leaves out how long Python takes to ask for the work; as they are, where one of them cannot be captured.
    """
    if device.type == "cuda":
        functions = _captured(functions, device)
    repeats = {}
    for key, function in functions.items():
        function()
        repeats[key] = max(1, int(round_seconds / max(_seconds(function, 1), 1e-7)))
    samples: dict[Key, list[float]] = {key: [] for key in functions}
    for _ in range(rounds):
        for key, function in functions.items():
            samples[key].append(_seconds(function, repeats[key]))
    return {key: 1e3 * statistics.median(values) for key, values in samples.items()}


def _captured(functions: Mapping[Key, Callable[[], object]], device: torch.device) -> Mapping[Key, Callable[[], object]]:
    """The replays of all functions' CUDA graphs, or the functions themselves."""
    try:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            graphs = {key: _capture(function) for key, function in functions.items()}
    except RuntimeError:  # as where a function waits for the GPU
        return functions
    return {key: graph.replay for key, graph in graphs.items()}


def _capture(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The graph of a call. `torch.cuda.graph` collects garbage each time, which takes longer than all the rest."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        function()
    finally:
        graph.capture_end()
    return graph


def _seconds(function: Callable[[], object], repeats: int) -> float:
    start = _clock()
    for _ in range(repeats):
        function()
    return (_clock() - start) / repeats


def _clock() -> float:
    """Seconds, once everything that was asked of an accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
