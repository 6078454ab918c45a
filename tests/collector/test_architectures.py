"""Collecting on architectures as they are published, held against an oracle that knows nothing of fastentropy."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import fastentropy as fe
from tests._helpers.architectures import ARCHITECTURES, Mode, Subject, outputs_of, prepare, with_speed
from tests._helpers.oracle import PATCHED, one_thread
from tests._helpers.snapshots import assert_unchanged, snapshot
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


def test_nothing_is_left_behind(subject):
    def state_of_pytorch() -> list[object]:
        hooks = [value for name, value in sorted(vars(nn.modules.module).items()) if name.startswith("_global")]
        return [getattr(owner, name) for owner, name in PATCHED] + [nn.Module.__call__, *map(str, hooks)]

    model, inputs = subject.model, subject.batches[0]
    before, kinds, functions = snapshot(model), [type(module) for module in model.modules()], state_of_pytorch()
    with torch.inference_mode():
        with fe.collect(model):
            outputs_of(model, inputs)
        assert_unchanged(model, before)
        assert [type(module) for module in model.modules()] == kinds
        assert state_of_pytorch() == functions
        assert_equal_outputs(outputs_of(model, inputs), subject.outputs[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    "name",
    [with_speed(name, name) for name in ("densenet121", "mobilenet_v2", "swin_t", "vit_b_16", "hf_llama", "hf_whisper")],
)
def test_counts_outside_of_inference_mode(name, mode):
    assert_collects(prepare(ARCHITECTURES[name], mode), mode)
