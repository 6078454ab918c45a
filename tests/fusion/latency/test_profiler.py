"""The latency table of a network: its parts, its stretches, and what it predicts against the fused networks."""

import copy
import functools

import pytest
import torch
from torch import nn

from fastentropy import find_sites, linearize
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.latency import profiler
from fastentropy.fusion.latency.profiler import measure_latency
from fastentropy.fusion.planner import TIE, plan_chain
from fastentropy.fusion.pricing import MULTIPLICATIONS_PER_BYTE, counted
from fastentropy.fusion.tracing import export, inference_module, values_of
from fastentropy.recipes.digits import DigitsNet
from tests._helpers.networks import Residual
from tests._helpers.snapshots import assert_unchanged, snapshot


def all_sections(sections):
    """Yield some sections and those of their branches."""
    for section in sections:
        yield section
        for part in section.parts:
            yield from all_sections(part.branches)


def parts_of(table):
    return [part for section in all_sections(table.sections) for part in section.parts]


def stretches_of(table):
    return [stretch for section in all_sections(table.sections) for stretch in section.stretches]


def names(model, x):
    return [site.name for site in find_sites(model, (x,))]


@pytest.mark.usefixtures("counted_costs")
def test_every_site_is_one_part_and_the_model_stays(network):
    network.eval()
    x = torch.randn(4, 1, 5, 5)
    before = snapshot(network)
    table = measure_latency(network, (x,), names(network, x))
    assert_unchanged(network, before)
    assert sorted(part.site for part in parts_of(table) if part.site) == ["gelu", "relu1", "relu2"]
    assert (table.original, table.fastest(()).milliseconds) == (2e9, pytest.approx(1e9))


def counted_cost(model, x, removed):
    """Count the cost of a network without some activations, in the forms that `plan_chain` chooses."""
    model = copy.deepcopy(model)
    linearize(model, removed)
    traced = inference_module(export(model, Inputs((x,))))
    chains = find_chains(traced)
    sources = values_of(traced, [chain.source for chain in chains], Inputs((x,)))
    forms = {chain: plan_chain(chain, sources[chain.source], 1e-5, measure=False)[0] for chain in chains}
    inner = {member for chain in chains for member in chain.members}
    outside = [node for node in traced.graph.nodes if node.op == "call_function" and node not in inner]
    values = values_of(traced, outside, Inputs((x,)))  # activations read one value and write one, additions read two
    moved = sum((3 if "add" in node.name else 2) * value.numel() * value.itemsize for node, value in values.items())
    in_chains = counted(forms, {chain: sources[chain.source] for chain in chains})
    return sum(in_chains.values()) + MULTIPLICATIONS_PER_BYTE * moved


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_predicted_savings_are_those_of_the_fused_networks():
    torch.manual_seed(0)
    model, x = DigitsNet(channels=8, blocks=2).eval(), torch.randn(8, 1, 8, 8)
    table, dense = measure_latency(model, (x,), names(model, x)), counted_cost(model, x, [])
    for removed in (["stage1.0.relu"], ["stage2.0.relu", "stage2.1.relu"], ["stage1.1.relu", "down.relu"], names(model, x)):
        predicted = table.fastest(()).milliseconds - table.fastest(removed).milliseconds
        actual = dense - counted_cost(model, x, removed)
        assert predicted == pytest.approx(actual, abs=TIE * dense)
        assert actual > 0


@pytest.mark.slow
@pytest.mark.usefixtures("counted_costs")
def test_a_block_without_its_activation_is_one_stretch():
    torch.manual_seed(0)
    model, x = DigitsNet(channels=8, blocks=1).eval(), torch.randn(8, 1, 8, 8)
    sets = [stretch.sites for stretch in stretches_of(measure_latency(model, (x,), names(model, x)))]
    assert frozenset(["stage1.0.relu"]) in sets
    assert frozenset(["stage2.0.relu"]) in sets


class TwoConvolutions(nn.Module):
    """A residual block as in ResNet."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + x)


@pytest.mark.usefixtures("counted_costs")
@pytest.mark.parametrize("approximate", [True, False])
def test_convolutions_are_approximated_only_on_request(approximate):
    model, x = TwoConvolutions().eval(), torch.randn(2, 8, 12, 12)
    table = measure_latency(model, (x,), ["relu1", "relu2"], approximate=approximate)
    projected = [stretch for stretch in stretches_of(table) if stretch.modules]
    assert [stretch.modules for stretch in projected] == [("conv1", "bn1", "relu1", "conv2", "bn2")] * approximate
    assert table.fastest(["relu2"]).projected == ()
    assert table.fastest(["relu1"]).projected == (("conv1", "bn1", "relu1", "conv2", "bn2"),) * approximate


@pytest.mark.usefixtures("counted_costs")
def test_a_module_called_twice_is_not_approximated():
    class Twice(TwoConvolutions):
        def forward(self, x):
            return self.conv1(self.relu1(self.conv1(x)))

    x = torch.randn(2, 8, 12, 12)
    table = measure_latency(Twice().eval(), (x,), ["relu1"], approximate=True)
    assert not [stretch for stretch in stretches_of(table) if stretch.modules]


@pytest.mark.slow
def test_times_are_measured():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(16, 1, 5, 5)
    table = measure_latency(model, (x,), ["relu1", "relu2", "gelu"])
    assert table.original > 0
    assert all(part.milliseconds > 0 for part in parts_of(table) if part.site)
    assert table.fastest(["relu1", "relu2", "gelu"]).milliseconds < table.fastest(()).milliseconds


def test_a_site_outside_of_the_trace_is_named():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.fc = nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.relu.forward(x))

    with pytest.raises(ValueError, match=r"^relu: activations that torch\.export does not show"):
        measure_latency(Direct().eval(), (torch.randn(2, 4),), ["relu"])


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU, functools.partial(nn.LeakyReLU, 0.01)])
def test_activations_in_place_are_timed_on_constant_values(activation):
    """SiLU, applied in place again and again, would end in denormal numbers, which take many times as long."""
    module, x = profiler._repeatable(activation(inplace=True)), torch.randn(1000)
    for _ in range(200):
        module(x)
    assert (x.abs() > 1e-30).float().mean() > 0.4
