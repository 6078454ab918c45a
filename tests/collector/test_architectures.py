"""Collecting on architectures as they are published, held against an oracle that knows nothing of fastentropy."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import fastentropy as fe
from tests._helpers.architectures import ARCHITECTURES, Mode, Subject, outputs_of, prepare, with_speed
from tests._helpers.invisibility import assert_invisible
from tests._helpers.oracle import one_thread
from tests._helpers.statistics import assert_names, assert_same_counts


def assert_equal_outputs(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(outputs) == len(expected) > 0
    assert all(map(torch.equal, outputs, expected))


def assert_collects(subject: Subject, mode: Mode) -> None:
    """Collect over the batches: the counts are the oracle's, every output is what it was."""
    with mode(), fe.collect(subject.model) as collector:
        outputs = [outputs_of(subject.model, inputs) for inputs in subject.batches]
    assert_same_counts(collector.compute(), subject.calls)
    for collected, plain in zip(outputs, subject.outputs, strict=True):
        assert_equal_outputs(collected, plain)


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module", params=[with_speed(name, name) for name in ARCHITECTURES])
def subject(request: pytest.FixtureRequest) -> Subject:
    return prepare(ARCHITECTURES[request.param], torch.inference_mode)


def test_oracle_sees_the_published_calls_in_both_states(subject):
    assert len(subject.calls) == subject.architecture.calls
    both = [((call.counts[:, 0] > 0) & (call.counts[:, 2] > 0)).double().mean() for call in subject.calls]
    assert torch.stack(both).mean() > 0.3


def test_counts_equal_the_oracle_and_outputs_the_model(subject):
    assert_collects(subject, torch.inference_mode)


def test_find_sites_agrees_with_the_oracle(subject):
    sites = fe.find_sites(subject.model, subject.batches[0])
    assert_names([site.name for site in sites], subject.calls)
    found = [(site.name, site.neurons, site.channel_axis) for site in sites]
    assert found == [(site.name, len(call.counts), call.axis) for site, call in zip(sites, subject.calls, strict=True)]


def test_collector_cannot_be_seen(subject):
    with torch.inference_mode():
        assert_invisible(subject.model, lambda: outputs_of(subject.model, subject.batches[0]))


TRAINED = ["convnext_tiny", "efficientnet_b0", "resnet18", "squeezenet1_1", "swin_t", "vit_b_16", "hf_bert", "hf_gpt2", "hf_t5"]


@pytest.mark.parametrize("name", [with_speed(name, name) for name in TRAINED])
def test_collector_cannot_be_seen_in_training(name):
    """Dropout and stochastic depth draw the same random numbers; outputs and gradients are the same bits."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build().train(), architecture.inputs(2)

    def step():
        model.zero_grad()
        outputs = outputs_of(model, inputs)
        sum(output.square().mean() for output in outputs if output.requires_grad).backward()
        return outputs, [weight.grad for weight in model.parameters()]

    assert_invisible(model, step, inside=[])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    "name",
    [with_speed(name, name) for name in ("densenet121", "mobilenet_v2", "swin_t", "vit_b_16", "hf_llama", "hf_whisper")],
)
def test_counts_outside_of_inference_mode(name, mode):
    assert_collects(prepare(ARCHITECTURES[name], mode), mode)
