"""The fixture of all suites, which times an operation with pytest-benchmark and compares its bandwidth with that of a copy."""

import statistics

import pytest
import torch

from fastentropy._utils.timing import measure_samples
from fastentropy.benchmarks.measurements import skip_reason


@pytest.fixture
def measured(benchmark):
    """Return a function `measured(case, operation)`, which times an operation of a case with pytest-benchmark.

    A call of the operation includes a synchronisation with the GPU. The extra information of the benchmark holds the facts of
    the case about the operation. If the case has a roof (an operation that reaches the highest bandwidth), it also holds the
    bytes that the operation moves, its GB/s, and its percentage of the roof's bandwidth, which is measured just before. The
    test is skipped if the operation is a baseline that raises.

    Args:
        benchmark: the fixture of pytest-benchmark.
    """

    def run(case, operation):
        call = case.operations[operation]
        if operation in case.baselines and (reason := skip_reason(call)):
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
