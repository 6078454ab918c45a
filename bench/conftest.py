"""What the suites share: a measured call that is synchronised, with its bandwidth beside that of a copy."""

import statistics

import pytest
import torch

from fastentropy._utils.timing import measure_samples
from fastentropy.benchmarks.measurements import why_not


@pytest.fixture
def measured(benchmark):
    """Return measured(case, operation): run it under pytest-benchmark, to the end of what it asks of a GPU.

    In the extra information are the facts of the case; where the case has a roof, the bytes that the operation moves, its GB/s
    and its percentage of the bandwidth that the roof reached just before. A peer that does not run here is skipped.
    """

    def run(case, operation):
        call = case.operations[operation]
        if operation in case.peers and (reason := why_not(call)):
            pytest.skip(f"{operation} does not run here: {reason}")
        synchronise = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
        benchmark.group = case.name
        benchmark.extra_info.update(case.facts.get(operation, {}))
        roof = case.roof and measure_samples({"roof": case.operations[case.roof]}, rounds=5, round_seconds=0.005)["roof"]
        benchmark.pedantic(lambda: (call(), synchronise()), rounds=10, warmup_rounds=2)
        if roof and benchmark.stats:
            speed = case.sizes[operation] / benchmark.stats.stats.median / 1e9
            speed_of_roof = case.sizes[case.roof] / statistics.median(roof) / 1e6
            percentage = 100 * speed / speed_of_roof
            figures = {"bytes": case.sizes[operation], "gigabytes_per_second": speed, "percent_of_copy": percentage}
            benchmark.extra_info.update(figures)

    return run
