"""Random networks: every stretch of linear operators is one chain, and the fused network computes the same."""

import pytest
import torch

import fastentropy as fe
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
    fused = fe.fuse(drawn.model, (x,), measure=False)
    found = [len(chain.names) for chain in fused.report.chains]
    assert [layers for layers in found if layers > 1] == [layers for layers in drawn.pieces if layers > 1], drawn.operators
    assert fused.report.choice == "fused"
    for batch in (1, 2, 5):
        given = torch.randn(batch, *drawn.shape)
        expected = drawn.model(given)
        error = (fused(given) - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, drawn.operators
