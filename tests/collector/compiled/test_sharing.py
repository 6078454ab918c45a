"""Graphs that models and collectors share, and the limit of compilations, of which counting uses up nothing."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.compiling import Blocks, NotingBackend, assert_same, batches, eagerly

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


def collected(model, call, inputs, **options):
    """The statistics of calls of a model."""
    with torch.no_grad(), fe.collect(model, **options) as collector:
        for x in inputs:
            call(x)
    return collector.compute()


def compiled_layers(model, backend="aot_eager"):
    """A model, of which the layers are compiled."""
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def test_models_of_a_class_share_graphs():
    backend, inputs, made = NotingBackend(), batches(3, 3, 3), []
    for _ in range(10):
        model = Blocks().eval()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert_same(collected(compiled, compiled, inputs), eagerly(model, *inputs))
        made.append(backend.compilations())
    assert made == [1] + [0] * 9


def test_compiled_code_is_not_kept_longer_than_its_class():
    class Local(Blocks):
        def forward(self, x):
            return super().forward(x)

    compiled = torch.compile(Local().eval(), backend="aot_eager")
    statistics, kept = collected(compiled, compiled, batches(3, 3, 3)), weakref.ref(Local)
    assert len(statistics) == 6
    del compiled, Local
    gc.collect()
    assert kept() is None


def test_options_that_count_the_same_share_graphs():
    model, backend, inputs = Blocks().eval(), NotingBackend(), batches(3, 3, 3)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    made, everything = [], ["layers.0.act", "layers.0.relu", "layers.1.act", "layers.1.relu"]
    for options in ({}, {"channel_axis": {"end": 2}}, {"misfits": "skip"}, {"exclude": ["layers.*"]}, {"exclude": everything}):
        statistics = collected(compiled, compiled, inputs, **options)
        assert_same(statistics, eagerly(model, *inputs, **options))
        made.append(backend.compilations())
    assert made == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("collecting", [False, True])
def test_limit_of_compilations_is_left_to_the_user(collecting):
    model, backend, inputs = Blocks().eval(), NotingBackend("eager"), batches(3, 3, 3)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        if collecting:
            for options in ({}, {"exclude": ["end"]}, {"channel_axis": {"end": 1}}):
                assert_same(collected(compiled, compiled, inputs, **options), eagerly(model, *inputs, **options))
            assert backend.compilations() == 3
        for x in batches(2, 3, 4, 5, 2):
            compiled(x)
    assert backend.compilations() == 2


def test_limit_of_compilations_holds_for_counting():
    model, backend, inputs = Blocks().eval(), NotingBackend("eager"), batches(2, 2, 3, 4, 5, 2)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        for x in batches(2, 3):
            compiled(x)
        assert backend.compilations() == 2
        for compilations in (2, 0):
            assert_same(collected(compiled, compiled, inputs), eagerly(model, *inputs))
            assert backend.compilations() == compilations


@pytest.mark.parametrize(
    "options",
    [{"exclude": ["layers.0.act"]}, {"exclude": ["layers.1.relu"]}, {"exclude": ["layers.[12].*"]}, {"exclude": ["layers.*"]}],
)
def test_sites_left_out_in_some_of_the_layers_alike(options):
    model, backend, inputs = Blocks(blocks=3).eval(), NotingBackend("eager"), batches(3, 3, 3)
    expected = eagerly(model, *inputs, **options)
    compiled_layers(model, backend)
    assert_same(collected(model, model, inputs, **options), expected)
    assert backend.compilations() == 1


def test_layers_alike_with_different_axes():
    model, inputs, options = Blocks(blocks=3).eval(), batches(16, 16, 16), {"channel_axis": {"layers.1.act": 0}}
    expected = eagerly(model, *inputs, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*'layers.0.act' and 'layers.1.act', which have different channel axes")
        statistics = collected(compiled_layers(model), model, inputs, **options)
    assert_same(statistics, expected)


class Tied(nn.Module):
    """Two activations, which may be one."""

    def __init__(self, tied):
        super().__init__()
        self.a, self.first = nn.Linear(8, 8), nn.ReLU()
        self.second = self.first if tied else nn.ReLU()

    def forward(self, x):
        return self.second(self.a(self.first(self.a(x))))


def test_models_of_a_class_with_tied_activations():
    inputs = batches(3, 3, 3)
    for tied in (True, False, True):
        model = Tied(tied).eval()
        compiled = torch.compile(model, backend="aot_eager")
        assert_same(collected(compiled, compiled, inputs), eagerly(model, *inputs))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        return F.relu(self.a(x))


class Decoder(Encoder):
    def forward(self, x):
        return F.relu(self.a(x + 1))


def test_collectors_that_meet_the_code_in_another_order():
    model, (x, *_) = nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()}).eval(), batches(3)
    for part in model.values():
        part.compile(backend="aot_eager")
    for order in (["encoder", "decoder"], ["decoder", "encoder"]):
        with torch.no_grad(), fe.collect(model) as collector:
            for _ in range(3):
                for name in order:
                    model[name](x)
        assert sorted(collector.compute()) == ["decoder.relu", "encoder.relu"]


class Clipping(nn.Module):
    def forward(self, x):
        return x.clamp(0, 1)


def test_activations_that_are_registered_later():
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), Clipping()).eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    assert list(collected(compiled, compiled, inputs)) == ["1"]
    fe.register_activation(Clipping, "clipping")
    statistics = collected(compiled, compiled, inputs)
    assert_same(statistics, eagerly(model, *inputs))
    assert list(statistics) == ["1", "3"]


def test_code_that_is_refused_under_a_forced_backend_is_traced_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        if len(graph.graph.output_node().args[0]) > 1:
            raise TypeError("one output")
        return graph.forward

    model, inputs = Blocks().eval(), batches(3, 3, 3, 3, 3)
    compiled = torch.compile(model)

    def call(x):
        with torch.compiler.set_stance("default", force_backend=backend):
            compiled(x)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not compile it with counts|.*fe.isolate")
        assert_same(collected(compiled, call, inputs), eagerly(model, *inputs))
    assert len(graphs) == 1
