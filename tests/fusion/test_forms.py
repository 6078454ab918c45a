"""Which forms of a network are made, and that none is used that computes something else."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastentropy import fuse, linearize, load
from fastentropy.fusion import api, choosing, verification
from fastentropy.fusion.chains import finding
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.forms import make_forms
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.report import ChainReport
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.fusing import assert_equal
from tests._helpers.networks import Reads

pytestmark = pytest.mark.usefixtures("counted_times")


@pytest.mark.slow
@pytest.mark.parametrize("fastest", ["contiguous", "channels_last"])
def test_every_form_gets_its_fastest_memory_format(network, images, monkeypatch, fastest, tmp_path):
    price = {"original": 3.0, "folded": 2.0, "fused": 1.0}
    prices = lambda functions, **options: {key: [price[key[0]] + (key[1] != fastest) / 2] for key in functions}  # noqa: E731
    monkeypatch.setattr(choosing, "measure_samples", prices)
    fused = fuse(network.eval(), (images,))
    # No chain is faster in another form, so the folded form is the same module.
    assert fused.report.milliseconds == price | {"folded": price["fused"]}
    assert set(fused.report.memory_formats.values()) == {fastest}
    images = torch.randn(4, 1, 5, 5)
    assert_equal(fused, network, images)
    fused.save(tmp_path / "model.pt2")
    weights = [w for m in (fused, load(tmp_path / "model.pt2")) for w in m.buffers() if w.ndim == 4 and min(w.shape[1:]) > 1]
    assert all(w.is_contiguous() == (fastest == "contiguous") for w in weights)


def test_views_of_contiguous_values_stay_contiguous():
    model = Reads(lambda m, x: m.c(m.b(m.relu(m.a(x))).view(x.shape[0], -1)), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3))
    model.c, model.relu = nn.Linear(4 * 5 * 5, 3), nn.ReLU()
    x = torch.randn(2, 3, 9, 9)
    fused = fuse(model.eval(), (x,))
    assert_equal(fused, model, x)


def doubled(chain):
    """A chain with another function."""
    return tuple(replace(element, weight=2 * element.weight) if hasattr(element, "weight") else element for element in chain)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [["fc1"], ["conv1"], ["conv1", "fc1"]])
def test_wrong_chains_are_left_and_reported(network, images, monkeypatch, wrong):
    linearize(network.eval(), ["relu1", "gelu"])
    plan_chain = api.plan_chain

    def plan_wrongly(chain, *arguments, **options):
        form, report = plan_chain(chain, *arguments, **options)
        return doubled(chain.elements) if chain.names[0] in wrong else form, report

    monkeypatch.setattr(api, "plan_chain", plan_wrongly)
    fused = fuse(network, (images,))
    assert_equal(fused, network, images)
    left = {chain.names[0]: chain.note.startswith("left as it was") for chain in fused.report.chains}
    assert left == {name: name in wrong for name in ("conv1", "fc1")}


def test_chain_without_folds_keeps_the_weights_of_the_model():
    layers = [nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 20), nn.Linear(20, 5)]
    model, inputs = nn.Sequential(*layers, nn.ReLU()).eval(), Inputs((torch.randn(3, 6),))
    kept = ChainReport((), {}, "keep")
    plan = lambda chain, x: (chain.folded, kept)  # noqa: E731
    forms, _ = make_forms(model, inference_module(export(model, inputs)), inputs, plan)
    addresses = {weight.data_ptr() for weight in model.state_dict().values()}
    assert {value.data_ptr() for value in forms["fused", "contiguous"].state_dict().values()} <= addresses
    assert forms["folded", "contiguous"] is model


def test_only_the_inputs_that_are_still_read_are_kept_while_chains_are_planned():
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Sigmoid())]
    model, inputs = nn.Sequential(*layers).eval(), Inputs((torch.randn(2, 4, 8, 8),))
    seen, alive = [], []

    def plan(chain, x):
        seen.append(weakref.ref(x))
        alive.append(sum(each() is not None for each in seen))
        return chain.folded, ChainReport((), {}, "keep")

    make_forms(model, inference_module(export(model, inputs)), inputs, plan)
    assert len(alive) == 11  # in each memory format, but once where both have the same input: that of the model
    assert max(alive) <= 2  # the input of the model, and that of the chain


def test_forms_share_the_weights_of_chains_that_are_equal(network, images):
    linearize(network.eval(), ["relu1", "gelu"])
    others = []

    def plan(chain, x):
        others.append(chain)
        is_first = len(others) == 1
        report = ChainReport(chain.names, {}, "merge" if is_first else "keep")
        return tuple(merge(chain.folded, x.shape[2:])) if is_first else chain.folded, report

    module = inference_module(export(network, Inputs((images,))))
    forms, _ = make_forms(network, module, Inputs((images,)), plan, channels_last=False)
    fused, folded = (dict(forms[name, "contiguous"].named_buffers()) for name in ("fused", "folded"))
    assert len(others) > 1
    addresses = {value.data_ptr() for value in fused.values()}
    new = [name for name, value in folded.items() if value.data_ptr() not in addresses]
    assert new  # the chain that is merged
    assert all(not any(torch.equal(folded[name], value) for value in fused.values()) for name in new)
    for form in forms.values():
        assert_equal(form, network, images)


def test_form_that_is_two_is_made_and_timed_once(network, images, monkeypatch):
    timed = []

    def samples(functions, **options):
        timed.extend(functions)
        return {entry: [1.0] for entry in functions}

    monkeypatch.setattr(choosing, "measure_samples", samples)
    report = fuse(network.eval(), (images,)).report
    assert all(chain.choice == "keep" for chain in report.chains)
    assert {name for name, *_ in timed} == {"original", "fused"}
    assert report.times["eager"] == {"original": 1.0, "folded": 1.0, "fused": 1.0}


@pytest.mark.slow
def test_wrong_fold_is_not_kept(network, images, monkeypatch):
    linearize(network.eval(), ["gelu"])
    fold = finding.fold
    monkeypatch.setattr(finding, "fold", lambda chain: doubled(fold(chain)))
    assert_equal(fuse(network, (images,)), network, images)


@pytest.mark.slow
@pytest.mark.parametrize("error", [1.0, float("inf"), float("nan")])
def test_unverified_forms_are_not_returned(network, images, monkeypatch, error):
    monkeypatch.setattr(verification, "relative_error", lambda actual, expected: error)
    with pytest.raises(RuntimeError, match="differs from the model by"):
        fuse(network.eval(), (images,))


def test_overflowing_fold_is_not_kept():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=1e-12)).half().eval()
    model[1].running_var.fill_(1e-6)
    with torch.no_grad():
        model[0].weight.mul_(2000)
        model[1].weight.fill_(1e-3)
        model[1].weight.mul_(100)
    x = torch.randn(2, 2, 4, 4).half() * 1e-3
    fused = fuse(model, (x,))
    assert torch.isfinite(fused(x)).all()


def test_forms_without_a_plan(network, images):
    forms, reports = make_forms(network.eval(), inference_module(export(network, Inputs((images,)))), Inputs((images,)))
    assert list(forms) == [
        ("original", "contiguous"),
        ("folded", "contiguous"),
        ("original", "channels_last"),
        ("folded", "channels_last"),
    ]
    assert reports == {}
    for form in forms.values():
        assert_equal(form, network, images)
