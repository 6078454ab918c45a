"""Entropies as the published code of EASIER computes them (github VGCQ/EASIER, get_entropy_layer in its utils.py)."""

from collections import defaultdict

import pytest
import torch
import torchvision
from torch import Tensor

import fastentropy as fe
from tests._helpers.oracle import neuron_axis, observed_calls, one_thread

pytestmark = pytest.mark.slow

# Model -> pixels. As the oracle does, EASIER takes the last axis of a Swin's activations for the neurons, and axis 1 else.
MODELS = {"resnet18": 40, "mobilenet_v2": 72, "vgg16_bn": 40, "swin_t": 72}


def published_entropy(x: Tensor, axis: int) -> Tensor:
    """The entropy of one layer on one mini-batch in bits: the mean of its neurons' entropies. Zero is on.

    A neuron's share of a state is the mean of the shares at its positions; each of these is over the examples of the batch.
    """
    entropy = torch.zeros(x.shape[axis], dtype=torch.float64)
    for state in (x >= 0, x < 0):
        share = state.sum(0, dtype=torch.float64) / len(x)
        share = share.movedim(axis - 1, 0).flatten(1).mean(1) if share.ndim > 1 else share
        entropy -= share * torch.log2(share.clamp(min=1e-10))
    return entropy.mean()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
@one_thread()
def test_batch_entropies_are_those_of_the_published_procedure(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    batches = [torch.randn(batch, 3, MODELS[name], MODELS[name]) for batch in (4, 3, 2)]  # the last batches are smaller
    published = defaultdict(list)

    def measure(site: str, named: bool, x: Tensor, channels: int) -> None:
        published[site].append(published_entropy(x, neuron_axis(x, channels)))

    for batch in batches:
        with observed_calls(model, measure):
            model(batch)
    with fe.collect(model, average="batch") as collector:
        for batch in batches:
            model(batch)

    measured = collector.compute().layer_entropy(zero="on", average="batch")
    assert list(measured) == list(published)
    assert max(measured.values()) > 0.5
    for site, entropies in published.items():
        assert len(entropies) == len(batches)
        assert measured[site] == pytest.approx(float(torch.stack(entropies).mean()), abs=1e-6), site
