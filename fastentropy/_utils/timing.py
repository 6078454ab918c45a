"""Time several functions in alternation, so that other load on the machine affects all of them alike."""

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

#: The number of rounds that are measured even if the time budget is exceeded, because quartiles need some samples.
MIN_ROUNDS = 5

#: The first call of a function counts as at most this many times as slow as the calls that follow it.
FIRST_CALLS = 20

#: The number of rounds after which slow functions can drop out.
TRIAL_ROUNDS = 3


def measure_times(
    functions: Mapping[Key, Callable[[], object]],
    *,
    rounds: int = 15,
    round_seconds: float = 0.002,
    graphs_on: torch.device | None = None,
    budget_seconds: float = math.inf,
    slowest: float = math.inf,
) -> dict[Key, float]:
    """Return the median time of one call of each function, in milliseconds. The functions are timed in alternation.

    Args:
        functions: the functions to time, by key.
        rounds: how many samples are taken of each function.
        round_seconds: a sample repeats a short function until it takes about this long.
        graphs_on: the GPU on which each function is captured and replayed as a CUDA graph, or None to call the functions. See
            `measure_samples` for what this requires.
        budget_seconds: as in `measure_samples`.
        slowest: as in `measure_samples`.

    Returns:
        Milliseconds by key.
    """
    samples = measure_samples(
        functions,
        rounds=rounds,
        round_seconds=round_seconds,
        graphs_on=graphs_on,
        budget_seconds=budget_seconds,
        slowest=slowest,
    )
    return {key: statistics.median(values) for key, values in samples.items()}


def measure_samples(
    functions: Mapping[Key, Callable[[], object]],
    *,
    rounds: int,
    round_seconds: float,
    graphs_on: torch.device | None = None,
    budget_seconds: float = math.inf,
    slowest: float = math.inf,
) -> dict[Key, list[float]]:
    """Measure the time of functions in rounds. Each round takes one sample of every function.

    Other load on the machine therefore affects all functions alike, and the samples of one round can be compared in pairs. The
    order of the functions is shuffled in each round, because a function finds the caches as the previous one left them. The
    shuffles are the same in every run. The current accelerator is synchronised before the clock is read.

    Args:
        functions: the functions to time, by key. Each is called without arguments.
        rounds: the number of rounds.
        round_seconds: a sample repeats a short function until it takes about this long, and is the mean of the repeats.
        graphs_on: the GPU on which each function is captured and replayed as a CUDA graph, or None to call the functions. A
            replay excludes the time that Python takes to launch kernels. A captured function must not synchronise with the
            GPU, because the capture would fail, and PyTorch can draw no random numbers after a failed capture.
        budget_seconds: no further round begins after this time. The first `MIN_ROUNDS` rounds are always run.
        slowest: a function is sampled in the first `TRIAL_ROUNDS` rounds only if it then takes more than this many times as
            long as the fastest one.

    Returns:
        By key, a list of the milliseconds of one call, one number per round in which the function was sampled.
    """
    if graphs_on is None:
        return _samples(functions, rounds, round_seconds, budget_seconds, slowest)
    with torch.cuda.device(graphs_on):
        return _samples(_captured(functions), rounds, round_seconds, budget_seconds, slowest)


def _samples(
    functions: Mapping[Key, Callable[[], object]], rounds: int, round_seconds: float, budget_seconds: float, slowest: float
) -> dict[Key, list[float]]:
    """Take the samples of `measure_samples` by calling the functions. The arguments are those of `measure_samples`."""
    repeats = {}
    for key, function in functions.items():
        seconds = measure_seconds(function)
        if seconds < FIRST_CALLS * round_seconds:  # else no warm call repeats within a round either
            seconds = measure_seconds(function)
        repeats[key] = max(1, int(round_seconds / max(seconds, 1e-7)))
    samples: dict[Key, list[float]] = {key: [] for key in functions}
    left, start = list(functions), _clock()
    for index in range(rounds):
        if index >= MIN_ROUNDS and _clock() - start > budget_seconds:
            break
        if index == TRIAL_ROUNDS:
            medians = {key: statistics.median(values) for key, values in samples.items()}
            left = [key for key in functions if medians[key] <= slowest * min(medians.values())]
        for key in random.Random(index).sample(left, len(left)):
            samples[key].append(1e3 * measure_seconds(functions[key], repeats[key]))
    return samples


def _captured(functions: Mapping[Key, Callable[[], object]]) -> Mapping[Key, Callable[[], object]]:
    """Capture each function as a CUDA graph on the current GPU, and return the function that replays the graph, by key.

    `torch.cuda.graph` is not used, because it also runs Python's garbage collector, which is slow.
    """
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
    """Return the mean time of `repeats` calls in seconds, including the work that they launched on an accelerator."""
    start = _clock()
    for _ in range(repeats):
        function()
    return (_clock() - start) / repeats


def _clock() -> float:
    """Wait until the current accelerator has finished all its work, then return the clock in seconds."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
