import copy
import itertools
import json
import math
import shutil
import threading
from collections import OrderedDict
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from fastentropy import FusedModel, collect, find_sites, fuse, isolate, linearize, prune
from fastentropy.sites.activations import activation_modules
from tests._helpers.networks import Residual
from tests._helpers.snapshots import assert_unchanged, snapshot

DATA = torch.randn(32, 1, 5, 5, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(32) % 3


def train(model):
    """A few steps that draw from torch's default generator, as a shuffling loader does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for batch in torch.randperm(32).split(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(DATA[batch]), LABELS[batch]).backward()
        optimizer.step()


def evaluate(model):
    return -float(nn.functional.cross_entropy(model(DATA), LABELS))


def calibrate(model):
    for batch in DATA.split(8):
        model(batch)


def run(model, **options):
    defaults = {"train": train, "evaluate": evaluate, "calibrate": calibrate, "max_drop": 10.0}
    return prune(model, example_inputs=(DATA[:2],), **{**defaults, **options})


class Saturated(nn.Module):
    """Four activations whose entropies have a known order: the larger the offset, the larger the share of `on` inputs."""

    OFFSETS = (0.5, 3.0, 0.0, 1.0)

    def __init__(self):
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in self.OFFSETS)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x.flatten(1) * self.weight
        return sum(relu(x + offset) for relu, offset in zip(self.relus, self.OFFSETS, strict=True))


def test_removals_in_order_of_entropy():
    torch.manual_seed(0)
    result = run(Saturated(), train=lambda model: None, evaluate=lambda model: 1.0)
    assert result.removed == ("relus.1", "relus.3", "relus.0", "relus.2")
    assert [step.removed for step in result.steps] == [(), *((name,) for name in result.removed)]
    assert result.steps[-1].layer_entropy == {}


@pytest.mark.slow
def test_each_step_evaluates_the_linearised_network(network):
    """The loop trains and evaluates the dense architecture with identities, and nothing else."""
    seen = []

    def record(model):
        seen.append(copy.deepcopy(model))
        return 1.0

    result = run(network, evaluate=record)
    removed = []
    for step, model in zip(result.steps, seen, strict=True):
        removed += step.removed
        expected = Residual().eval()
        linearize(expected, removed)
        expected.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(DATA), expected(DATA))


def test_evaluates_the_dense_model_before_training(network):
    calls = []
    run(network, train=lambda m: calls.append("train"), evaluate=lambda m: calls.append("evaluate") or 1.0, max_removed=1)
    assert calls == ["evaluate", "train", "evaluate"]


def test_modes_and_gradients_of_the_functions(network):
    seen = []

    def note(name):
        return lambda model: seen.append((name, model.training, torch.is_grad_enabled()))

    def score(model):
        note("evaluate")(model)
        return 1.0

    def forward(model):
        note("calibrate")(model)
        calibrate(model)

    run(network, train=note("train"), evaluate=score, calibrate=forward, max_removed=1)
    assert seen[2:] == [("train", True, True), ("evaluate", False, False), ("calibrate", False, False)]


def test_stops_at_max_drop_and_keeps_the_step_before(network):
    scores = iter([0.90, 0.91, 0.85, 0.99])
    result = run(network, evaluate=lambda model: next(scores), max_drop=0.04)
    assert [step.score for step in result.steps] == [0.90, 0.91, 0.85]
    assert (result.kept_step, len(result.removed)) == (1, 1)
    kinds = {name: type(module) for name, module in result.model.named_modules()}
    assert kinds[result.removed[0]] is nn.Identity
    assert kinds[result.steps[2].removed[0]] is not nn.Identity


def test_a_drop_of_exactly_max_drop_is_allowed(network):
    scores = iter([0.3, 0.2, 0.0])
    assert run(network, evaluate=lambda model: next(scores), max_drop=0.1).kept_step == 1


def test_kept_model_has_the_evaluated_weights(network):
    scores = {}

    def record(model):
        value = evaluate(model)
        scores[value] = copy.deepcopy(model.state_dict())
        return value

    result = run(network, evaluate=record)
    state = result.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in scores[result.steps[result.kept_step].score].items())
    assert not result.model.training


def test_given_model_unchanged(network):
    before = snapshot(network)
    run(network)
    assert_unchanged(network, before)


def test_all_removals_in_one_step(network):
    result = run(network, max_removed=3, per_step=3, evaluate=lambda model: 1.0)
    assert [len(step.removed) for step in result.steps] == [0, 3]


def test_protected_sites_stay():
    result = run(Saturated(), train=lambda model: None, evaluate=lambda model: 1.0, protect=["relus.3", "relus.1"])
    assert result.removed == ("relus.0", "relus.2")
    assert set(result.steps[-1].layer_entropy) == {"relus.1", "relus.3"}


class Constant(Saturated):
    """The second and fourth activation are always on, so that their entropy is exactly 0."""

    OFFSETS = (0.5, 90.0, 0.0, 80.0, 1.0)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({}, [1, 1, 1, 1, 1]), ({"zeros_together": True}, [2, 1, 1, 1]), ({"zeros_together": True, "max_removed": 1}, [1])],
)
def test_zeros_together(options, sizes):
    result = run(Constant(), train=lambda model: None, evaluate=lambda model: 1.0, **options)
    assert [len(step.removed) for step in result.steps[1:]] == sizes
    assert set(result.removed[:2]) <= {"relus.1", "relus.3"} or sizes == [1]


def test_function_as_criterion(network):
    def last_first(model, statistics):
        assert list(statistics) == list(activation_modules(model))
        return {name: -place for place, name in enumerate(statistics)}

    assert run(network, criterion=last_first, evaluate=lambda model: 1.0).removed == ("gelu", "relu2", "relu1")


def test_controls_remove_each_site_once_and_repeat(network):
    for criterion in ("random", "uniform"):
        torch.manual_seed(1)
        first = run(network, criterion=criterion, evaluate=lambda model: 1.0)
        torch.manual_seed(1)
        again = run(network, criterion=criterion, evaluate=lambda model: 1.0)
        assert first.removed == again.removed
        assert sorted(first.removed) == ["gelu", "relu1", "relu2"]


def test_entropies_of_training_passes():
    """train receives a collector, which it resets where the last epoch begins."""
    torch.manual_seed(0)
    model = Saturated()
    with collect(model) as collector:
        calibrate(model)
    statistics = collector.compute()

    def counting_train(model, collector):
        model(torch.full_like(DATA, 50.0))  # an epoch that must not be counted
        collector.reset()
        calibrate(model)

    options = {"evaluate": lambda model: 1.0, "statistics": statistics}
    counted = run(model, train=counting_train, calibrate=None, **options)
    expected = run(model, train=lambda model: None, **options)
    assert counted.steps == expected.steps
    assert len(counted.steps) == 5


def test_entropies_as_in_the_code_of_the_paper():
    """Zero counts as on, and the entropies of the batches are averaged."""
    model = Saturated().eval()
    with collect(model, average="batch") as collector:
        calibrate(model)
    result = run(model, zero="on", average="batch", max_removed=1)
    entropies = collector.compute().layer_entropy("on", "batch")
    assert result.steps[0].layer_entropy == entropies
    assert result.steps[0].layer_entropy != run(model, max_removed=0).steps[0].layer_entropy
    assert result.removed == (min(entropies, key=entropies.get),)


@pytest.mark.parametrize(
    ("option", "message"), [({"zero": "off"}, "expected one of discard, on"), ({"average": "mean"}, "dataset, batch")]
)
def test_unknown_kind_of_entropy(option, message):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"^{name} is '{value}'; .*{message}"):
        run(Saturated(), **option)


def test_given_statistics_replace_the_first_calibration(network):
    with collect(network.eval()) as collector:
        calibrate(network)
    calls = []
    result = run(network, calibrate=lambda model: calls.append(calibrate(model)), statistics=collector.compute(), max_removed=1)
    assert len(calls) == 1
    assert result.steps[0].layer_entropy == collector.compute().layer_entropy()


def test_calibrate_none_requires_statistics(network):
    with pytest.raises(ValueError, match=r"statistics= are needed; .*fe\.collect"):
        run(network, calibrate=None)
    with collect(network) as collector:
        calibrate(network)
    statistics = collector.compute()
    with pytest.raises(ValueError, match="collapse needs calibrate"):
        run(network, calibrate=None, statistics=statistics, collapse="project")
    with pytest.raises(ValueError, match=r"statistics belong to another model: .* sites gelu, relu1"):
        run(Saturated(), statistics=statistics)


def test_training_without_a_pass_is_refused(network):
    with collect(network) as collector:
        calibrate(network)
    with pytest.raises(ValueError, match="train made no forward pass"):
        run(network, train=lambda model, collector: None, calibrate=None, statistics=collector.compute())


@pytest.mark.parametrize(("max_removed", "per_step", "sizes"), [(0, 1, []), (2, 1, [1, 1]), (None, 2, [2, 1]), (2, 3, [2])])
def test_max_removed_and_per_step(network, max_removed, per_step, sizes):
    result = run(network, max_removed=max_removed, per_step=per_step, evaluate=lambda model: 1.0)
    assert [len(step.removed) for step in result.steps[1:]] == sizes


def test_measure_and_on_step(network):
    seen = []
    result = run(network, measure=lambda model: {"parameters": 7.0}, on_step=seen.append)
    assert all(step.metrics == {"parameters": 7.0} for step in result.steps)
    assert [len(steps) for steps in seen] == list(range(1, len(result.steps) + 1))
    assert seen[-1] == result.steps


class InterruptedRun(Exception):  # noqa: N818
    pass


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_call", range(1, 11))
def test_resumed_after_any_interruption(tmp_path, interrupted_call):
    """In a run with three removals, each call of the user's functions raises once; then the run is resumed."""

    def start():
        torch.manual_seed(0)
        return Residual()

    calls = 0

    def interrupting(function):
        def wrapped(model):
            nonlocal calls
            calls += 1
            if calls == interrupted_call:
                raise InterruptedRun
            return function(model)

        return wrapped

    expected = run(start(), checkpoint_dir=tmp_path / "whole")
    assert len(expected.steps) == 4
    functions = {"train": train, "evaluate": evaluate, "calibrate": calibrate}
    with pytest.raises(InterruptedRun):
        run(start(), checkpoint_dir=tmp_path / "parts", **{name: interrupting(f) for name, f in functions.items()})
    torch.rand(interrupted_call)
    actual = run(start(), checkpoint_dir=tmp_path / "parts")
    assert actual.steps == expected.steps
    assert (actual.removed, actual.kept_step) == (expected.removed, expected.kept_step)
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in actual.model.state_dict().items())


def test_finished_run_is_read_back(tmp_path):
    torch.manual_seed(0)
    model = Residual()
    scores = iter([0.9, 0.9, 0.1])
    first = run(model, evaluate=lambda m: next(scores), max_drop=0.1, checkpoint_dir=tmp_path)

    def fail(model):
        raise AssertionError

    again = run(model, train=fail, evaluate=fail, calibrate=fail, max_drop=0.1, checkpoint_dir=tmp_path)
    assert (again.steps, again.removed, again.kept_step) == (first.steps, first.removed, 1)
    assert torch.equal(again.model(DATA), first.model(DATA))


def test_checkpoints_of_another_model(tmp_path, network):
    run(network, max_removed=1, checkpoint_dir=tmp_path)
    other = Saturated()
    before = snapshot(other)
    with pytest.raises(ValueError, match="run of another model"):
        run(other, max_removed=1, checkpoint_dir=tmp_path)
    assert_unchanged(other, before)


def test_checkpoints_with_other_options(tmp_path, network):
    run(network, max_removed=1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'max_removed': 1.*'max_removed': 2"):
        run(network, max_removed=2, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("score", [math.nan, math.inf, torch.tensor(math.nan)])
def test_score_not_finite(network, score):
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"evaluate returned (nan|inf) after the removal of nothing; it must return a finite"):
        run(network, evaluate=lambda model: score)
    assert_unchanged(network, before)


def test_score_as_tensor(network):
    assert run(network, evaluate=lambda model: torch.tensor(0.5), max_removed=1).steps[1].score == 0.5


@pytest.mark.parametrize("score", [None, "good", torch.zeros(2), [1.0]])
def test_score_not_a_number(network, score):
    with pytest.raises(ValueError, match=f"evaluate returned a {type(score).__name__}, not a number, after the removal of"):
        run(network, evaluate=lambda model: score)


def test_steps_before_a_score_of_nan_stay(network, tmp_path):
    scores = iter([0.9, 0.9, math.nan])
    with pytest.raises(ValueError, match="evaluate returned nan after the removal of"):
        run(network, evaluate=lambda model: next(scores), checkpoint_dir=tmp_path)
    assert len(run(network, checkpoint_dir=tmp_path, evaluate=lambda model: 0.9).steps) == 4


@pytest.mark.parametrize("replacement", [nn.LeakyReLU(), nn.Sequential(nn.ReLU())])
def test_training_that_replaces_modules(network, replacement):
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"train changed the modules of the model \(.*relu.*\); it must train"):
        run(network, train=lambda model: model.set_submodule("relu1" if type(model.relu1) is nn.ReLU else "relu2", replacement))
    assert_unchanged(network, before)


def test_training_that_adds_a_module(network):
    with pytest.raises(ValueError, match=r"train changed the modules of the model \(head\)"):
        run(network, train=lambda model: model.add_module("head", nn.Linear(1, 1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_score_as_tensor_on_gpu(network):
    assert run(network, evaluate=lambda model: torch.tensor(0.5, device="cuda"), max_removed=1).steps[1].score == 0.5


def test_calibration_without_a_pass(network):
    before = snapshot(network)
    with pytest.raises(ValueError, match="calibrate made no forward pass"):
        run(network, calibrate=lambda model: None)
    assert_unchanged(network, before)


def test_model_without_activations():
    with pytest.raises(ValueError, match="Flatten calls no known activation"):
        run(nn.Flatten())


@pytest.mark.parametrize(("protect", "named"), [([], "1, 1:1"), (["1:1"], "1")])
def test_module_called_twice(protect, named):
    relu = nn.ReLU()
    with pytest.raises(ValueError, match=rf"^{named}: an activation that .* fe\.isolate\(model, example_inputs\)"):
        run(nn.Sequential(nn.Flatten(), relu, nn.Linear(25, 25), relu), protect=protect)


class PartlyIsolated(nn.Module):
    """An activation that is a module, one that is a function, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.gelu = nn.Linear(25, 25), nn.ReLU(), nn.GELU()

    def forward(self, x):
        x = torch.relu(self.fc(self.relu(self.fc(x.flatten(1)))))
        return self.gelu(self.fc(self.gelu(self.fc(x))))


class Loop(nn.Module):
    """An activation that is called in a loop, so that it cannot be isolated, and possibly one more."""

    def __init__(self, last):
        super().__init__()
        self.fc, self.relu, self.last = nn.Linear(25, 25), nn.ReLU(), last

    def forward(self, x):
        x = x.flatten(1)
        for _ in range(2):
            x = self.relu(self.fc(x))
        return self.last(self.fc(x))


@pytest.mark.filterwarnings("ignore:1 activation call of Loop could be given no module")
def test_calls_that_cannot_be_isolated_are_protected_with_one_warning(recwarn):
    isolated = isolate(Loop(nn.GELU()), (DATA[:2],))
    recwarn.clear()
    result = run(isolated, evaluate=lambda model: 1.0, train=lambda model: None)
    assert result.removed == ("last",)
    (warning,) = recwarn
    assert str(warning.message) == "relu, relu:1: protected, because fe.isolate could give these calls no module of their own"
    assert warning.filename == __file__


@pytest.mark.filterwarnings("ignore:1 activation call of Loop could be given no module")
def test_a_model_of_calls_that_cannot_be_isolated_is_refused():
    with pytest.raises(ValueError, match=r"^relu, relu:1: fe\.isolate could .* no activation of the model can be removed$"):
        run(isolate(Loop(nn.Identity()), (DATA[:2],)))


def test_statistics_from_before_isolation():
    model = PartlyIsolated().eval()
    with pytest.warns(UserWarning, match="calls 1 of its activations as functions"), collect(model) as collector:
        calibrate(model)
    isolated = isolate(model, (DATA[:2],))
    calibration = Mock(side_effect=calibrate)
    options = {"evaluate": lambda model: 1.0, "train": lambda model: None, "max_removed": 1}
    result = run(isolated, statistics=collector.compute(), calibrate=calibration, **options)
    assert calibration.call_count == 1  # after the removal
    before = sorted(collector.compute().layer_entropy().values())
    assert sorted(result.steps[0].layer_entropy.values()) == before
    assert set(result.steps[0].layer_entropy) == {site.name for site in find_sites(isolated, (DATA[:2],))}


@pytest.mark.parametrize("protect", ["gelu_2", "fc"])
def test_unknown_names_to_protect_are_explained(protect):
    expected = {"gelu_2": "; the nearest are ", "fc": ": it is a Linear; the nearest are "}[protect]
    with pytest.raises(ValueError, match=f"^protect names '{protect}', which is not a site of the model{expected}"):
        run(PartlyIsolated(), protect=[protect])


@pytest.mark.parametrize("criterion", ["entropy", "entropy-per-latency", "random", "uniform"])
def test_protected_sites_need_no_modules(criterion):
    options = {"criterion": criterion, "zeros_together": criterion == "entropy", "evaluate": lambda model: 1.0}
    result = run(PartlyIsolated(), train=lambda model: None, protect=["relu_1", "gelu", "gelu:1"], **options)
    assert result.removed == ("relu",)


@pytest.mark.parametrize(
    "options",
    [
        {"max_drop": -0.1},
        {"max_drop": math.nan},
        {"max_removed": -1},
        {"per_step": 0},
        {"per_step": 1.5},
        {"criterion": "size"},
        {"collapse": "x"},
    ],
)
def test_option_out_of_range(network, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        run(network, **options)


class Blocks(nn.Module):
    """Two residual blocks of two convolutions, and a block that becomes one convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    conv1=nn.Conv2d(8, 8, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(8), relu=nn.ReLU(inplace=True),
                    conv2=nn.Conv2d(8, 8, 3, padding=1, bias=False), bn2=nn.BatchNorm2d(8),
                )
            )
            for _ in range(2)
        )  # fmt: skip
        self.expand, self.gelu, self.project = nn.Conv2d(8, 64, 1), nn.GELU(), nn.Conv2d(64, 8, 1)
        self.fc = nn.Linear(8 * 25, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.project(self.gelu(self.expand(x)))
        return self.fc(x.flatten(1))


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return Blocks()


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_entropy_per_latency(blocks):
    result = run(blocks, criterion="entropy-per-latency", evaluate=lambda model: 1.0)
    assert result.removed[0] == "gelu"  # it saves by far the most, and all entropies are near 1
    predicted = [step.metrics["predicted_ms"] for step in result.steps]
    assert predicted == sorted(predicted, reverse=True)
    assert len(set(predicted)) == len(predicted)


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_budget_ends_the_run(blocks):
    all_of_it = run(blocks, criterion="entropy-per-latency", evaluate=lambda model: 1.0)
    after_one = all_of_it.steps[1].metrics["predicted_ms"]
    options = {"criterion": "entropy-per-latency", "evaluate": lambda model: 1.0}
    assert run(blocks, max_latency_ms=after_one + 1e-6, **options).removed == ("gelu",)


@pytest.mark.usefixtures("counted_costs")
@pytest.mark.parametrize("budget", [{"max_latency_ms": 1e12}, {"target_speedup": 0.5}])
def test_budget_met_by_the_dense_model(blocks, budget):
    result = run(blocks, criterion="entropy-per-latency", evaluate=lambda model: 1.0, **budget)
    assert (result.removed, result.kept_step) == ((), 0)


def test_dense_model_kept_if_the_first_removal_fails(network):
    scores = iter([0.9, 0.1])
    result = run(network, evaluate=lambda model: next(scores), max_drop=0.0)
    assert (result.removed, result.kept_step, len(result.steps)) == ((), 0, 2)
    torch.testing.assert_close(result.model(DATA), network.eval()(DATA))


@pytest.mark.slow
def test_budget_out_of_reach_before_training(blocks):
    calls = []
    with pytest.raises(ValueError, match="cannot be reached"):
        run(blocks, criterion="entropy-per-latency", target_speedup=1e6, train=calls.append, evaluate=calls.append)
    assert calls == []


@pytest.mark.parametrize(
    "options",
    [{"target_speedup": 2.0}, {"criterion": "entropy-per-latency", "target_speedup": 2.0, "max_latency_ms": 1.0}],
)
def test_budget_requires_its_criterion(network, options):
    with pytest.raises(ValueError, match="give one of them, with criterion='entropy-per-latency'"):
        run(network, **options)


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_collapse_precedes_training(blocks):
    seen = []

    def note(model):
        seen.append({name: type(module) for name, module in model.named_modules()})
        train(model)

    result = run(blocks, collapse="project", train=note, protect=["gelu"], evaluate=lambda model: 1.0)
    assert [len(step.collapsed) for step in result.steps] == [0, 1, 1]
    for step, kinds in zip(result.steps[1:], seen, strict=True):
        (projection,) = step.collapsed
        path = step.removed[0].removesuffix("relu")
        assert projection.modules == tuple(path + name for name in ("conv1", "bn1", "relu", "conv2", "bn2"))
        assert 0 < projection.relative_error <= projection.centre_error
        assert kinds[path + "conv1"] is nn.Conv2d
        assert kinds[path + "bn1"] is nn.BatchNorm2d
        assert kinds[path + "conv2"] is kinds[path + "bn2"] is nn.Identity
    fused = fuse(result.model, (DATA,), measure=False)
    torch.testing.assert_close(fused(DATA), result.model(DATA), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
@pytest.mark.parametrize("interrupted_call", [2, 3, 5])
def test_collapsed_run_resumed_after_interruption(tmp_path, interrupted_call):
    def start():
        torch.manual_seed(0)
        return Blocks()

    calls = 0

    def interrupting(model):
        nonlocal calls
        calls += 1
        if calls == interrupted_call:
            raise InterruptedRun
        calibrate(model)

    options = {"collapse": "project", "criterion": "entropy-per-latency"}
    expected = run(start(), checkpoint_dir=tmp_path / "whole", **options)
    assert sum(len(step.collapsed) for step in expected.steps) == 2
    with pytest.raises(InterruptedRun):
        run(start(), checkpoint_dir=tmp_path / "parts", calibrate=interrupting, **options)
    torch.rand(interrupted_call)
    actual = run(start(), checkpoint_dir=tmp_path / "parts", **options)
    assert actual.steps == expected.steps
    weights = expected.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in actual.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_resumed_run_keeps_its_latencies(tmp_path, blocks, monkeypatch):
    options = {"criterion": "entropy-per-latency", "evaluate": lambda model: 1.0, "checkpoint_dir": tmp_path}
    first = run(blocks, **options)

    def fail(*arguments, **others):
        raise AssertionError

    monkeypatch.setattr("fastentropy.pruning.loop.measure_latency", fail)
    assert run(blocks, **options).steps == first.steps


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_damaged_latency_table(tmp_path, blocks):
    options = {"criterion": "entropy-per-latency", "evaluate": lambda model: 1.0, "checkpoint_dir": tmp_path}
    run(blocks, **options)
    for content in (
        b"",
        b"{}",
        b'{"original": 1, "fused": 1, "sections": [{}]}',
        b'{"original": 1, "fused": 1, "sections": 3}',
    ):
        (tmp_path / "latency.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"latency\.json is damaged"):
            run(blocks, **options)


class Series(nn.Module):
    """Consecutive convolutions, the last one pointwise: once two are merged, merging all three costs no more."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 12, 3, padding=1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(12, 12, 3, padding=1), nn.ReLU()
        self.conv4, self.fc = nn.Conv2d(12, 4, 1), nn.Linear(4 * 25, 3)

    def forward(self, x):
        x = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.fc(self.conv4(self.relu3(self.conv3(x))).flatten(1))


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
@pytest.mark.parametrize("order", list(itertools.permutations(["relu1", "relu2", "relu3"])))
def test_collapse_over_collapsed_convolutions(order, tmp_path):
    """In any order of removal, each step fits the current network, and a resumed run has the same network."""
    torch.manual_seed(0)
    model, scores = Series(), {name: place for place, name in enumerate(order)}
    options = {"collapse": "project", "criterion": lambda model, statistics: {name: scores[name] for name in statistics}}
    result = run(model, checkpoint_dir=tmp_path, **options)
    assert result.removed == order
    predicted = [step.metrics["predicted_ms"] for step in result.steps]
    assert predicted == sorted(predicted, reverse=True)
    for step in result.steps:
        assert all(0 <= each.relative_error < 1 for each in step.collapsed)
    again = run(model, checkpoint_dir=tmp_path, **options)
    assert again.steps == result.steps
    assert torch.equal(again.model(DATA), result.model(DATA))


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
@pytest.mark.parametrize(("name", "value"), [("modules", ["nowhere"]), ("modules", []), ("kernel", ["3"]), ("groups", 7)])
def test_stored_projection_that_does_not_fit(blocks, tmp_path, name, value):
    options = {"collapse": "project", "protect": ["gelu"], "max_removed": 1, "checkpoint_dir": tmp_path}
    run(blocks, **options)
    path = tmp_path / "01" / "step.json"
    values = json.loads(path.read_text())
    values["collapsed"][0][name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="holds a step that approximates modules that the model lacks"):
        run(blocks, **options)


@pytest.mark.usefixtures("counted_costs")
def test_latencies_belong_to_options_and_model(tmp_path, blocks):
    def killed(model):
        raise InterruptedRun

    with pytest.raises(InterruptedRun):
        run(blocks, criterion="entropy-per-latency", evaluate=killed, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="holds a run with the options"):
        run(blocks, criterion="entropy-per-latency", collapse="project", checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="holds a run of another model"):
        run(Series(), criterion="entropy-per-latency", checkpoint_dir=tmp_path)


def test_protect_is_a_list_in_any_order(network, tmp_path):
    with pytest.raises(ValueError, match=r"protect must be a list of site names, not the string 'relu1': \['relu1'\]"):
        run(network, protect="relu1")
    first = run(network, protect=["relu1", "gelu"], checkpoint_dir=tmp_path)
    assert run(network, protect=["gelu", "relu1"], checkpoint_dir=tmp_path).steps == first.steps


def test_criterion_that_cannot_be_copied(network, tmp_path):
    class Judge:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, model, statistics):
            assert not model.training
            return statistics.layer_entropy()

    judge = Judge()
    first = run(network, criterion=judge, checkpoint_dir=tmp_path)
    shutil.rmtree(tmp_path / "03")
    assert run(network, criterion=judge, checkpoint_dir=tmp_path).steps == first.steps


def test_result_prints_the_steps_and_what_was_kept(network):
    scores = iter([0.5, 0.75, 0.25])
    result = run(network, per_step=2, max_drop=0.0, evaluate=lambda model: next(scores), measure=lambda model: {"test": 0.4444})
    first, second, third = [*result.steps[1].removed, *result.steps[2].removed]
    dense = result.steps[0].layer_entropy
    lines = str(result).splitlines()
    assert [line.split() for line in (lines[0], *lines[2:6])] == [
        ["removed", "step", "bits", "score", "test"],
        ["(nothing)", "0", "0.5000", "0.4444"],
        [first, "*", "1", f"{dense[first]:.3f}", "0.7500", "0.4444"],
        [second, "*", "1", f"{dense[second]:.3f}"],
        [third, "2", f"{result.steps[1].layer_entropy[third]:.3f}", "0.2500", "0.4444"],
    ]
    assert lines[-1] == "2 of 3 activations removed up to step 1 (*): score 0.7500, 0.5000 before"


def test_result_is_fused_for_the_example_inputs(network):
    result = run(network, max_removed=1, evaluate=lambda model: 1.0, train=lambda model: None)
    fused = result.fuse(measure=False)
    assert isinstance(fused, FusedModel)
    torch.testing.assert_close(fused(DATA), result.model(DATA))


@pytest.mark.parametrize("progress", [True, None])
def test_progress_names_the_phase_and_the_total(network, progress, capsys):
    run(network, max_removed=2, evaluate=lambda model: 1.0, train=lambda model: None, progress=progress)
    captured = capsys.readouterr()
    assert not captured.out
    for line in ("step 0, measure entropies ", "step 1, train ", "step 2, evaluate "):
        assert (f"prune: {line}" in captured.err) == (progress is True)
    assert ("1/2" in captured.err) == (progress is True)
    assert not captured.err.rpartition("\r\r")[2].strip()
