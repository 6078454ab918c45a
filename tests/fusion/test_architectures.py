"""Fusing published architectures: equal outputs, whichever activations were taken out."""

import pytest
import torch
from torch import nn
from torchvision.models import vgg
from transformers import GPT2Config, GPT2LMHeadModel

import fastentropy as fe
from fastentropy.benchmarks.networks import (
    VISION,
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
    "vgg16_bn": lambda: narrow_vgg(),
    "vit_b_16": lambda: with_three_layers(vision("vit_b_16", 2, 64)),
    "Hugging Face GPT-2": lambda: narrow_gpt2(),
    "Hugging Face ViT": lambda: hugging_face_vit(64, 2, layers=2),
}


def narrow_vgg():
    """The layers of vgg16_bn with an eighth of its channels. The products of two of its kernels are long sums."""
    widths = [width if width == "M" else width // 8 for width in vgg.cfgs["D"]]
    model = vgg.VGG(vgg.make_layers(widths, batch_norm=True))
    for index, (inputs, outputs) in {0: (64 * 7 * 7, 64), 3: (64, 64), 6: (64, 10)}.items():
        model.classifier[index] = nn.Linear(inputs, outputs)
    return model.eval(), (torch.randn(2, 3, 64, 64),)


def narrow_gpt2():
    """Two layers of GPT-2 with a twelfth of its features and few words."""
    config = GPT2Config(use_cache=False, n_layer=2, n_embd=64, n_head=4, vocab_size=101)
    return GPT2LMHeadModel(config).eval(), (torch.randint(0, 101, (2, 9)),)


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
