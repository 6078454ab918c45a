import copy
import threading

import pytest
import torch
from torch import nn

from conftest import assert_unchanged, snapshot
from fastentropy import collect


def plain_counts(x, axis):
    """The states of a tensor, per neuron, without any of our code."""
    values = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    return torch.stack([(values < 0).sum(1), (values == 0).sum(1), (values > 0).sum(1)], dim=1)


def plain_inputs(model, images):
    """What `Residual` feeds its activations, computed step by step."""
    x1 = model.bn1(model.conv1(images))
    y1 = x1.clone().relu()
    x2 = model.bn2(model.conv2(y1)) + y1
    x3 = model.fc1(x2.clone().relu().flatten(1))
    return {"relu1": x1, "relu2": x2, "gelu": x3}


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


def test_nan_is_counted_apart():
    model = nn.Sequential(nn.ReLU())
    with collect(model) as collector:
        model(torch.tensor([[float("nan"), -1.0], [2.0, float("nan")], [0.0, float("nan")]]))
    site = collector.compute()["0"]
    assert site.counts.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert site.nan == 3


def test_model_is_unchanged_afterwards(network, images):
    before = snapshot(network.eval())
    with collect(network):
        network(images)
    assert_unchanged(network, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_model_is_unchanged_after_an_exception_in_the_middle_of_the_first_pass(network, images, error):
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


def test_collecting_goes_on_after_a_pass_that_failed(network, images):
    network.eval()
    with collect(network) as collector:
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 2, 5, 5))
        network(images)
    expected = plain_inputs(network, images)
    assert all(torch.equal(collector.compute()[name].counts, plain_counts(x, 1)) for name, x in expected.items())


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


def test_a_compiled_model_is_refused_not_miscounted():
    part = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    for model in (torch.compile(part), nn.Sequential(nn.ReLU(), torch.compile(part))):
        with pytest.raises(RuntimeError, match=r"is compiled .* before torch\.compile"):
            collect(model).attach()
    assert not any(module._forward_pre_hooks for module in part.modules())


def test_an_input_of_another_shape_names_the_site():
    model = nn.Sequential(nn.ReLU())
    with collect(model):
        model(torch.zeros(2, 3))
        with pytest.raises(RuntimeError, match="site '0' had 3 neurons on axis 1"):
            model(torch.zeros(2, 4))


def test_a_pass_that_failed_is_in_no_batch_average():
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    with collect(model, average="batch") as collector:
        model(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 2, 3))
        model(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
    assert collector.compute()["0"].entropy(average="batch").tolist() == [1, 0]


def test_calls_of_a_module_are_counted_apart():
    model = nn.Sequential(relu := nn.ReLU(), nn.Flatten(), nn.Linear(2, 2), relu)
    nn.init.constant_(model[2].weight, 0)
    nn.init.constant_(model[2].bias, 1)
    with collect(model) as collector:
        model(-torch.ones(3, 2))
        model(-torch.ones(3, 2))
    statistics = collector.compute()
    assert statistics["0"].counts.tolist() == [[6, 0, 0]] * 2
    assert statistics["0:1"].counts.tolist() == [[0, 0, 6]] * 2


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


def test_pausing_in_the_first_batch_does_not_shift_the_batch_average(network, images):
    network.eval()
    with collect(network, average="batch") as collector:
        with collector.paused():
            network(images)
        network(images)
    assert collector.compute()["gelu"].batches == 1


def test_reset_forgets_but_stays_attached(network, images):
    network.eval()
    with collect(network, average="batch") as collector:
        network(images)
        collector.reset()
        network(images[:1])
    site = collector.compute()["gelu"]
    assert (int(site.counts.sum()), site.batches) == (8, 1)


def test_statistics_do_not_change_when_more_is_counted(network, images):
    network.eval()
    with collect(network) as collector:
        network(images)
        early = collector.compute()
        before = early["gelu"].counts.clone()
        network(images)
    assert torch.equal(early["gelu"].counts, before)


def test_nothing_counted_says_what_to_do(network):
    with collect(network) as collector, pytest.raises(RuntimeError, match="run the model while the collector is attached"):
        collector.compute()


def test_a_call_around_the_model_is_an_error_not_a_wrong_count():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    with collect(model), pytest.raises(RuntimeError, match=r"'0\.1' ran outside of a call of the watched model"):
        model[0](torch.zeros(1, 2))


def test_a_site_that_appears_later_needs_its_axis_named():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.always, self.later = nn.Linear(2, 3), nn.ReLU(), nn.ReLU()

        def forward(self, x, deep):
            y = self.always(self.fc(x))
            return self.later(y.T) if deep else y

    model = Sometimes()
    with collect(model) as collector:
        model(torch.zeros(1, 2), deep=False)
        with pytest.raises(RuntimeError, match=r"channel_axis=\{'later': 1\}"):
            model(torch.zeros(1, 2), deep=True)
    with collect(model, channel_axis={"later": 0}) as collector:
        model(torch.zeros(1, 2), deep=False)
        model(torch.zeros(1, 2), deep=True)
    assert collector.compute()["later"].neurons == 3


def test_channel_axis_can_be_named_and_is_checked():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with collect(model, channel_axis={"1": -2}) as collector:
        model(torch.zeros(5, 2))
    assert collector.compute()["1"].neurons == 5
    with collect(model, channel_axis={"1": 2}), pytest.raises(ValueError, match="channel_axis of site '1' is 2"):
        model(torch.zeros(5, 2))


def test_unknown_average_is_refused(network):
    with pytest.raises(ValueError, match="'epoch'"):
        collect(network, average="epoch")


def test_training_steps_are_counted_and_learn_as_without(network, images):
    def gradients(model):
        model.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    network.eval()
    expected = gradients(network)
    with collect(network) as collector:
        actual = gradients(network)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert collector.compute()["gelu"].counts.sum() == 4 * 8


def test_models_in_several_threads_do_not_mix():
    def work(index):
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        with collect(model) as collector:
            for _ in range(20):
                model(torch.randn(8, 2))
        totals[index] = int(collector.compute()["1"].counts.sum())

    totals = [0] * 4
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == [20 * 8 * 2] * 4
