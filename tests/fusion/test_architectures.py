"""Fusing published architectures: equal outputs, whichever activations were taken out."""

import pytest
import torch

import fastentropy as fe
from fastentropy.benchmarks.networks import (
    VISION,
    gpt2,
    hugging_face_vit,
    inside_blocks,
    linearised,
    random_half,
    randomize_batch_norm,
    vision,
)
from tests._helpers.snapshots import assert_unchanged, snapshot

pytestmark = pytest.mark.slow

BUILDERS = {name: lambda name=name: vision(name, 2, 64) for name in VISION}
BUILDERS |= {
    "vit_b_16": lambda: with_three_layers(vision("vit_b_16", 2, 64)),
    "Hugging Face GPT-2": lambda: gpt2(9, 2, layers=2),
    "Hugging Face ViT": lambda: hugging_face_vit(64, 2, layers=2),
}


def with_three_layers(case):
    """A Vision Transformer of torchvision with fewer layers, which are all alike."""
    model, inputs = case
    del model.encoder.layers[3:]
    return model, inputs


@pytest.mark.parametrize("name", BUILDERS)
def test_fused_architecture(name):
    torch.manual_seed(len(name))
    model, inputs = linearised(randomize_batch_norm(BUILDERS[name]()), random_half)
    before = snapshot(model)
    fused = fe.fuse(model, inputs, measure=False)
    assert_unchanged(model, before)
    assert fused.report.choice == "fused"
    assert fused.report.max_relative_error <= 1e-5
    with torch.no_grad():
        actual, expected = (form(*inputs) for form in (fused, model))
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (actual, expected)), strict=True):
        assert other.any()
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_blocks_of_mobilenet_become_one_operator():
    model, inputs = linearised(randomize_batch_norm(vision("mobilenet_v2", 2, 64)), inside_blocks)
    fused = fe.fuse(model, inputs, measure=False)
    calls = [node for node in fused.graph_module.graph.nodes if "conv2d" in str(node.target)]
    assert len(calls) <= 1 + 17 + 1
    assert fused.report.max_relative_error <= 1e-5
