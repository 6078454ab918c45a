"""What PyTorch takes for granted may be changed: results do not depend on the default device, nor on the default dtype."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastentropy as fe
import fastentropy_kernels as kernels
from tests._helpers.tensors import assert_same

DEVICES = ["meta"]
DTYPES = [torch.float64, torch.float16, torch.bfloat16]


class Net(nn.Module):
    """A network with a convolution, a function and a padding mask, so that each way of counting is taken."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.pointwise, self.other = nn.Conv2d(6, 6, 1), nn.SiLU()
        self.fc, self.gelu, self.head = nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(x)))
        x = self.other(self.pointwise(x)).mean([2, 3])
        return self.head(self.gelu(self.fc(x)).relu())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act = nn.Linear(4, 7), nn.GELU()

    def forward(self, x, attention_mask=None):
        return self.act(self.up(x))


@pytest.fixture
def given():
    """Models and inputs, made before the defaults are changed."""
    torch.manual_seed(0)
    return {
        "net": (net := Net().eval()),
        "isolated": fe.isolate(net, (torch.zeros(1, 3, 8, 8),)),
        "images": torch.randn(2, 3, 8, 8),
        "tokens": Tokens().eval(),
        "embeddings": torch.randn(3, 5, 4),
        "mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]),
        "rows": torch.randn(37, 6),
        "counts": torch.zeros(6, 3, dtype=torch.int64),
    }


def fields(statistics):
    return {name: (site.counts, site.nan, site.entropy(), site.batch_entropies) for name, site in statistics.items()}


def collect(given, folder):
    model, results = given["net"], []
    with torch.no_grad(), fe.collect(model, average="batch") as collector:
        for _ in range(4):
            results.append(model(given["images"]))
    return results, fields(collector.compute()), str(collector.compute()), collector.compute().layer_entropy(average="batch")


def collect_in_training(given, folder):
    model = copy.deepcopy(given["net"]).train()
    with fe.collect(model) as collector:
        model(given["images"]).sum().backward()
    return fields(collector.sync()), [parameter.grad for parameter in model.parameters()]


def collect_padded(given, folder):
    with torch.no_grad(), fe.collect(given["tokens"]) as collector:
        for _ in range(3):
            y = given["tokens"](given["embeddings"], attention_mask=given["mask"])
    return y, fields(collector.compute())


def save_and_load(given, folder):
    collector = fe.collect(given["net"], average="batch")
    collector.update(given["images"])
    collector.compute().save(folder / "statistics")
    other = fe.collect(given["net"], average="batch")
    other.load_state_dict(collector.state_dict())
    other.update(given["images"])
    loaded = fe.Statistics.load(folder / "statistics")
    return fields(loaded), fields(loaded + other.compute()), loaded.to_dict("on")


def find_sites(given, folder):
    return fe.find_sites(given["net"], (given["images"],))


def isolate(given, folder):
    isolated = fe.isolate(given["net"], (given["images"],))
    return [name for name, _ in isolated.named_modules()], isolated(given["images"]).detach()


def linearize(given, folder):
    model = copy.deepcopy(given["net"])
    fe.linearize(model, ["relu", "other"])
    return model(given["images"]).detach()


def prune(given, folder):
    def calibrate(model):
        model(given["images"])

    result = fe.prune(
        given["isolated"],
        train=lambda model: None,
        evaluate=lambda model: 1.0,
        calibrate=calibrate,
        example_inputs=(given["images"],),
        max_removed=2,
        checkpoint_dir=folder / "pruned",
    )
    return result.removed, [step.layer_entropy for step in result.steps], result.model(given["images"]).detach()


def prune_at_random(given, folder):
    torch.manual_seed(7)
    result = fe.prune(
        given["isolated"],
        train=lambda model: None,
        evaluate=lambda model: 1.0,
        calibrate=lambda model: model(given["images"]),
        example_inputs=(given["images"],),
        criterion="random",
        max_removed=1,
    )
    return result.removed


def fuse(given, folder):
    model = copy.deepcopy(given["net"])
    fe.linearize(model, ["relu", "other"])
    fused = fe.fuse(model, (given["images"],), measure=False)
    fused.save(folder / "fused.pt2")
    return [fe.load(folder / "fused.pt2")(given["images"]).detach(), fused(given["images"]).detach()]


def count_states(given, folder):
    counts, nan = given["counts"].clone(), given["counts"][:, 0].clone()
    for impl in ("numba", "reference", "auto"):
        kernels.count_states(given["rows"], counts, nan=nan, impl=impl)
    kernels.count_states(given["rows"].double(), counts, nan=nan)
    histogram = torch.cat([given["counts"], given["counts"][:, :1]], 1)
    for impl in ("numba", "reference"):
        kernels.count_states(given["rows"], histogram, edges=[-1.5, 0.1, 0.7], impl=impl)
    return counts, nan, histogram


def activation_states(given, folder):
    x, counts, results = given["rows"], given["counts"].clone(), []
    for name in ("relu", "gelu", "leaky_relu", "softplus", "silu"):
        for impl in ("numba", "reference"):
            results.append(kernels.activation_states(x, counts, name, impl=impl))
    needs_grad = x.clone().requires_grad_()
    kernels.activation_states(needs_grad, counts, "gelu").sum().backward()
    plan = kernels.plan_activation_states(x, counts, "relu")
    results.append(plan(x) if plan.fits(x) else None)
    return results, counts, needs_grad.grad


def chains(given, folder):
    x, w = given["images"], given["net"].conv.weight.detach()
    pointwise = given["net"].pointwise.weight.detach()
    rows = given["rows"]
    return (
        kernels.conv_pointwise(x, w, None, pointwise, None, impl="reference"),
        kernels.linear_pair(rows, rows[:5], None, rows[:7, :5].contiguous(), None, impl="reference"),
    )


FUNCTIONS = [
    collect, collect_in_training, collect_padded, save_and_load, find_sites, isolate, linearize, prune, prune_at_random,
    pytest.param(fuse, marks=pytest.mark.slow), count_states, activation_states, chains,
]  # fmt: skip

#: The functions of PyTorch that make a tensor on the default device if they are not told another.
FACTORIES = [
    torch.arange, torch.as_tensor, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace,
    torch.logspace, torch.normal, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm, torch.scalar_tensor,
    torch.tensor, torch.tril_indices, torch.triu_indices, torch.zeros,
]  # fmt: skip


@pytest.fixture
def changed():
    """Change the default device or the default dtype, until the test ends."""

    def change(default):
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)

    yield change
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [*DEVICES, *DTYPES], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.*fe.isolate")
def test_results_do_not_depend_on_defaults(function, default, given, changed, tmp_path):
    (tmp_path / "expected").mkdir()
    (tmp_path / "actual").mkdir()
    expected = function(given, tmp_path / "expected")
    changed(default)
    actual = function(given, tmp_path / "actual")
    changed(None)
    changed(torch.float32)
    assert_equal(actual, expected)


SOURCES = sorted(path for package in (fe, kernels) for path in Path(package.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_every_tensor_is_made_on_a_device_by_name(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {f"torch.{factory.__name__}" for factory in FACTORIES}
    made = [call for call in calls if ast.unparse(call.func) in names]
    assert [ast.unparse(call) for call in made if "device" not in [keyword.arg for keyword in call.keywords]] == []


def assert_equal(actual, expected):
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_equal(*pair)
    elif isinstance(expected, Tensor):
        assert (actual.dtype, actual.device) == (expected.dtype, expected.device)
        assert_same(actual, expected)
    else:
        assert actual == expected
