"""What a pass is: threads, replicas, functions, checkpointing, and passes that raise."""

import threading
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastentropy import collect
from tests._helpers.counts import plain_counts
from tests._helpers.networks import make_part, plain_inputs
from tests._helpers.statistics import counted


def test_collecting_goes_on_after_a_pass_that_failed(network, images):
    network.eval()
    with collect(network) as collector:
        with pytest.raises(RuntimeError):
            network(torch.zeros(1, 2, 5, 5))
        network(images)
    expected = plain_inputs(network, images)
    assert all(torch.equal(collector.compute()[name].counts, plain_counts(x, 1)) for name, x in expected.items())


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


def test_a_part_that_is_called_directly_is_counted():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), nn.Flatten(), nn.Sequential(nn.Linear(8, 3), nn.GELU()))
    x = torch.randn(5, 1, 2, 2)
    with collect(model) as collector:
        model[2](model[1](model[0](x)))
        model(x)
        model[0][1](model[0][0](x))
    sites = collector.compute()
    assert counted(collector) == {"0.1": 3 * 40, "2.1": 2 * 15}
    assert torch.equal(sites["0.1"].counts, 3 * plain_counts(model[0][0](x), 1))


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


class Functional(nn.Module):
    """Activations as functions, in place and as methods, beside a module of the same name."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.relu = nn.Conv2d(3, 6, 3), nn.Linear(6, 4), nn.ReLU()

    def inputs(self, x):
        """What each activation reads, in order."""
        first = self.conv(x)
        second = self.fc(first.clamp(min=0).mean([2, 3]))
        third = second.clamp(min=0)
        return {"relu_1": first, "relu_1:1": second, "relu": third, "gelu": third}

    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True).mean([2, 3])
        return F.gelu(self.relu(self.fc(x).relu_()))


@pytest.mark.filterwarnings("ignore:.*fe.isolate")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_functional_activations_are_counted_before_they_write(mode):
    model, batches = Functional(), [torch.randn(2, 3, 8, 8) for _ in range(3)]
    with mode(), collect(model) as collector:
        for batch in batches:
            model(batch)
    statistics = collector.compute()
    assert list(statistics) == ["relu_1", "relu_1:1", "relu", "gelu"]
    for name, site in statistics.items():
        expected = sum(plain_counts(model.inputs(batch)[name], 1) for batch in batches)
        assert torch.equal(site.counts, expected), name


def test_isolate_is_recommended_once():
    model, x = Functional(), torch.randn(2, 3, 8, 8)
    with collect(model):
        with pytest.warns(UserWarning, match=r"3 of its activations as functions \(gelu, relu_1, relu_1:1\).*fe\.isolate"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)


class Checkpointed(nn.Module):
    """Two blocks whose forward is repeated in backward, one inside of the other."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.outer, self.head, self.use_reentrant = nn.GELU(), nn.Linear(3, 1), use_reentrant

    def block(self, x):
        return self.outer(checkpoint(self.inner, x, use_reentrant=self.use_reentrant))

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_forward_is_counted_once(use_reentrant):
    model = Checkpointed(use_reentrant)
    with collect(model) as collector:
        for _ in range(3):
            model(torch.randn(5, 3, requires_grad=True)).sum().backward()
    assert counted(collector) == {"inner.1": 45, "outer": 45}


@pytest.mark.parametrize("activation", ["relu", "gelu", F.gelu])
def test_fast_path_of_transformers_is_off_only_meanwhile(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, padded = model(x), model(x, src_key_padding_mask=padding)
        with collect(model) as collector:
            torch.testing.assert_close(model(x), before)
            model(x, src_key_padding_mask=padding)
        assert torch.equal(model(x), before)
        assert torch.equal(model(x, src_key_padding_mask=padding), padded)
    assert list(counted(collector).values()) == [2 * 2 * 5 * 16] * 2


def replica(module):
    """What nn.DataParallel makes of a module for another device: a shallow copy with tensors of its own."""
    other = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(other, name, replica(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(other, name, parameter.detach().clone())
    return other


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_replicas_of_data_parallel_are_counted():
    model, x = make_part(), torch.randn(7, 3)
    with collect(model) as collector:
        model(x)
        in_threads(*[partial(replica(model), x) for _ in range(3)])
    assert torch.equal(collector.compute()["1"].counts, 4 * plain_counts(model[0](x), 1))


def test_one_model_in_several_threads_is_counted_right():
    model, inputs = make_part(), [torch.randn(7, 3) for _ in range(4)]

    def work(x):
        for _ in range(50):
            model(x)

    with collect(model) as collector:
        in_threads(*[partial(work, x) for x in inputs])
    expected = 50 * sum(plain_counts(model[0](x), 1) for x in inputs)
    assert torch.equal(collector.compute()["1"].counts, expected)


def test_a_pass_that_raises_leaves_no_counts():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    interrupted = [False]

    def interrupt(module, args):
        if interrupted[0]:
            raise KeyboardInterrupt

    model[2].register_forward_pre_hook(interrupt)
    with collect(model) as collector:
        model(torch.zeros(3, 2))
        interrupted[0] = True
        with pytest.raises(KeyboardInterrupt):
            model(torch.zeros(5, 2))
        interrupted[0] = False
        model(torch.zeros(1, 2))
    assert counted(collector) == {"1": 8, "3": 8}


def test_a_hook_of_the_user_before_an_activation_is_heard():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].register_forward_pre_hook(lambda module, args: (args[0] * 0 - 1,))
    with collect(model) as collector:
        model(torch.randn(3, 2))
    assert collector.compute()["1"].counts.tolist() == [[3, 0, 0]] * 2


def test_a_forward_of_the_activation_itself_still_runs():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model[1].forward = lambda x: x * 5
    x = torch.randn(3, 2)
    expected = model(x)
    model[1].register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad(), collect(model) as collector:
        for _ in range(3):
            assert torch.equal(model(x), expected + 1)
    assert counted(collector) == {"1": 18}


def test_an_activation_inside_of_one_is_no_site(monkeypatch):
    class Outer(nn.ReLU):
        def __init__(self):
            super().__init__()
            self.inner = nn.ReLU()

        def forward(self, x):
            return self.inner(x)

    model = nn.Sequential(Outer())
    with collect(model) as collector:
        model(torch.randn(3, 2))
    assert counted(collector) == {"0": 6}


def of_stacked_weights(model):
    weights = {name: weight.detach()[None] for name, weight in model.named_parameters()}
    return lambda x: torch.func.vmap(lambda given: torch.func.functional_call(model, given, x))(weights)


TRANSFORMS = {
    "vmap": torch.func.vmap,
    "vmap over weights": of_stacked_weights,
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum()),
    "jvp": lambda model: lambda x: torch.func.jvp(model, (x,), (x,)),
    "jacrev": torch.func.jacrev,
}


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func_are_refused(transform, passes):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with collect(model) as collector:
        for _ in range(passes):
            model(torch.randn(3, 2))
        with pytest.raises(RuntimeError, match=r"inside of torch\.func transforms; [^\n]*$"):
            TRANSFORMS[transform](model)(torch.randn(3, 2))
        model(torch.randn(3, 2))
    assert counted(collector) == {"1": 6 * (passes + 1)}
