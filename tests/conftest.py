"""The order of the tests, and fixtures that tests of several folders use."""

import os
import random
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from fastentropy.fusion import FusionReport
from fastentropy.fusion.latency import profiler
from fastentropy.fusion.planner import counted
from fastentropy.sites import activations
from tests._helpers.networks import Residual

# The first example of a test pays for imports and compilation.
hypothesis.settings.register_profile("fastentropy", deadline=None)
hypothesis.settings.load_profile("fastentropy")


# Processes that share the cores must not wait for each other's threads.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items):
    """Put the longest tests first, so that no process runs them at the end while the others have nothing left to do."""
    items.sort(key=lambda item: item.name != "test_in_the_interpreter")


@pytest.fixture(autouse=True)
def _same_beginning():
    """Let each test begin alike, whatever ran before: with the same random numbers, without compiled code or registrations.

    Code of PyTorch that many models share, such as the forward pass of `nn.Linear`, is else compiled anew for each, and
    after eight times no longer.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        for table in ("_MODULES", "_REGISTERED_FUNCTIONS"):
            monkeypatch.setattr(activations, table, dict(getattr(activations, table)))
        yield


@pytest.fixture
def drawn():
    """Return a random number generator with a new seed. The seed is printed, so that pytest shows it if the test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def server():
    """Start a `Server`, which runs the ranks of calibrations. All tests of a process share it."""
    from tests.calibration import cases  # transformers takes seconds to import

    server = cases.Server()
    yield server
    server.stop()


@pytest.fixture
def network():
    """Return a `Residual` with random batch-norm parameters and statistics. It is in training mode, as a new module is."""
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def images():
    """Return a batch of inputs for `network`."""
    return torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def counted_costs(monkeypatch):
    """Replace the times of a network and of its parts by counted costs, so that the same sites pay in every run."""

    def fuse_by_counting(model, example_inputs):
        times = {"original": 2e9, "folded": 2e9, "fused": 1e9}
        report = FusionReport((), times, dict.fromkeys(times, "contiguous"), "fused", 0.0)
        return SimpleNamespace(report=report)

    monkeypatch.setattr(profiler, "_times", counted)
    monkeypatch.setattr(profiler, "fuse", fuse_by_counting)
