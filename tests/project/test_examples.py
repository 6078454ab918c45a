"""Each example prunes as it prints, leaves its model unchanged, and can be interrupted."""

import contextlib
import importlib.util
import io
import types

import pytest
import torch
from torch import nn

import fastentropy as fe
from tests._helpers.paths import ROOT
from tests._helpers.snapshots import assert_unchanged, snapshot

EXAMPLES = {
    "plain_loop": ["sklearn"],
    "lightning_module": ["sklearn", "lightning"],
    "huggingface_trainer": ["sklearn", "transformers", "accelerate"],
}
FOLDER = ROOT / "examples"

pytestmark = pytest.mark.slow


class InterruptedRun(Exception):  # noqa: N818
    pass


def interrupt(steps):
    if len(steps) == 2:
        torch.rand(7)
        raise InterruptedRun


def load(name):
    for library in EXAMPLES[name]:
        pytest.importorskip(library)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=EXAMPLES)
def ran(request, tmp_path_factory):
    """Run an example with two removals, and once more with an interruption after the first removal and a restart."""
    example, prune, folder = load(request.param), fe.prune, tmp_path_factory.mktemp("interrupted")
    ran = types.SimpleNamespace()

    def prune_twice(model, **options):
        ran.dense, ran.before, ran.accuracy = model, snapshot(model), options["evaluate"]
        options |= {"max_drop": 1.0}  # so that any accuracy holds
        start = torch.get_rng_state()
        ran.result = prune(model, **options)
        torch.set_rng_state(start)
        options["checkpoint_dir"] = folder
        with pytest.raises(InterruptedRun):
            prune(model, **options, on_step=interrupt)
        ran.resumed = prune(model, **options)
        return ran.result

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(fe, "prune", prune_twice)
        ran.returned = example.main(epochs=1, max_removed=2)
    ran.printed = printed.getvalue()
    return ran


def test_removed_activations_are_identities(ran):
    assert len(ran.result.removed) == 2
    assert all(type(ran.result.model.get_submodule(name)) is nn.Identity for name in ran.result.removed)


def test_example_leaves_its_model_unchanged(ran):
    assert_unchanged(ran.dense, ran.before)


def test_score_of_kept_step_belongs_to_the_network(ran):
    with torch.no_grad():
        assert float(ran.accuracy(ran.result.model)) == ran.result.steps[ran.result.kept_step].score


def test_example_prints_removed_activations(ran):
    assert ran.returned is ran.result
    assert f"removed {', '.join(ran.result.removed)}; fused: " in ran.printed
    assert all(f"accuracy {step.score:.1%} without" in ran.printed for step in ran.result.steps)


def test_resumed_example_equals_uninterrupted(ran):
    assert ran.resumed.steps == ran.result.steps
    weights = ran.result.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in ran.resumed.model.state_dict().items())
