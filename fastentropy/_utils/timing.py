"""Timing of functions side by side, on a machine that is never quite idle."""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

#: Rounds that are measured whatever the budget, so that there are quartiles.
MIN_ROUNDS = 5


def measure_times(
    functions: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 15,
    round_seconds: float = 0.002,
    graphs_on: torch.device | None = None,
) -> dict[Key, float]:
    """Return the milliseconds of one call of each function: the medians of `measure_samples`, which describes the arguments."""
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
    """Measure functions in rounds, each of which runs all of them in turn.

    Other load on the machine thus affects all functions alike, and the samples of one round are paired. Each round has its own
    order, the same in every run, since a function leaves caches and memory to the next one. The current accelerator is
    synchronised before the clock is read.

    Args:
        functions: the functions to time, by a key.
        rounds: the number of rounds.
        round_seconds: a round repeats a short function until it takes about this long.
        graphs_on: the GPU on which the functions run as CUDA graphs, which leaves out the time that Python takes to launch the
            work; None for plain calls. The functions must never wait for the GPU: after a failed capture PyTorch can no longer
            draw random numbers.
        budget_seconds: after this time no further round begins, except the first `MIN_ROUNDS`.

    Returns:
        The milliseconds of one call in each round, by key.
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
        if index >= MIN_ROUNDS and _clock() - start > budget_seconds:
            break
        for key in random.Random(index).sample(list(functions), len(functions)):
            samples[key].append(1e3 * measure_seconds(functions[key], repeats[key]))
    return samples


def _captured(functions: Mapping[Key, Callable[[], object]]) -> Mapping[Key, Callable[[], object]]:
    """Return the replay of each function's CUDA graph. `torch.cuda.graph` would also collect garbage, which is slow."""
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
    """Return the mean seconds of a number of calls, including the work they launched on an accelerator."""
    start = _clock()
    for _ in range(repeats):
        function()
    return (_clock() - start) / repeats


def _clock() -> float:
    """Return the time in seconds, after all work on the accelerator is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
