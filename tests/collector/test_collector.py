import copy
import gc
import threading
import warnings
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastentropy import collect
from tests._helpers.networks import Reads
from tests._helpers.snapshots import assert_unchanged, snapshot


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


def make_part():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 5), nn.GELU()))


def counted(collector):
    """How many values each site saw."""
    return {name: site.observations for name, site in collector.compute().items()}


@pytest.mark.filterwarnings("ignore:.*is compiled")
@pytest.mark.parametrize("which", ["the compiled module", "the model inside", "module.compile()"])
def test_a_model_compiled_before_is_counted(which):
    model = make_part()
    x = torch.randn(7, 3)
    if which == "module.compile()":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    with collect(model if which == "the model inside" else compiled) as collector:
        assert torch.equal(compiled(x), expected)
        compiled(x)
    assert counted(collector) == {"1": 2 * 28, "2.1": 2 * 35}
    compiled(x)
    assert counted(collector) == {"1": 2 * 28, "2.1": 2 * 35}


def test_a_model_compiled_while_collecting_is_counted_then_and_not_afterwards():
    model, x = make_part(), torch.randn(7, 3)
    with collect(model) as collector:
        compiled = torch.compile(model, backend="eager")
        compiled(x)
    before = counted(collector)
    assert before == {"1": 28, "2.1": 35}
    assert torch.equal(compiled(x), model(x))
    assert counted(collector) == before


class Root(nn.Module):
    """Everything that a pass of the root decides: functional calls, repeated calls, padding."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()

    def forward(self, x, attention_mask=None):
        return F.relu(self.b(self.act(self.a(self.act(x)))))


@pytest.mark.filterwarnings("ignore:.*is compiled", "ignore:.*fe.isolate")
@pytest.mark.parametrize("given", ["outside", "inside"])
def test_the_root_of_a_compiled_model_makes_the_same_pass(given):
    model, x = Root(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="eager")
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    compiled(x, attention_mask=mask)
    with collect(compiled if given == "outside" else model) as collector:
        compiled(x, attention_mask=mask)
    assert counted(collector) == {"act": 48, "act:1": 48, "relu": 48}


@pytest.mark.filterwarnings("ignore:.*fe.isolate")
def test_a_forward_that_is_called_without_the_module_is_a_pass():
    model = Root()
    with collect(model) as collector:
        model.forward(torch.randn(2, 8))
    assert counted(collector) == {"act": 16, "act:1": 16, "relu": 16}


def test_a_warning_that_is_an_error_leaves_no_trace():
    model = torch.compile(make_part(), backend="eager")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="is compiled"):
            collect(model).attach()
    assert_unchanged(model, before)


def test_a_compiled_model_is_told_to_run_eagerly_meanwhile():
    with pytest.warns(UserWarning, match="OptimizedModule is compiled .* runs eagerly"), collect(torch.compile(make_part())):
        pass


def test_what_was_compiled_runs_compiled_again_after_two_collectors():
    runs = []

    def backend(graph, inputs):
        def run(*args):
            runs.append(1)
            return graph(*args)

        return run

    function = torch.compile(lambda x: x + 1, backend=backend)
    first, second = collect(make_part()), collect(make_part())
    first.attach()
    second.attach()
    first.detach()
    function(torch.ones(2))
    assert not runs
    second.detach()
    function(torch.ones(2))
    assert runs


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_activations_in_torchscript_are_refused():
    with pytest.raises(ValueError, match="'0' is compiled by TorchScript"):
        collect(nn.Sequential(torch.jit.script(make_part()))).attach()


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


def test_update_counts_a_batch_attached_or_not(network, images):
    collector, before = collect(network.eval()), snapshot(network)
    assert torch.equal(collector.update(images), network(images))
    assert_unchanged(network, before)
    with collector:
        collector.update(images)
        collector.update(x=images)
    assert collector.compute()["gelu"].counts.sum() == 3 * 4 * 8


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


def test_a_second_site_of_a_kind_that_is_known_needs_no_axis():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(2, 3), nn.ReLU()

        def forward(self, x):
            return self.act(self.fc(x).transpose(0, 1)).transpose(0, 1)

    model = Reads(lambda m, x, deep: m.second(x) if deep else m.first(x), first=Block(), second=Block())
    with collect(model) as collector:
        model(torch.zeros(7, 2), False)
        model(torch.zeros(7, 2), True)
    assert collector.compute()["second.act"].neurons == 3


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


def test_activations_of_numbers_and_of_parameters_are_no_sites():
    model = Reads(
        lambda m, x: m.relu(m.fc(x)) * F.softplus(m.scale) + F.relu(torch.tensor(1.0)), fc=nn.Linear(2, 2), relu=nn.ReLU()
    )
    model.scale = nn.Parameter(torch.ones(2))
    with collect(model) as collector:
        model(torch.zeros(1, 2))
    assert list(collector.compute()) == ["relu"]


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
def test_the_fast_path_of_transformer_layers_is_off_only_meanwhile(activation):
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


def test_transforms_of_torch_func_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with collect(model), pytest.raises(RuntimeError, match=r"inside of torch\.func transforms"):
        torch.func.vmap(model)(torch.randn(3, 2))


def test_inputs_without_strides_pass():
    model = Reads(lambda m, a, x: m.relu(torch.sparse.mm(a, m.fc(x))), fc=nn.Linear(2, 3), relu=nn.ReLU())
    with torch.no_grad(), collect(model) as collector:
        model(torch.eye(5).to_sparse(), torch.randn(5, 2))
    assert counted(collector) == {"relu": 15}


def test_a_lazy_model_is_counted_from_its_first_pass_on():
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with collect(model) as collector:
        model(torch.randn(5, 2))
    assert counted(collector) == {"1": 15}


def test_another_number_of_axes_is_no_guess():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    with collect(model) as collector:
        model(torch.randn(2, 3, 9, 9))
        model(torch.randn(3, 9, 9))
        with pytest.raises(RuntimeError, match="channel_axis"):
            model(torch.randn(3, 8, 8))
    assert counted(collector) == {"1": 3 * 6 * 49}


def test_keyword_arguments_and_autocast():
    model = nn.Sequential(OrderedDict(fc=nn.Linear(2, 3), relu=nn.ReLU()))
    with collect(model) as collector, torch.autocast("cpu", dtype=torch.bfloat16):
        model(input=torch.randn(4, 2))
        model.relu(input=torch.randn(4, 3))
    assert counted(collector) == {"relu": 24}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_every_floating_dtype_is_counted(dtype):
    model = Reads(lambda m, x: m.act(x), act=nn.Identity() if dtype == torch.float8_e4m3fn else nn.ReLU())
    if dtype == torch.float8_e4m3fn:
        model.act = ReadsOnly()
    x = torch.tensor([[-1.0, 2.0], [0.0, 3.0]]).to(dtype)
    with collect(model) as collector:
        model(x)
    assert collector.compute()["act"].counts.tolist() == [[1, 1, 0], [0, 0, 2]]


class ReadsOnly(nn.ReLU):
    def forward(self, x):
        return x


def test_memory_is_the_counters():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    with collect(model) as collector:
        model(torch.randn(4, 8))
        model(torch.randn(4, 8))
        buffers = collector._counting._total.buffers[torch.device("cpu")]
    assert [buffer.numel() for buffer in buffers.values()] == [3 * 96 + 2]


def test_a_thousand_collectors_leak_nothing(network, images):
    network.eval()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    def run(times):
        for _ in range(times):
            with collect(network):
                network(images)

    with torch.inference_mode():
        run(20)
        before, snap = objects(), snapshot(network)
        run(1000)
        assert objects() - before < 100
    assert_unchanged(network, snap)


def test_attaching_again_goes_on_counting(network, images):
    collector = collect(network.eval())
    for _ in range(3):
        with collector:
            network(images)
        network(images)
    assert counted(collector)["gelu"] == 3 * 4 * 8


def test_a_part_of_a_watched_model_is_refused_and_the_model_goes_on(network, images):
    model = nn.Sequential(network.eval())
    with collect(model) as collector:
        with pytest.raises(RuntimeError, match="detach it first"):
            collect(network).attach()
        model(images)
    assert counted(collector)["0.gelu"] == 32


def test_a_state_can_be_taken_up_by_a_new_collector(network, images, tmp_path):
    network.eval()
    with collect(network, average="batch") as whole:
        for batch in (images, images[:1], images[1:]):
            network(batch)
    with collect(network, average="batch") as first:
        network(images)
        network(images[:1])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = collect(network, average="batch")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    with second:
        network(images[1:])
    for name, site in whole.compute().items():
        other = second.compute()[name]
        assert torch.equal(site.counts, other.counts)
        torch.testing.assert_close(site.entropy(average="batch"), other.entropy(average="batch"))
    second.load_state_dict(first.state_dict())
    assert counted(second) == counted(first)


def test_a_state_of_another_model_changes_nothing(network, images):
    other = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with collect(other) as foreign:
        other(torch.zeros(1, 2))
    with collect(network.eval()) as collector:
        network(images)
        before = counted(collector)
        for state in ({}, {"sites": [{"name": "relu1"}]}, {"sites": 3}, {**foreign.state_dict(), "1/counts": torch.zeros(3)}):
            with pytest.raises(ValueError, match="not the state of statistics"):
                collector.load_state_dict(state)
        state = foreign.state_dict()
        state = {"sites": [{**state["sites"][0], "name": "relu1"}], "relu1/counts": state["1/counts"]}
        with pytest.raises(ValueError, match="'relu1' is relu with 6 neurons in this model and relu with 3 in the state"):
            collector.load_state_dict(state)
    assert counted(collector) == before


def test_a_pass_is_added_in_one_operation_whatever_the_number_of_sites():
    model = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(4, 4), nn.ReLU()))).eval()
    x = torch.randn(2, 4)
    with torch.inference_mode(), collect(model) as collector:
        for _ in range(4):
            model(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(x)
    operators = {event.key: event.count for event in profiler.key_averages()}
    assert operators["aten::add_"] == operators["aten::zero_"] == 1
    assert counted(collector) == {f"{2 * index + 1}": 5 * 8 for index in range(20)}


def test_a_site_that_is_met_late_is_added_with_the_others_from_then_on():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.layer = nn.ReLU(), nn.GELU(), nn.Linear(4, 4)

        def forward(self, x, both):
            x = self.first(self.layer(x))
            return self.second(self.layer(x)) if both else x

    model = Sometimes().eval()
    x = torch.randn(2, 4)
    with torch.inference_mode(), collect(model, channel_axis={"second": 1}) as collector:
        model(x, False)
        for _ in range(4):
            model(x, True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            model(x, True)
    operators = {event.key: event.count for event in profiler.key_averages()}
    assert operators["aten::zero_"] == 2  # a buffer for each time that sites were met
    assert counted(collector) == {"first": 6 * 8, "second": 5 * 8}


def test_reset_keeps_the_addresses_of_the_counters(network, images):
    with collect(network.eval()) as collector:
        network(images)
        network(images)

        def addresses():
            return [buffer.data_ptr() for buffers in collector._counting._total.buffers.values() for buffer in buffers.values()]

        before = addresses()
        collector.reset()
        with pytest.raises(RuntimeError, match="nothing was counted"):
            collector.compute()
        network(images)
        assert addresses() == before
    assert counted(collector)["gelu"] == 32


def test_a_model_without_activations_is_told_what_to_do():
    model = nn.Linear(2, 2)
    with collect(model) as collector:
        model(torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"Linear calls no known activation.*register_activation"):
        collector.compute()


def test_prelu_counts_and_learns():
    model = nn.Sequential(nn.Linear(2, 3), nn.PReLU(3))
    x = torch.randn(5, 2)
    expected = model(x)
    with collect(model) as collector:
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
    assert counted(collector) == {"1": 30}
    assert model[1].weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_cuda_graph_counts_at_each_replay():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.SiLU()).cuda().eval()
    x = torch.randn(32, 64, device="cuda")
    with torch.inference_mode(), collect(model) as collector:
        with collector.paused():
            model(x)
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
        collector.reset()
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    assert counted(collector) == {"1": 5 * 32 * 128, "3": 5 * 32 * 64}
    assert all(site.nan == 0 for site in collector.compute().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_cuda_graph_leaves_padding_out():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.act, self.down, self.end = nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64), nn.GELU()

        def forward(self, x, attention_mask=None):
            return self.end(self.down(self.act(self.up(x))))

    model = Tokens().cuda().eval()
    x, mask = torch.randn(4, 10, 64, device="cuda"), torch.ones(4, 10, dtype=torch.int64, device="cuda")
    with torch.inference_mode(), collect(model) as collector:
        for _ in range(2):
            model(x, attention_mask=mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x, attention_mask=mask)
        collector.reset()
        mask[:, 7:] = 0
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    assert counted(collector) == {"act": 3 * 4 * 7 * 96, "end": 3 * 4 * 7 * 64}
    assert all(site.nan == 0 for site in collector.compute().values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_devices_of_one_model_are_added_up():
    model = nn.DataParallel(make_part().cuda())
    with collect(model) as collector:
        model(torch.randn(8, 3, device="cuda"))
    assert counted(collector) == {"module.1": 32, "module.2.1": 40}
