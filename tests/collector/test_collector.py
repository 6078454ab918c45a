"""Collecting around a loop of the user: counts are exact, and the model is left as it was."""

import copy
import gc

import pytest
import torch
from torch import nn

from fastentropy import collect
from tests._helpers.counts import plain_counts
from tests._helpers.networks import plain_inputs
from tests._helpers.snapshots import assert_unchanged, snapshot
from tests._helpers.statistics import counted


def batches(count=3):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 1, 5, 5, generator=generator) for size in range(1, count + 1)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_counts_are_those_of_the_whole_data_set(network, mode):
    network.eval()
    with mode(), collect(network) as collector:
        for batch in batches():
            network(batch)
    statistics = collector.compute()
    for name, x in plain_inputs(network, torch.cat(batches())).items():
        assert torch.equal(statistics[name].counts, plain_counts(x, 1)), name
        assert statistics[name].nan == 0
    assert list(statistics) == ["relu1", "relu2", "gelu"]


def test_outputs_are_not_changed(network, images):
    network.eval()
    expected = network(images)
    with collect(network):
        assert torch.equal(network(images), expected)
        assert torch.equal(network(images), expected)


def test_model_is_unchanged_afterwards(network, images):
    before = snapshot(network.eval())
    with collect(network):
        network(images)
    assert_unchanged(network, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_model_is_unchanged_after_an_exception_in_a_pass(network, images, error):
    network.eval()
    before = snapshot(network)

    def fail(module, args):
        raise error

    hook = network.fc1.register_forward_pre_hook(fail)
    with pytest.raises(error), collect(network):
        network(images)
    hook.remove()
    assert_unchanged(network, before)
    assert torch.equal(network(images), network(images))


def test_a_second_collector_on_one_model_is_refused(network, images):
    with collect(network) as collector:
        with pytest.raises(RuntimeError, match="detach it first"), collect(network):
            pass
        network(images)
    assert collector.compute()["gelu"].counts.sum() == 4 * 8


@pytest.mark.parametrize("own_forward", [False, True])
def test_a_forward_of_the_instance_is_put_back(network, images, own_forward):
    if own_forward:
        network.forward = lambda x: type(network).forward(network, x) * 2
    before = dict(vars(network))
    with collect(network.eval()) as collector:
        network(images)
    assert {name: value for name, value in vars(network).items() if name != "training"} == {
        name: value for name, value in before.items() if name != "training"
    }
    assert collector.compute()["gelu"].counts.sum() == 4 * 8


def test_a_forward_that_the_user_sets_meanwhile_stays(network, images):
    with collect(network):
        network.forward = replacement = lambda x: x
    assert network.forward is replacement


def test_a_copy_made_meanwhile_is_a_network_of_its_own(network, images):
    network.eval()
    with collect(network) as collector:
        network(images)
        duplicate = copy.deepcopy(network)
        nn.init.constant_(duplicate.fc2.weight, 3.0)
        inside = duplicate(images)
    assert not torch.equal(inside, network(images))
    assert torch.equal(duplicate(images), inside)
    assert collector.compute()["gelu"].counts.sum() == 4 * 8
    with collect(duplicate) as second:
        duplicate(images)
    assert second.compute()["gelu"].counts.sum() == 4 * 8


def test_batch_average_gives_every_batch_the_same_weight(network):
    network.eval()
    with collect(network, average="batch") as collector:
        for batch in batches():
            network(batch)
    averaged = collector.compute().layer_entropy("on", "batch")
    singles = []
    for batch in batches():
        with collect(network) as single:
            network(batch)
        singles.append(single.compute().layer_entropy("on"))
    for name, value in averaged.items():
        assert value == pytest.approx(sum(each[name] for each in singles) / len(singles), abs=1e-12)


def test_batch_average_keeps_the_exact_counts_too(network, images):
    with collect(network.eval(), average="batch") as collector:
        network(images)
        network(images)
    with collect(network) as plain:
        network(images)
        network(images)
    assert collector.compute().layer_entropy() == plain.compute().layer_entropy()


def test_nothing_is_counted_while_paused_or_after_detaching(network, images):
    network.eval()
    with collect(network) as collector:
        with collector.paused():
            network(images)
        network(images[:1])
    network(images)
    assert collector.compute()["gelu"].counts.sum() == 8


def test_pausing_in_the_first_batch_keeps_the_batch_average(network, images):
    network.eval()
    with collect(network, average="batch") as collector:
        with collector.paused():
            network(images)
        network(images)
    assert collector.compute()["gelu"].batches == 1


def test_update_counts_a_batch_attached_or_not(network, images):
    collector, before = collect(network.eval()), snapshot(network)
    assert torch.equal(collector.update(images), network(images))
    assert_unchanged(network, before)
    with collector:
        collector.update(images)
        collector.update(x=images)
    assert collector.compute()["gelu"].counts.sum() == 3 * 4 * 8


def test_nothing_counted_says_what_to_do(network):
    with collect(network) as collector, pytest.raises(RuntimeError, match="run the model while the collector is attached"):
        collector.compute()


def test_unknown_average_is_refused(network):
    with pytest.raises(ValueError, match="'epoch'"):
        collect(network, average="epoch")


@pytest.mark.slow
def test_hundreds_of_collectors_leak_nothing(network, images):
    network.eval()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    def added(cycles):
        before = objects()
        for _ in range(cycles):
            with collect(network):
                network(images)
        return objects() - before

    with torch.inference_mode():
        added(20)
        snap = snapshot(network)
        assert any(added(300) < 30 for _ in range(2))  # what other tests leave to run later adds objects once
    assert_unchanged(network, snap)


def test_attaching_again_goes_on_counting(network, images):
    collector = collect(network.eval())
    for _ in range(3):
        with collector:
            network(images)
        network(images)
    assert counted(collector)["gelu"] == 3 * 4 * 8


def test_a_part_of_a_watched_model_is_refused(network, images):
    model = nn.Sequential(network.eval())
    with collect(model) as collector:
        with pytest.raises(RuntimeError, match="detach it first"):
            collect(network).attach()
        model(images)
    assert counted(collector)["0.gelu"] == 32


def test_a_model_without_activations_is_told_what_to_do():
    model = nn.Linear(2, 2)
    with collect(model) as collector:
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"Linear calls no known activation.*register_activation"):
        collector.compute()
