"""Random networks with activations that treat each neuron by itself: the fused network computes the same."""

import pytest
import torch

import fastentropy as fe
from fastentropy.fusion import path_choice
from tests._helpers.neuronwise_networks import draw_neuronwise_network

#: The number of networks; all but the first few are drawn in slow tests only.
NETWORKS, FAST = 200, 6

SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= FAST)) for seed in range(NETWORKS)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("splits", [False, True], ids=["masks", "paths"])
@torch.no_grad()
def test_drawn_networks_compute_the_same_without_idle_neurons(seed, splits, monkeypatch):
    monkeypatch.setattr(path_choice, "_is_promising", lambda *arguments: splits)
    drawn = draw_neuronwise_network(seed)
    fused = fe.fuse(drawn.model, (torch.randn(2, *drawn.shape),), measure=False)
    assert fused.report.choice == "fused", drawn.blocks
    assert not fused.report.notes
    for batch in (1, 2, 5):
        given = torch.randn(batch, *drawn.shape)
        expected = drawn.model(given)
        error = (fused(given) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, drawn.blocks
