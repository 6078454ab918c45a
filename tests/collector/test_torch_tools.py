"""What PyTorch does with a model: wrapping, tracing, compiling and modes have the same results while collecting as without."""

import copy
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from fastentropy import collect
from tests._helpers.invisibility import appearance, assert_invisible, changes, differences
from tests._helpers.statistics import counted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Mixed(nn.Module):
    """Activations as modules and as functions, one of them in place, and a residual."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2, self.fc3 = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 3)
        self.gelu = nn.GELU()

    def forward(self, x):
        x = self.act(self.fc1(x))
        return self.fc3(F.silu(self.gelu(self.fc2(x)) + x))


SITES = {"act": 42, "gelu": 42, "silu": 42}  # of seven rows


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Mixed().eval()


@pytest.fixture
def x():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1))


def counted_by_end(collector):
    """What was counted, without the parts of the paths in which a wrapper has put the model."""
    return {name.removeprefix("module.").removeprefix("_orig_mod."): count for name, count in counted(collector).items()}


def times(count):
    return {name: count * values for name, values in SITES.items()}


def trained(model, *inputs):
    """The output of a model and the gradients of its weights."""
    model.zero_grad()
    output = model(*inputs)
    output.square().sum().backward()
    return output, [weight.grad for weight in model.parameters()]


# Wrappers ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("collected", ["wrapper", "model inside"])
def test_distributed_data_parallel(one_rank, model, x, collected):
    wrapper = nn.parallel.DistributedDataParallel(model)
    collector = assert_invisible(wrapper, lambda: trained(wrapper, x), collect(wrapper if collected == "wrapper" else model))
    assert counted_by_end(collector) == times(2)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_fully_sharded(one_rank, model, x, when):
    plain = copy.deepcopy(model)
    expected = trained(plain, x)

    def shard():
        for part in (model.fc1, model.fc2, model):
            fully_shard(part, mesh=one_rank)

    def run():
        output, gradients = trained(model, x)
        return output, [gradient.full_tensor() for gradient in gradients]

    if when == "before":
        shard()
        collector = assert_invisible(model, run, inside=[], in_copies=False)  # a state_dict takes the weights away
    else:
        with collect(model) as collector:
            model(x)
            shard()
            assert differences(expected, run()) == []
    assert differences(expected, run()) == []
    assert counted(collector) == times(2)


def test_replicas_of_data_parallel(model, x):
    """The replicas are of the model's classes, compute the same, and are counted (see test_passes for threads)."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(replica, name, replicate(child))
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter.detach().clone())
        return replica

    with torch.no_grad(), collect(model) as collector:
        replica = replicate(model)
        assert [type(module) for module in replica.modules()] == [type(module) for module in model.modules()]
        assert differences(model(x), replica(x)) == []
    assert counted(collector) == times(2)


class Checkpointed(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))
        self.way = way

    def forward(self, x):
        if self.way == "sequential":
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
        return checkpoint(lambda x: F.silu(self.layers(x)), x, use_reentrant=self.way == "reentrant")


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "sequential"])
def test_activation_checkpointing(way, x):
    model, x = Checkpointed(way).train(), x.requires_grad_()
    collector = assert_invisible(model, lambda: trained(model, x), inside=[])
    assert counted(collector) == {"layers.1": 84, "layers.4": 84} | ({} if way == "sequential" else {"silu": 42})


def test_functional_call(model, x):
    weights = {name: weight.detach() * 0.5 for name, weight in model.named_parameters()}

    def run():
        given = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        output = torch.func.functional_call(model, given, (x,))
        return output, torch.autograd.grad(output.sum(), list(given.values()))

    assert counted(assert_invisible(model, run)) == times(2)


PARAMETRIZATIONS = [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("register", PARAMETRIZATIONS)
def test_parametrizations(model, x, register, when):
    plain = copy.deepcopy(model)
    if when == "before":
        register(model.fc2)
        collector = assert_invisible(model, lambda: trained(model, x))
    else:
        with collect(model) as collector:
            for each in (model, plain):
                torch.manual_seed(3)
                register(each.fc2)
            assert differences(trained(plain, x), trained(model, x)) == []
            for each in (model, plain):
                parametrize.remove_parametrizations(each.fc2, "weight")
            assert differences(plain(x), model(x)) == []
        assert type(model.fc2) is nn.Linear
    assert counted(collector) == times(2)


@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.bfloat16, lambda m: m.to(memory_format=torch.channels_last)])
def test_converted_meanwhile(model, x, change):
    plain = copy.deepcopy(model)
    with collect(model) as collector:
        model(x)
        for each in (model, plain):
            change(each)
        x = x.to(model.fc1.weight.dtype)
        assert differences(plain(x), model(x)) == []
    assert counted(collector) == times(2)


# Compilers and tracers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["torch.compile", "model inside", "module.compile"])
def test_compiled_model_is_counted_in_its_first_pass(model, x, way):
    if way == "module.compile":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    compiled(x)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected, before = compiled(x), appearance(compiled)
        with collect(model if way == "model inside" else compiled) as collector:
            assert changes(before, appearance(compiled)) == {}
            assert torch.equal(compiled(x), expected)
        assert changes(before, appearance(compiled)) == {}
        assert torch.equal(compiled(x), expected)
    assert not caught
    assert counted_by_end(collector) == times(1)


def torchscript(compiled):
    """The graph of a compiled model: without lines of code, with values by number, and without numbers in names of classes."""
    graph = re.sub(r"___torch_mangle_\d+\.| # \S+:\d+:\d+", "", str(compiled.inlined_graph))
    numbers = {name: f"%{number}" for number, name in enumerate(dict.fromkeys(re.findall(r"%[\w.]+", graph)))}
    return re.sub(r"%[\w.]+", lambda match: numbers[match[0]], graph)


def traced(model, x, mode):
    weights = dict(model.named_parameters())
    return make_fx(lambda weights, x: torch.func.functional_call(model, weights, (x,)), tracing_mode=mode)(weights, x).code


TRACERS = {
    "torch.jit.trace": lambda model, x: torchscript(torch.jit.trace(model, (x,))),
    "torch.export": lambda model, x: torch.export.export(model, (x,)).graph_module.code,
    "torch.export, decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions({}).graph_module.code,
    "make_fx": lambda model, x: traced(model, x, "real"),
    "make_fx, fake": lambda model, x: traced(model, x, "fake"),
    "make_fx, symbolic": lambda model, x: traced(model, x, "symbolic"),
    "torch.fx": lambda model, x: torch.fx.symbolic_trace(model).code,
    "torch.jit.script": lambda model, x: torchscript(torch.jit.script(model)),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("passes_before", [0, 2])
@pytest.mark.parametrize("tracer", TRACERS)
def test_tracing_meanwhile_gives_the_same_graph(model, x, tracer, passes_before, mode):
    with mode():
        expected, output, before = TRACERS[tracer](model, x), model(x), appearance(model)
        with collect(model) as collector:
            for _ in range(passes_before):
                model(x)
            actual = TRACERS[tracer](model, x)
            collector.reset()
            assert torch.equal(model(x), output)
        changed = {what for _, what in changes(before, appearance(model))}
        assert changed <= {"attribute __overloads__"}  # torch.jit.script sets it
        assert actual == expected
    assert counted(collector) == times(1)


# Modes -------------------------------------------------------------------------------------------------------------------


class LogsOperators(TorchDispatchMode):
    """Log the operators of PyTorch. With `changes`, the outputs of relu and gelu are something else."""

    def __init__(self, changes=False):
        super().__init__()
        self.log, self.changes = [], changes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.log.append(func)
        if self.changes and func in (torch.ops.aten.relu_.default, torch.ops.aten.gelu.default, torch.ops.aten.silu.default):
            return func(args[0].sub_(0.5) if func is torch.ops.aten.relu_.default else args[0] - 0.5, *args[1:], **kwargs or {})
        return func(*args, **kwargs or {})


class LogsFunctions(TorchFunctionMode):
    """Log the functions of PyTorch. With `changes`, the outputs of F.relu, F.gelu and F.silu are others."""

    def __init__(self, changes=False):
        super().__init__()
        self.log, self.changes = [], changes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.log.append(getattr(func, "__name__", str(func)))
        if self.changes and func in (F.relu, F.gelu, F.silu):
            return func(args[0] * 2, *args[1:], **kwargs or {})
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("around", ["the pass", "the collector"])
@pytest.mark.parametrize("changes", [False, True])
@pytest.mark.parametrize("kind", [LogsOperators, LogsFunctions])
def test_modes_of_the_user_change_and_see_the_same(model, x, kind, changes, around, mode):
    def run(count):
        outputs, logs = [], []
        for _ in range(count):
            with kind(changes) as user:
                outputs.append(model(x))
            logs.append(user.log)
        return outputs, logs

    with mode():
        expected, log = run(1)
        if around == "the pass":
            with collect(model) as collector:
                outputs, logs = run(3)
        else:
            with kind(changes), collect(model) as collector:
                outputs, logs = [model(x) for _ in range(3)], []
    assert [differences(expected[0], output) for output in outputs] == [[]] * 3
    for each in logs[1:]:  # the first may see what an operator is composed of; all see the operators that count
        assert [call for call in each if call in log[0]] == log[0]
    assert counted(collector) == times(3)
    assert changes == (not torch.equal(expected[0], model(x)))


@pytest.mark.parametrize("passes_before", [0, 1])
def test_flops_are_the_same(model, x, passes_before):
    def flops():
        with FlopCounterMode(model, display=False) as counter:
            trained(model, x)
        return counter.get_flop_counts()

    expected = flops()
    with collect(model) as collector:
        for _ in range(passes_before):
            model(x)
        assert flops() == expected
    assert counted(collector) == times(1 + passes_before)


def profiled(model, x):
    with torch.profiler.profile() as profile:
        output = model(x)
    names = {event.name for event in profile.events() if event.name.startswith("aten::")}
    assert "aten::addmm" in names
    return output


def saved_elsewhere(model, x):
    """The tensors that are kept for the backward are packed and unpacked by the user."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        return trained(model, x)


def tangents(model, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))))


def twice_differentiated(model, x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), list(model.parameters()))


AROUND = {
    "profiler": profiled,
    "saved tensors": saved_elsewhere,
    "forward derivatives": tangents,
    "second derivatives": twice_differentiated,
    "jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x),
    "anomaly detection": lambda model, x: [trained(model, x) for _ in [torch.autograd.detect_anomaly()]],
}


@pytest.mark.parametrize("way", AROUND)
def test_ways_to_differentiate(model, x, way):
    collector = assert_invisible(model, lambda: AROUND[way](model, x), inside=[])
    assert counted(collector) == times(2)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("outside", [True, False])
def test_autocast(model, x, mode, outside):
    with mode(), torch.autocast("cpu", torch.bfloat16) if outside else nullcontext():

        def run():
            with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
                return model(x)

        assert counted(assert_invisible(model, run)) == times(2)


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.gelu])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_with_padding(activation, norm_first, is_nested):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation, norm_first=norm_first)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=is_nested).eval()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[1, 4:] = True
    with torch.inference_mode():
        expected, unmasked, before = model(x, src_key_padding_mask=padding), model(x), appearance(model)
        with collect(model) as collector:
            assert changes(before, appearance(model)) == {}
            outputs = [model(x, src_key_padding_mask=padding) for _ in range(2)]
            torch.testing.assert_close(model(x), unmasked)
            assert changes(before, appearance(model)) == {}
        assert changes(before, appearance(model)) == {}
    for output in outputs:
        torch.testing.assert_close(output[~padding], expected[~padding])
        assert output.shape == expected.shape
    assert set(counted(collector).values()) == {3 * 3 * 5 * 16}
