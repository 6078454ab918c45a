"""Timing of functions in rounds, with a clock that the tests control."""

import itertools

import pytest
import torch

from fastentropy._utils import timing


@pytest.fixture
def clock(monkeypatch):
    """Return the seconds of a clock that functions of a test advance."""
    now = [0.0]
    monkeypatch.setattr(timing, "_clock", lambda: now[0])
    return now


def takes(clock, seconds, calls=None, name=""):
    """Return a function that takes a number of seconds, or the next of a list of them."""
    times = iter(seconds) if isinstance(seconds, list) else itertools.repeat(seconds)

    def call():
        clock[0] += next(times)
        if calls is not None:
            calls.append(name)

    return call


def test_times_are_medians_in_milliseconds(clock):
    disturbed = [0.003] * 7 + [0.3] * 4
    times = timing.measure_times({"a": takes(clock, disturbed), "b": takes(clock, 0.005)}, rounds=9)
    assert times == {"a": pytest.approx(3.0), "b": pytest.approx(5.0)}


def test_each_round_runs_all_functions_in_its_own_order(clock):
    calls = []
    functions = {name: takes(clock, 0.01, calls, name) for name in "abc"}
    timing.measure_samples(functions, rounds=30, round_seconds=0.001)
    rounds = ["".join(calls[start : start + 3]) for start in range(len(calls) - 90, len(calls), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) == 6


def test_short_functions_are_repeated_to_fill_a_round(clock):
    calls = []
    times = timing.measure_times({"a": takes(clock, 1e-5, calls)}, rounds=3, round_seconds=1e-3)
    assert times["a"] == pytest.approx(0.01)
    assert len(calls) == pytest.approx(2 + 3 * 100, abs=3)


@pytest.mark.parametrize(("budget", "rounds"), [(0, 5), (7.5, 8), (100, 20)])
def test_rounds_stop_after_the_budget(clock, budget, rounds):
    samples = timing.measure_samples({"a": takes(clock, 1.0)}, rounds=20, round_seconds=0.001, budget_seconds=budget)
    assert len(samples["a"]) == rounds


@pytest.mark.parametrize("warmup", [[0.015, 0.005], [9.0]])
def test_warmup_calls_are_not_sampled(clock, warmup):
    samples = timing.measure_samples({"a": takes(clock, [*warmup, 0.001, 0.002])}, rounds=2, round_seconds=0.001)
    assert samples == {"a": [pytest.approx(1), pytest.approx(2)]}


@pytest.mark.gpu
def test_cuda_graph_is_replayed_instead_of_its_function():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    counts, calls = torch.zeros((), dtype=torch.int64, device="cuda"), []
    timing.measure_samples({"a": lambda: (calls.append(1), counts.add_(1))}, rounds=2, round_seconds=0, graphs_on=counts.device)
    assert len(calls) == 3
    assert counts == 2 + 2 + 2
