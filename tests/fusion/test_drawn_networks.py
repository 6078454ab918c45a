"""Random networks: every stretch of linear operators is one chain, and the fused network computes the same."""

import pytest
import torch

import fastentropy as fe
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.drawn_networks import draw_network

#: The number of networks of each kind; all but the first few are drawn in slow tests only.
NETWORKS, FAST = 150, 3

SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= FAST)) for seed in range(NETWORKS)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("active", [False, True], ids=["linear", "active"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_drawn_networks_are_fused(seed, active):
    drawn = draw_network(2 * seed + active, active)
    x = torch.randn(2, *drawn.shape)
    module = inference_module(export(drawn.model, Inputs((x,))))
    assert [sorted(chain.names) for chain in find_chains(module)] == [sorted(piece) for piece in drawn.pieces], drawn.operators
    fused = fe.fuse(drawn.model, (x,), measure=False)
    assert fused.report.choice == "fused"
    for batch in (1, 2, 5):
        given = torch.randn(batch, *drawn.shape)
        expected = drawn.model(given)
        error = (fused(given) - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, drawn.operators
