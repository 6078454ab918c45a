"""Small networks that several test modules use."""

import os
import random
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from torch import Tensor, nn

from fastentropy.fusion import FusionReport, profiling
from fastentropy.fusion.plan import counted

# The first example of a test pays for imports and compilation.
hypothesis.settings.register_profile("fastentropy", deadline=None)
hypothesis.settings.load_profile("fastentropy")


#: The integers that a floating dtype is seen as.
INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def random_values(shape, dtype, seed=0):
    """Every bit pattern is as likely as any other, but for zeros of both signs, which are every eighth value."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(INTEGER[dtype])
    x = torch.randint(limits.min, limits.max + 1, shape, generator=generator).to(INTEGER[dtype]).view(dtype)
    zeros = torch.rand(shape, generator=generator)
    return x.masked_fill(zeros < 0.06, 0.0).masked_fill(zeros > 0.94, -0.0)


def bits(x):
    """The bits of a tensor: -0.0 is not 0.0, and one NaN is as good as another (PyTorch changes their payload)."""
    return x.masked_fill(x.isnan(), torch.nan).contiguous().view(INTEGER[x.dtype])


# Processes that share the cores must not wait for each other's threads.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


class Residual(nn.Module):
    """A network with everything the loop meets: convolutions, batch norm, a residual addition, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 6, 1)
        self.bn2 = nn.BatchNorm2d(6)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(6 * 5 * 5, 8)
        self.gelu = nn.GELU()
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)) + x)
        return self.fc2(self.gelu(self.fc1(x.flatten(1))))


class Reads(nn.Module):
    """A network given as a function of itself and its inputs; its modules are attributes."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs):
        return self._function(self, *inputs)


@pytest.fixture
def drawn():
    """Random numbers of another seed each time, which is printed where a test fails."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def server():
    """What forks the ranks of calibrations; one for all tests of a process."""
    import calibration_cases  # transformers takes seconds to import

    server = calibration_cases.Server()
    yield server
    server.stop()


@pytest.fixture
def network():
    """A `Residual` with odd batch-norm statistics, in training mode as a new module is."""
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
    """Inputs of `network`."""
    return torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def counted_costs(monkeypatch):
    """Counted costs stand for the times of a network and of its parts, so that the same sites pay at every run."""

    def fuse_by_counting(model, example_inputs):
        times = {"original": 2e9, "folded": 2e9, "fused": 1e9}
        report = FusionReport((), times, dict.fromkeys(times, "contiguous"), "fused", 0.0)
        return SimpleNamespace(report=report)

    monkeypatch.setattr(profiling, "_times", counted)
    monkeypatch.setattr(profiling, "fuse", fuse_by_counting)


def snapshot(model):
    """All that a user could see of a model: weights, modules and their order, modes, hooks and attributes."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
    )


def assert_unchanged(model, before):
    """Raise where `snapshot(model)` is not what it was."""
    weights, modules, hooks = snapshot(model)
    assert (modules, hooks) == before[1:]
    assert list(weights) == list(before[0])
    assert all(torch.equal(value, before[0][name]) for name, value in weights.items())
