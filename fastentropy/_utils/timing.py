"""Time functions against each other on a machine that is never quite idle."""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

#: What quartiles take.
FEWEST_ROUNDS = 5


def measure_times(
    functions: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 15,
    round_seconds: float = 0.002,
    graphs_on: torch.device | None = None,
) -> dict[Key, float]:
    """The time of one call of each function in milliseconds: the median of `measure_samples`, whose arguments these are."""
    samples = measure_samples(functions, rounds=rounds, round_seconds=round_seconds, graphs_on=graphs_on)
    return {key: statistics.median(values) for key, values in samples.items()}


def measure_samples(
    functions: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    round_seconds: float,
    graphs_on: torch.device | None = None,
    budget_seconds: float = math.inf,
) -> dict[Key, list[float]]:
    """The milliseconds of one call of each function in each of so many rounds, which run all of them in turns.

    What else the machine does falls on all of them alike then, and the samples of one round are pairs. Each round has an order
    of its own, the same in every run, since a function leaves caches and memory to the next one. A round repeats a short
    function until it fills `round_seconds`. No round but the first `FEWEST_ROUNDS` begins after `budget_seconds`. The present
    accelerator is synchronised before the clock is read. graphs_on: the GPU on which they run as CUDA graphs, which leaves out
    how long Python takes to ask for the work; for functions that never wait for the GPU, since after a capture that fails
    PyTorch draws no random numbers any more.
    """
    if graphs_on is None:
        return _samples(functions, rounds, round_seconds, budget_seconds)
    with torch.cuda.device(graphs_on):
        return _samples(_captured(functions), rounds, round_seconds, budget_seconds)


def _samples(
    functions: Mapping[Key, Callable[[], object]], rounds: int, round_seconds: float, budget_seconds: float
) -> dict[Key, list[float]]:
    repeats = {}
    for key, function in functions.items():
        function()
        repeats[key] = max(1, int(round_seconds / max(measure_seconds(function), 1e-7)))
    samples: dict[Key, list[float]] = {key: [] for key in functions}
    start = _clock()
    for index in range(rounds):
        if index >= FEWEST_ROUNDS and _clock() - start > budget_seconds:
            break
        for key in random.Random(index).sample(list(functions), len(functions)):
            samples[key].append(1e3 * measure_seconds(functions[key], repeats[key]))
    return samples


def _captured(functions: Mapping[Key, Callable[[], object]]) -> Mapping[Key, Callable[[], object]]:
    """The replays of the functions' CUDA graphs. `torch.cuda.graph` collects garbage for each, which takes longer than that."""
    replays = {}
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
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
