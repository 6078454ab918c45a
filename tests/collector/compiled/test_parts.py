"""Models of which torch.compile has compiled parts: these are counted inside of their graphs, and the rest as in eager mode."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters

import fastentropy as fe
from tests._helpers.compiling import Block, Blocks, NotingBackend, assert_same, batches, eagerly

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


def compile_layers(model, backend):
    for layer in model.layers:
        layer.compile(backend=backend)


def wrap_layers(model, backend):
    model.layers = nn.ModuleList(torch.compile(layer, backend=backend) for layer in model.layers)


def compile_methods(model, backend):
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)


def compile_whole_method(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)


def compile_both(model, backend):
    compile_layers(model, backend)
    model.compile(backend=backend)


@pytest.mark.parametrize("how", [compile_layers, wrap_layers, compile_methods, compile_whole_method, compile_both])
def test_parts(how):
    model, backend, inputs = Blocks(blocks=3).eval(), NotingBackend(), batches(4, 4, 4, 4)
    expected = eagerly(model, *inputs)
    how(model, backend)
    with torch.no_grad():
        outputs = [model(x) for x in inputs]
        plain = backend.compilations()
        for compilations in (plain, 0):
            with fe.collect(model) as collector:
                for x, y in zip(inputs, outputs, strict=True):
                    assert torch.equal(model(x), y)
            assert_same(collector.compute(), expected)
            assert backend.compilations() == compilations
        model(inputs[0])
    assert backend.compilations() == 0
    assert not dynamo_counters["graph_break"]


def test_layers_alike_share_a_graph():
    model, backend, inputs = Blocks(blocks=4).eval(), NotingBackend(), batches(4, 4, 4)
    compile_layers(model, backend)
    with torch.no_grad(), fe.collect(model) as collector:
        for x in inputs:
            model(x)
    assert backend.compilations() == 1
    assert_same(collector.compute(), eagerly(Blocks(blocks=4).eval(), *inputs, state=model.state_dict()))


class Shared(nn.Module):
    """Layers that share an activation, one of which runs twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        for layer in self.layers:
            layer.act = self.layers[0].act

    def forward(self, x):
        for layer in (*self.layers, self.layers[1]):
            x = layer(x)
        return x


def test_shared_activations_and_repeated_layers():
    model, inputs = Shared().eval(), batches(4, 4, 4)
    expected = eagerly(model, *inputs)
    compile_layers(model, "aot_eager")
    with torch.no_grad(), fe.collect(model) as collector:
        for x in inputs:
            model(x)
    assert_same(collector.compute(), expected)


class Broken(nn.Module):
    """A repeated activation, functional ones, graph breaks between them, and a method that is never compiled."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()
        self.block = Block()

    def forward(self, x):
        x = self.act(F.relu(self.a(x)))
        torch._dynamo.graph_break()
        x = F.relu(self.act(self.b(F.relu(x))))
        torch._dynamo.graph_break()
        return self.act(F.relu(self.disabled(self.block(x))))

    @torch._dynamo.disable
    def disabled(self, x):
        return F.silu(self.act(self.a(F.relu(x))))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_graph_breaks_and_code_that_is_not_compiled(backend):
    model, backend, inputs = Broken().eval(), NotingBackend(backend), batches(3, 3, 3, 5, 6)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for x in inputs[1:]:
            compiled(x)
        breaks, plain = sum(dynamo_counters["graph_break"].values()), backend.compilations()
        dynamo_counters.clear()
        with fe.collect(compiled) as collector:
            for x in inputs:
                compiled(x)
    assert_same(collector.compute(), eagerly(model, *inputs))
    assert sum(dynamo_counters["graph_break"].values()) <= breaks
    assert backend.compilations() <= plain


class Skipping(nn.Module):
    """Calls of one activation, of which passes leave some out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU()

    def forward(self, x, skip=()):
        for name in "abc":
            if name not in skip:
                x = self.act(getattr(self, name)(x))
        if "f" not in skip:
            x = F.relu(x)
        return F.relu(self.a(F.silu(x) + F.silu(-x)))


def test_passes_that_leave_calls_out():
    model, inputs = Skipping().eval(), batches(3, 3, 3, 3, 3)
    skipped = ["", "b", "ac", "fa", "cf"]
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(model) as expected:
        warnings.simplefilter("ignore")
        for x, skip in zip(inputs, skipped, strict=True):
            model(x, skip)
    with torch.no_grad(), fe.collect(compiled) as collector:
        for x, skip in zip(inputs, skipped, strict=True):
            compiled(x, skip)
    assert_same(collector.compute(), expected.compute())


def test_calls_beyond_those_of_the_first_pass():
    model, inputs = Skipping().eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    skipped = ["bcf", "", ""]
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(model) as expected:
        warnings.simplefilter("ignore")
        for x, skip in zip(inputs, skipped, strict=True):
            model(x, skip)
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(compiled) as collector:
        warnings.filterwarnings("ignore", "nothing tells")
        for x, skip in zip(inputs, skipped, strict=True):
            compiled(x, skip)
    assert_same(collector.compute(), expected.compute())


def test_beyond_the_limit_of_compilations():
    model, inputs = Blocks(blocks=1).eval(), batches(*range(2, 14))
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.no_grad(), fe.collect(compiled) as collector:
        for x in inputs:
            compiled(x)
    assert_same(collector.compute(), eagerly(model, *inputs))


def test_activations_that_are_compiled_alone():
    model, inputs = Blocks(blocks=2).eval(), batches(3, 3, 3)
    expected = eagerly(model, *inputs)
    model.layers[0].act = torch.compile(model.layers[0].act, backend="aot_eager")
    model.layers[1].act.compile(backend="aot_eager")
    model.end.compile(backend="aot_eager")
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(model) as collector:
        warnings.filterwarnings("ignore", ".*fe.isolate")
        for x in inputs:
            model(x)
    assert_same(collector.compute(), expected)


def test_function_that_calls_the_model():
    model, inputs = Blocks().eval(), batches(3, 3, 3)
    step = torch.compile(lambda x: model(x).sum(), backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(model) as collector:
        warnings.filterwarnings("ignore", ".*(fe.isolate|runs eagerly)")
        for x in inputs:
            step(x)
    assert_same(collector.compute(), eagerly(model, *inputs))
    (note,) = collector.compute().notes
    assert "runs eagerly: it calls modules outside of forward passes" in note


@pytest.mark.parametrize("hooked", ["layers.0.act", "layers.0", ""])
@pytest.mark.parametrize("parts", [False, True])
def test_hooks_that_are_registered_after_compiling(hooked, parts):
    model, (x,) = Blocks().eval(), batches(3)
    if parts:
        compile_layers(model, "eager")
    compiled = model if parts else torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        collector = fe.collect(compiled)
        collector.update(x)
        collector.update(x)
        model.get_submodule(hooked).register_forward_pre_hook(lambda module, args: (args[0] - 1,))
        plain = compiled(x)
        assert torch.equal(collector.update(x), plain)
    assert collector.compute()["end"].observations == 3 * 4 * 15
