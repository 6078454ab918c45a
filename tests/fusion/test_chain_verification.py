"""Chains are judged by themselves where a network amplifies its own rounding, and only those that are wrong are left."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastentropy import FusionReport, fuse
from fastentropy.fusion import api, chain_verification, forms
from fastentropy.fusion.chain_verification import judge_chains, rewrite_equal
from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import BorderCorrected
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.doubles import InDouble
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.planner import plan_chain
from fastentropy.fusion.tracing import export, inference_module, values_of
from fastentropy.fusion.verification import EquivalenceCheck, Judgement
from tests._helpers.fusing import Amplifier, ringed
from tests._helpers.linear_networks import NETWORKS
from tests._helpers.networks import Reads

pytestmark = pytest.mark.usefixtures("counted_times")

#: How far each dtype is from float64 in the networks below, at least and at most.
OWN_ERROR = {torch.float32: (1e-4, 0.1), torch.bfloat16: (0.05, 0.5), torch.float16: (0.01, 0.5)}


def own_error(model, x):
    """How far a model is from itself in float64, relative to its largest output."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        return float((model(x).double() - exact).abs().max() / exact.abs().max())


def scaled(chain, factor):
    """A chain whose output is off by a factor."""
    last = chain[-1]
    return (*chain[:-1], replace(last, weight=factor * last.weight, bias=factor * last.bias))


def plan_with(monkeypatch, factors):
    """Make `fuse` merge every chain, and make those of some names wrong by a factor."""
    plan_chain = api.plan_chain

    def plan(chain, *arguments, **options):
        form, report = plan_chain(chain, *arguments, **options)
        return scaled(form, factors.get(chain.names[0], 1.0)), report

    monkeypatch.setattr(api, "plan_chain", plan)


@pytest.mark.parametrize(("dtype", "gain"), [(torch.float32, 6.0), (torch.bfloat16, 2.0), (torch.float16, 2.0)])
def test_chains_of_a_network_that_amplifies_rounding_are_kept(dtype, gain):
    model, x = Amplifier(gain=gain).to(dtype).eval(), torch.randn(5, 16).to(dtype)
    low, high = OWN_ERROR[dtype]
    assert low < own_error(model, x) < high
    report = fuse(model, (x,)).report
    assert report.choice == "fused"
    assert [chain.choice for chain in report.chains] == ["merge"] * 6
    assert "times the rounding error of the model itself" in report.bound
    assert report.bound in str(report)
    assert FusionReport.from_dict(report.to_dict()) == report


def test_chains_are_kept_where_rounding_decides_the_outputs():
    """The outputs of the network are noise; each chain is right by itself, and the trace gives the outputs of the model."""
    model, x = Amplifier(blocks=12, gain=9.0).eval(), torch.randn(5, 16)
    assert own_error(model, x) > 0.5
    report = fuse(model, (x,)).report
    assert [chain.choice for chain in report.chains] == ["merge"] * 12


def test_nothing_is_rewritten_where_a_wrong_trace_could_hide_in_rounding():
    traced, chains, sources, inputs = parts(Amplifier(blocks=12, gain=9.0).eval(), torch.randn(5, 16))
    other = Amplifier(blocks=12, gain=9.1).eval()
    check = EquivalenceCheck(other, inputs, lambda inputs: False, 1e-5)
    with torch.no_grad():
        left = rewrite_equal(traced, {chain: chain.elements for chain in chains}, sources, check).left
    assert set(left.values()) == {"left as it was: rounding decides the outputs of the model"}
    assert list(left) == chains


def test_bound_is_the_tolerance_where_that_suffices():
    model = Amplifier(blocks=1, gain=1.0).eval()
    assert fuse(model, (torch.randn(5, 16),)).report.bound == "the tolerance of 1e-05"
    assert fuse(model, (torch.randn(5, 16),), tolerance=1e-4).report.bound == "the tolerance of 1e-04"


@pytest.mark.parametrize("wrong", [["blocks.0.0"], ["blocks.5.0"], ["blocks.1.0", "blocks.4.0"]])
def test_only_wrong_chains_are_left(monkeypatch, wrong):
    """A chain that is off by 1e-3 is found although the outputs of the network itself are further from float64."""
    model, x = Amplifier(gain=9.0).eval(), torch.randn(5, 16)
    assert own_error(model, x) > 1e-3
    plan_with(monkeypatch, dict.fromkeys(wrong, 1.001))
    report = fuse(model, (x,)).report
    left = {chain.names[0]: chain.note for chain in report.chains if chain.choice == "keep"}
    assert list(left) == wrong
    assert all(
        note.startswith("left as it was: its output differs by 1e-03, more than the tolerance") for note in left.values()
    )


def test_number_of_compared_networks_does_not_grow_with_the_chains(monkeypatch):
    counted = []
    original = EquivalenceCheck.judge
    monkeypatch.setattr(EquivalenceCheck, "judge", lambda self, form: counted.append(form) or original(self, form))
    numbers = []
    for blocks in (5, 10):
        counted.clear()
        plan_with(monkeypatch, {"blocks.2.0": 1.001})
        fuse(Amplifier(blocks=blocks, gain=6.0).eval(), (torch.randn(5, 16),))
        numbers.append(len(counted))
    assert max(numbers) < 8


@pytest.mark.parametrize(("gain", "models"), [(0.5, 0), (9.0, 1)])
def test_runs_in_float64_only_where_it_is_needed(monkeypatch, gain, models):
    made = []
    prepare = InDouble.__init__
    monkeypatch.setattr(InDouble, "__init__", lambda self, model: made.append(self) or prepare(self, model))
    fuse(Amplifier(gain=gain).eval(), (torch.randn(5, 16),))
    assert len(made) == models


def test_random_model_has_no_bound_of_its_own():
    model = Reads(lambda m, x: m.b(m.a(x)) + torch.rand_like(x), a=nn.Linear(3, 3), b=nn.Linear(3, 3)).eval()
    check = EquivalenceCheck(model, Inputs((torch.ones(2, 3),)), lambda inputs: True, 1e-5)
    assert check.is_random
    assert not check.judge(model).holds
    assert not EquivalenceCheck(Amplifier().eval(), Inputs((torch.randn(2, 16),)), lambda inputs: True, 1e-5).is_random


def parts(model, x):
    """The trace of a model, its chains, and their inputs."""
    inputs = Inputs((x,))
    traced = inference_module(export(model, inputs))
    chains = find_chains(traced)
    with torch.no_grad():
        return traced, chains, values_of(traced, [chain.source for chain in chains], inputs), inputs


def fails(chain):
    """A form that does not take the values of a chain."""
    return (replace(chain.elements[0], weight=torch.zeros(3, 5, dtype=torch.float64)),)


@torch.no_grad()
def test_each_chain_runs_on_the_values_that_it_gets_in_the_network():
    x = torch.randn(4, 16)
    traced, chains, sources, inputs = parts(Amplifier(blocks=4).eval(), x)
    forms = dict(zip(chains, (chain.elements for chain in chains), strict=True))
    forms[chains[1]] = scaled(forms[chains[1]], 1.25)
    forms[chains[2]] = fails(chains[2])
    judged = judge_chains(traced, forms, sources, [inputs, Inputs((10 * x[:1],))], 1e-5)
    assert [each.holds for each in judged.values()] == [True, False, False, True]
    assert judged[chains[1]].error == pytest.approx(0.25)
    assert judged[chains[2]].error == float("inf")


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_forms_of_every_network(name):
    """The planned and the folded form hold, behind the views of their chain too, and a form that is off does not."""
    model, x, _ = NETWORKS[name]
    traced, chains, sources, inputs = parts(model.eval(), x)
    planned = {chain: plan_chain(chain, sources[chain.source], 1e-5, measure=False)[0] for chain in chains}
    for made in (planned, {chain: chain.folded for chain in chains}):
        assert all(each.holds for each in judge_chains(traced, made, sources, [inputs], 1e-5).values())
    off = {chain: scaled(chain.elements, 1.5) for chain in chains if isinstance(chain.elements[-1], AffineOperator)}
    assert all(each.error > 0.1 for each in judge_chains(traced, off, sources, [inputs], 1e-5).values())


@torch.no_grad()
def test_form_that_returns_its_input():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    nn.init.eye_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    traced, (first, second), sources, inputs = parts(model, torch.randn(3, 4))
    judged = judge_chains(traced, {first: first.elements, second: ()}, sources, [inputs], 1e-5)
    assert [each.holds for each in judged.values()] == [True, True]
    judged = judge_chains(traced, {first: (), second: second.elements}, sources, [inputs], 1e-5)
    assert [each.holds for each in judged.values()] == [False, True]


@torch.no_grad()
def test_border_strips_are_written_before_the_form_is_judged():
    """The output of a merged chain is wrong at the border until the last operators of its form have run."""
    model, x = ringed()
    traced, (chain,), sources, inputs = parts(model, x)
    form = merge(chain.elements, x.shape[2:], "exact")
    assert any(isinstance(element, BorderCorrected) for element in form)
    (judged,) = judge_chains(traced, {chain: form}, sources, [inputs], 1e-5).values()
    assert judged.error < 1e-5
    wrong = replace(form[0], strips=form[0].strips[1:])
    (judged,) = judge_chains(traced, {chain: (wrong,)}, sources, [inputs], 1e-5).values()
    assert judged.error > 1e-3


@torch.no_grad()
def test_interleaved_chains_and_operators_in_place():
    """Two branches are chains of their own, and their layers alternate in the graph."""

    def forward(m, x):
        y = x.sin()
        one, other = m.a(y), m.b(x.cos())
        one = one.mul_(2)
        other, one = m.c(other), m.d(one)
        return one.tanh() + other.tanh()

    model = Reads(forward, **{name: nn.Linear(6, 6) for name in "abcd"}).eval()
    traced, chains, sources, inputs = parts(model, torch.randn(3, 6))
    assert sorted(chain.names for chain in chains) == [("a", "d"), ("b", "c")]
    judged = judge_chains(traced, {chain: chain.elements for chain in chains}, sources, [inputs], 1e-6)
    assert all(each.error < 1e-6 for each in judged.values())
    wrong = {chain: scaled(chain.elements, 1.5) for chain in chains}
    assert all(each.error > 0.1 for each in judge_chains(traced, wrong, sources, [inputs], 1e-6).values())


class Pairs:
    """A check by which two given chains must not both be rewritten, and no chain is wrong alone.

    Attributes:
        tried: how many networks were judged.
    """

    tolerance = 1e-5

    def __init__(self, one: int, other: int) -> None:
        self.tried = 0
        self._pair = one, other

    def judge(self, module):
        self.tried += 1
        operators = [node for node in module.graph.nodes if node.op == "call_function"]
        blocks, merged = [], 0
        for node in operators:
            merged += "linear" in str(node.target)
            if "sin" in str(node.target):
                blocks, merged = [*blocks, merged == 1], 0
        return Judgement(1.0 if all(blocks[index] for index in self._pair) else 0.0, 0.1, "")

    def smallest_inputs(self):
        return [Inputs((torch.randn(1, 16),))]


@torch.no_grad()
@pytest.mark.parametrize("pair", [(0, 1), (0, 15), (7, 8), (3, 12)])
def test_chains_that_are_wrong_together_are_bisected(pair):
    traced, chains, sources, _ = parts(Amplifier(blocks=16, gain=1.0).eval(), torch.randn(2, 16))
    forms = {chain: merge(chain.elements, torch.Size(()), "exact") for chain in chains}
    check = Pairs(*pair)
    rewritten = rewrite_equal(traced, forms, sources, check)
    assert len(rewritten.left) == 1
    assert chains.index(next(iter(rewritten.left))) in pair
    assert check.judge(rewritten.module).holds
    assert check.tried < 16


@pytest.mark.parametrize(("gain", "compared"), [(0.5, False), (9.0, True)])
def test_folded_networks_are_compared_where_rounding_is_amplified(monkeypatch, gain, compared):
    checks = []
    original = chain_verification.rewrite_equal
    monkeypatch.setattr(forms, "rewrite_equal", lambda *given: checks.append(given[3] is not None) or original(*given))
    fuse(Amplifier(gain=gain).eval(), (torch.randn(5, 16),))
    assert checks == [True, compared]


def test_nothing_is_judged_where_all_is_within_the_tolerance(monkeypatch):
    monkeypatch.setattr(chain_verification, "judge_chains", lambda *arguments: pytest.fail("judged"))
    assert fuse(Amplifier(gain=0.5).eval(), (torch.randn(5, 16),)).report.choice == "fused"
