import copy
import math

import pytest
import torch
from torch import nn

from conftest import Residual, assert_unchanged, snapshot
from fastentropy import linearize, prune
from fastentropy.criteria import lowest

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
    """Four activations whose entropies have a known order: `offset` moves the share of on inputs from 1/2 to 1."""

    OFFSETS = (0.5, 3.0, 0.0, 1.0)

    def __init__(self):
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in self.OFFSETS)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x.flatten(1) * self.weight
        return sum(relu(x + offset) for relu, offset in zip(self.relus, self.OFFSETS, strict=True))


def test_removals_follow_the_order_of_entropies():
    torch.manual_seed(0)
    result = run(Saturated(), train=lambda model: None, evaluate=lambda model: 1.0)
    assert result.removed == ("relus.1", "relus.3", "relus.0", "relus.2")
    assert [step.removed for step in result.steps] == [(), *((name,) for name in result.removed)]
    assert result.steps[-1].layer_entropy == {}


def test_ties_go_in_call_order():
    assert lowest({"b": 0.5, "c": 0.1, "a": 0.1, "d": 0.1}, 2) == ("c", "a")


def test_each_step_has_the_function_of_the_linearised_network(network):
    """What the loop trains and evaluates is the dense architecture with identities, and nothing else."""
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


def test_the_dense_model_is_evaluated_before_anything_is_trained(network):
    calls = []
    run(network, train=lambda m: calls.append("train"), evaluate=lambda m: calls.append("evaluate") or 1.0, max_removed=1)
    assert calls == ["evaluate", "train", "evaluate"]


def test_callables_see_the_right_mode_and_gradients(network):
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


def test_the_loop_stops_where_the_score_falls_too_far_and_keeps_the_last_that_held(network):
    scores = iter([0.90, 0.91, 0.85, 0.99])
    result = run(network, evaluate=lambda model: next(scores), max_drop=0.04)
    assert [step.score for step in result.steps] == [0.90, 0.91, 0.85]
    assert (result.kept_step, len(result.removed)) == (1, 1)
    kinds = {name: type(module) for name, module in result.model.named_modules()}
    assert kinds[result.removed[0]] is nn.Identity
    assert kinds[result.steps[2].removed[0]] is not nn.Identity


def test_a_score_that_falls_by_just_max_drop_holds(network):
    scores = iter([0.3, 0.2, 0.0])
    assert run(network, evaluate=lambda model: next(scores), max_drop=0.1).kept_step == 1


def test_the_kept_model_is_the_one_that_was_evaluated(network):
    scores = {}

    def record(model):
        value = evaluate(model)
        scores[value] = copy.deepcopy(model.state_dict())
        return value

    result = run(network, evaluate=record)
    state = result.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in scores[result.steps[result.kept_step].score].items())
    assert not result.model.training


def test_the_given_model_is_not_changed(network):
    before = snapshot(network)
    run(network)
    assert_unchanged(network, before)


@pytest.mark.parametrize(("max_removed", "per_step", "sizes"), [(0, 1, []), (2, 1, [1, 1]), (None, 2, [2, 1]), (2, 3, [2])])
def test_max_removed_and_per_step(network, max_removed, per_step, sizes):
    result = run(network, max_removed=max_removed, per_step=per_step, evaluate=lambda model: 1.0)
    assert [len(step.removed) for step in result.steps[1:]] == sizes


def test_further_figures_are_kept_with_each_step(network):
    seen = []
    result = run(network, measure=lambda model: {"parameters": 7.0}, on_step=seen.append)
    assert all(step.metrics == {"parameters": 7.0} for step in result.steps)
    assert [len(steps) for steps in seen] == list(range(1, len(result.steps) + 1))
    assert seen[-1] == result.steps


class InterruptedRun(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("interrupted_call", range(1, 11))
def test_a_run_that_was_interrupted_anywhere_ends_as_one_that_was_not(tmp_path, interrupted_call):
    """Every call of the user's functions of a run with three removals raises once; then the run is taken up."""

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


def test_a_finished_run_is_read_back_without_work(tmp_path):
    torch.manual_seed(0)
    model = Residual()
    scores = iter([0.9, 0.9, 0.1])
    first = run(model, evaluate=lambda m: next(scores), max_drop=0.1, checkpoint_dir=tmp_path)

    def fail(model):
        raise AssertionError

    again = run(model, train=fail, evaluate=fail, calibrate=fail, max_drop=0.1, checkpoint_dir=tmp_path)
    assert (again.steps, again.removed, again.kept_step) == (first.steps, first.removed, 1)
    assert torch.equal(again.model(DATA), first.model(DATA))


def test_checkpoints_of_another_model_are_refused(tmp_path, network):
    run(network, max_removed=1, checkpoint_dir=tmp_path)
    other = Saturated()
    before = snapshot(other)
    with pytest.raises(ValueError, match="run of another model"):
        run(other, max_removed=1, checkpoint_dir=tmp_path)
    assert_unchanged(other, before)


def test_checkpoints_of_a_run_with_other_options_are_refused(tmp_path, network):
    run(network, max_removed=1, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"'max_removed': 1.*'max_removed': 2"):
        run(network, max_removed=2, checkpoint_dir=tmp_path)


@pytest.mark.parametrize("score", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_score_that_is_no_number_is_refused_and_the_model_left_alone(network, score):
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"evaluate returned (nan|inf) after the removal of nothing; it must return a finite"):
        run(network, evaluate=lambda model: score)
    assert_unchanged(network, before)


def test_a_tensor_is_a_score(network):
    assert run(network, evaluate=lambda model: torch.tensor(0.5), max_removed=1).steps[1].score == 0.5


def test_an_empty_calibration_is_refused_and_the_model_left_alone(network):
    before = snapshot(network)
    with pytest.raises(ValueError, match="calibrate made no forward pass"):
        run(network, calibrate=lambda model: None)
    assert_unchanged(network, before)


def test_a_model_without_activations_is_refused():
    with pytest.raises(ValueError, match="Flatten calls no known activation"):
        run(nn.Flatten())


def test_a_module_called_twice_is_refused_by_name():
    relu = nn.ReLU()
    with pytest.raises(ValueError, match=r"1:1: activations that .* fe\.isolate\(model, example_inputs\)"):
        run(nn.Sequential(nn.Flatten(), relu, nn.Linear(25, 25), relu))


@pytest.mark.parametrize(
    "options",
    [
        {"max_drop": -0.1},
        {"max_drop": math.nan},
        {"max_removed": -1},
        {"per_step": 0},
        {"criterion": "size"},
        {"collapse": "x"},
    ],
)
def test_an_option_out_of_range_is_refused_by_name(network, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
        run(network, **options)


def test_linearize_replaces_just_the_named_modules(network):
    network.eval()
    linearize(network, ["relu2"])
    assert type(network.relu2) is nn.Identity
    assert (type(network.relu1), type(network.gelu)) == (nn.ReLU, nn.GELU)
    assert not network.relu2.training


def test_linearize_names_the_nearest_sites_and_changes_nothing(network):
    before = snapshot(network)
    with pytest.raises(ValueError, match=r"'rellu2' is not an activation module of the model; the nearest are relu2, relu1"):
        linearize(network, ["relu1", "rellu2"])
    assert_unchanged(network, before)


def test_linearize_refuses_a_string(network):
    with pytest.raises(ValueError, match=r"\['relu1'\]"):
        linearize(network, "relu1")


def test_linearize_refuses_a_module_that_stands_in_two_places():
    relu = nn.ReLU()
    with pytest.raises(ValueError, match="several places"):
        linearize(nn.Sequential(relu, nn.Linear(2, 2), relu), ["0"])
