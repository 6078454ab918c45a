"""Passes of compiled models that raise, run in threads, belong to several collectors, or cannot be counted in graphs."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import fastentropy as fe
from tests._helpers.compiling import Block, Blocks, NotingBackend, assert_same, batches, eagerly

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


class Raising(nn.Module):
    """Raises between two compiled graphs, if it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x, fail=False):
        x = self.first(x)
        torch._dynamo.graph_break()
        if fail:
            raise KeyError("half way")
        return self.second(x)


def test_pass_that_raises_leaves_nothing():
    model, inputs = Raising().eval(), batches(3, 3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), fe.collect(compiled) as collector:
        for x in inputs:
            compiled(x)
            with pytest.raises(KeyError, match="half way"):
                compiled(x, fail=True)
    assert_same(collector.compute(), eagerly(model, *inputs))


@pytest.mark.parametrize("parts", [False, True])
def test_threads(parts):
    model, inputs = Blocks(blocks=3).eval(), batches(3, 3, *range(2, 14))
    expected = eagerly(model, *inputs)
    other = torch.compile(Blocks().eval(), backend="aot_eager")
    if parts:
        for layer in model.layers:
            layer.compile(backend="aot_eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), fe.collect(compiled) as collector:
        compiled(inputs[0])

        def run(own):
            with torch.no_grad():
                for x in own:
                    compiled(x)
                    other(x)

        threads = [threading.Thread(target=run, args=(inputs[1 + index :: 3],)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_same(collector.compute(), expected)


@pytest.mark.skipif(
    not hasattr(torch.fx._symbolic_trace, "_get_is_fx_tracing"),
    reason="PyTorch 2.11 runs no compiled code while a backend of another thread traces",
)
def test_thread_that_traces_beside_one_that_runs_compiled_parts():
    model, inputs, entered, leave = Blocks().eval(), batches(3, 3, 3), threading.Event(), threading.Event()
    expected = eagerly(model, *inputs)

    def traced(x):
        entered.set()
        leave.wait(30)
        return x + 1

    def backend(graph, inputs):
        make_fx(traced)(torch.ones(2))
        return graph.forward

    for layer in model.layers:
        layer.compile(backend="aot_eager")
    thread = threading.Thread(target=torch.compile(torch.clone, backend=backend), args=(inputs[0],))
    with torch.no_grad(), fe.collect(model) as collector:
        for x in inputs[:2]:
            model(x)
        thread.start()
        assert entered.wait(30)
        model(inputs[2])
        leave.set()
        thread.join()
    assert_same(collector.compute(), expected)


def test_thread_that_compiles_beside_one_that_counts_eagerly():
    model, inputs, entered, leave = Blocks().eval(), batches(3, 3, 3), threading.Event(), threading.Event()
    model.__class__ = type("Another", (Blocks,), {})

    def backend(graph, inputs):
        entered.set()
        leave.wait(30)
        return graph.forward

    block = Block().eval()
    compiled = torch.compile(block, backend=backend)
    with torch.no_grad(), warnings.catch_warnings(), fe.collect(block), fe.collect(model) as collector:
        warnings.filterwarnings("ignore", ".*fe.isolate")
        compiled(inputs[0])
        thread = threading.Thread(target=compiled, args=(inputs[0],))
        thread.start()
        assert entered.wait(30)
        for x in inputs:
            model(x)
        leave.set()
        thread.join()
    assert_same(collector.compute(), eagerly(model, *inputs))


def test_collectors_of_two_models_at_the_same_time():
    one, other, inputs = Blocks().eval(), Blocks(blocks=3).eval(), batches(3, 3, 3)
    compiled = [torch.compile(model, backend="aot_eager") for model in (one, other)]
    with torch.no_grad(), fe.collect(compiled[0]) as first, fe.collect(compiled[1]) as second:
        for x in inputs:
            compiled[1](compiled[0](x.clone())[..., :1].expand(-1, -1, 8).contiguous())
            compiled[0](x)
    assert first.compute()["end"].observations == 6 * first.compute()["end"].neurons * 15
    assert second.compute()["end"].observations + second.compute()["end"].counts[:, 1].sum() >= 3 * 4 * 15
    assert_same(first.compute(), eagerly(one, *inputs, *inputs))


class Calling(nn.Module):
    """Calls another model, which is no part of it."""

    def __init__(self, other):
        super().__init__()
        self.others, self.block = [other], Block()

    def forward(self, x):
        return self.block(x) + self.others[0](x)


def test_model_inside_of_another_one_that_is_counted_too():
    inner = Block().eval()
    model, inputs = Calling(inner).eval(), batches(3, 3, 3)
    expected = [eagerly(each, *inputs) for each in (model.block, inner)]
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings(), fe.collect(inner) as first, fe.collect(model) as second:
        warnings.filterwarnings("ignore", ".*another collector is attached|.*fe.isolate")
        for x in inputs:
            compiled(x)
    assert_same(first.compute(), expected[1])
    assert [
        torch.equal(site.counts, expected[0][name.removeprefix("block.")].counts) for name, site in second.compute().items()
    ] == [True, True]


def test_collectors_of_one_model_one_after_the_other():
    model, inputs = Blocks().eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    first, second = fe.collect(compiled), fe.collect(compiled)
    with torch.no_grad():
        for x in inputs:
            for collector in (first, second, first):
                collector.update(x)
    assert_same(first.compute(), eagerly(model, *inputs, *inputs))
    assert_same(second.compute(), eagerly(model, *inputs))


def test_state_of_a_collector():
    model, inputs = Blocks().eval(), batches(3, 3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    first, second = fe.collect(compiled), fe.collect(compiled)
    with torch.no_grad():
        with first:
            for x in inputs[:2]:
                compiled(x)
        second.load_state_dict(first.state_dict())
        with second:
            for x in inputs[2:]:
                compiled(x)
    assert_same(second.sync(), eagerly(model, *inputs))


# What is counted in eager mode -------------------------------------------------------------------------------------------


def counted_with(match, compiled, inputs):
    """The statistics of a compiled model, for which there is a warning."""
    with torch.no_grad(), warnings.catch_warnings(), fe.collect(compiled) as collector:
        warnings.filterwarnings("ignore", f"{match}|.*fe.isolate|nothing tells")
        for x in inputs:
            compiled(x)
    assert any(match.replace(".*", "") in note for note in collector.compute().notes) or match == "never"
    return collector.compute()


def test_backend_that_refuses_further_outputs():
    def backend(graph, inputs):
        if len(graph.graph.output_node().args[0]) > 1:
            raise TypeError("one output")
        return graph.forward

    model, inputs = Blocks().eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    statistics = counted_with(".*does not compile it with counts", compiled, inputs)
    assert_same(statistics, eagerly(model, *inputs))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.act = Block(), nn.ReLU()

    def forward(self, x):
        x = self.block(x)
        return torch.cond(x.sum() > 0, lambda x: self.act(x), lambda x: F.relu(-x), (x,))


def test_activations_in_branches():
    model, inputs = Branching().eval(), batches(3, 3, 3, 3)
    inputs[0][...] = 1
    with torch.no_grad(), warnings.catch_warnings(), fe.collect(model) as expected:
        warnings.simplefilter("ignore")
        for x in inputs:
            model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    statistics = counted_with(".*activations are called inside of cond", compiled, inputs)
    assert_same(statistics, expected.compute())


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "fail_on_recompile", "eager_then_compile"])
def test_stance_of_the_user(stance):
    model, inputs = Blocks().eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(inputs[0])
        with torch.compiler.set_stance(stance):
            statistics = counted_with(
                "never" if stance == "force_eager" else ".*the stance of torch.compiler", compiled, inputs
            )
    assert_same(statistics, eagerly(model, *inputs))


def test_forced_backend_of_the_user():
    model, backend, inputs = Blocks().eval(), NotingBackend(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="inductor")
    with torch.no_grad(), torch.compiler.set_stance("default", force_backend=backend), fe.collect(compiled) as collector:
        for x in inputs:
            compiled(x)
    assert backend.compilations() == 1
    assert_same(collector.compute(), eagerly(model, *inputs))


def test_compilers_of_a_forced_backend_are_not_kept(monkeypatch):
    from fastentropy.collector.compiled import compilers
    from fastentropy.sites import kept_compilers

    monkeypatch.setattr(kept_compilers, "_MOST", 3)
    model, (x,) = Blocks().eval(), batches(3)
    compiled, made = torch.compile(model, backend="aot_eager"), []
    choose = compilers.CountingCompilers.choose

    def noting(self, reader, compiler):
        made.append(weakref.ref(compiler))
        return choose(self, reader, compiler)

    monkeypatch.setattr(compilers.CountingCompilers, "choose", noting)
    with torch.no_grad(), fe.collect(compiled):
        for _ in range(20):
            with torch.compiler.set_stance("default", force_backend="eager"):
                compiled(x)
        gc.collect()
        assert len(made) >= 19
        assert sum(each() is not None for each in made) <= 2 * 3 + 1


def test_encoder_with_a_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inputs = batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    expected = eagerly(model, *inputs)
    with torch.no_grad(), warnings.catch_warnings(), fe.collect(compiled) as collector:
        warnings.simplefilter("ignore")
        for x in inputs:
            compiled(x)
    assert_same(collector.compute(), expected)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.act = nn.RNNCell(8, 8, nonlinearity="relu"), nn.ReLU()

    def forward(self, x):
        return self.act(self.cell(x[:, 0]))


def test_activations_that_a_node_hides():
    model, inputs = Recurrent().eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), warnings.catch_warnings(), fe.collect(compiled) as collector:
        warnings.simplefilter("ignore")
        for x in inputs:
            compiled(x)
    assert_same(collector.compute(), eagerly(model, *inputs))


def clipped(x):
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(clipped, (x,), x)
    return x.clamp(0, 1)


class Registered(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return clipped(F.logsigmoid(self.a(x)))


def test_registered_functions():
    fe.register_activation(F.logsigmoid, "logsigmoid")
    model, inputs = Registered().eval(), batches(3, 3, 3)
    for more in (False, True):
        if more:
            fe.register_activation(clipped, "clipped")
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        with torch.no_grad(), warnings.catch_warnings(), fe.collect(compiled) as collector:
            warnings.simplefilter("ignore")
            for x in inputs:
                compiled(x)
        assert_same(collector.compute(), eagerly(model, *inputs))


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return y * 2 if func is F.relu else y


def test_mode_of_the_user():
    model, inputs = Blocks().eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), Doubling():
        with warnings.catch_warnings(), fe.collect(model) as expected:
            warnings.simplefilter("ignore")
            outputs = [model(x) for x in inputs]
        with warnings.catch_warnings(), fe.collect(compiled) as collector:
            warnings.simplefilter("ignore")
            for x, y in zip(inputs, outputs, strict=True):
                assert torch.equal(compiled(x), y)
    assert_same(collector.compute(), expected.compute())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graph_on_several_devices_runs_as_it_is(backend):
    class OnTwoDevices(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.gelu = nn.ReLU(), nn.GELU()

        def forward(self, x):
            return self.relu(x), self.gelu(x.to("meta"))

    model, x = OnTwoDevices().eval(), torch.randn(3, 4)
    compiled = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as caught, fe.collect(model) as collector:
        warnings.simplefilter("always")
        for _ in range(3):
            compiled(x)
    assert any("its activations run on several devices" in str(each.message) for each in caught)
    assert torch.equal(collector.compute()["relu"].counts, 3 * torch.stack([x < 0, x == 0, x > 0], -1).sum(0))
