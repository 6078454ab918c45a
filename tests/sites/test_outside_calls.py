"""Functions of torch.compile that are called outside of forward passes, while a collector is attached."""

import gc
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastentropy as fe
from tests._helpers.compiling import Blocks, NotingBackend, assert_same, batches, eagerly

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fe.isolate")]


class RunningBackend(NotingBackend):
    """Also notes how often a graph runs."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def __call__(self, graph, inputs):
        compiled = super().__call__(graph, inputs)

        def run(*args):
            self.runs += 1
            return compiled(*args)

        return run


@pytest.mark.filterwarnings("error::UserWarning:fastentropy.sites.graph_sites")
def test_functions_without_modules_stay_compiled():
    model, backend, inputs = Blocks(), RunningBackend(), batches(3, 3, 3)
    loss = torch.compile(lambda y: (y * y.sin()).mean(), backend=backend, fullgraph=True)
    expected = eagerly(model, *inputs)
    plain = [loss(model(x)) for x in inputs]
    assert backend.compilations() == 1
    for compilations in (1, 0):
        backend.runs = 0
        with fe.collect(model) as collector:
            assert [loss(model(x)) for x in inputs] == plain
        assert_same(collector.compute(), expected)
        assert not collector.compute().notes
        assert (backend.compilations(), backend.runs) == (compilations, len(inputs))
    loss(model(inputs[0]))
    assert backend.compilations() == 0


def test_a_backend_is_not_kept_longer_than_its_code():
    model, backend, (x,) = Blocks(), RunningBackend(), batches(3)
    loss = torch.compile(lambda y: (y * y).mean(), backend=backend)
    with fe.collect(model):
        loss(model(x))
    kept = weakref.ref(backend)
    del loss, backend
    torch._dynamo.reset()
    gc.collect()
    assert kept() is None


def test_compiled_optimizer_steps():
    model, backend, inputs = Blocks(), RunningBackend(), batches(3, 3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend=backend)
    with fe.collect(model) as collector:
        for x in inputs:
            model(x).sum().backward()
            step()
    assert backend.runs >= len(inputs)
    assert not collector.compute().notes


class Partial(Blocks):
    """Methods that are called without the model: one without modules, and one without activations."""

    def activate(self, x):
        return F.relu(x @ self.head.weight.T)

    def project(self, x):
        return self.head(self.layers[0](x))


def test_code_that_calls_modules_or_activations_runs_eagerly_with_a_note():
    model, inputs = Partial(), batches(3, 3, 3)

    def run(forward, activate, project, step):
        for x in inputs:
            forward(x), activate(x), project(x), F.relu(step(x))

    with warnings.catch_warnings(), fe.collect(model) as expected:
        warnings.simplefilter("ignore")
        run(model.forward, model.activate, model.project, lambda x: model(x * 2) + 1)
    functions = [model.forward, model.activate, model.project, lambda x: model(x * 2) + 1]
    compiled = [torch.compile(each, backend="aot_eager", fullgraph=True) for each in functions]
    run(*compiled)  # compiled before without counts
    for _ in range(2):
        with warnings.catch_warnings(), fe.collect(model) as collector:
            warnings.simplefilter("ignore")
            run(*compiled)
        assert_same(collector.compute(), expected.compute())
        names = [note.split(" runs eagerly")[0].split()[-1].rpartition(".")[2] for note in collector.compute().notes]
        assert names == ["forward", "activate", "project", "<lambda>"]


def test_a_model_behind_a_graph_break():
    model, inputs = Blocks(), batches(3, 3, 3)

    def step(x):
        y = x * 2
        torch._dynamo.graph_break()
        return model(y).sum() + y.sum()

    compiled = torch.compile(step, backend="aot_eager")
    expected = [compiled(x) for x in inputs]
    with warnings.catch_warnings(), fe.collect(model) as collector:
        warnings.simplefilter("ignore")
        assert torch.allclose(torch.stack([compiled(x) for x in inputs]), torch.stack(expected))
    assert_same(collector.compute(), eagerly(model, *[x * 2 for x in inputs]))


def test_function_of_another_model_runs_eagerly_with_a_note():
    model, (x,) = Blocks(), batches(3)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    other = torch.compile(lambda x: network(x), backend="aot_eager")
    with fe.collect(model) as collector:
        with pytest.warns(UserWarning, match="runs eagerly: it calls modules outside"):
            y = other(x)
        model(x)
    assert torch.allclose(y, network(x))
    assert_same(collector.compute(), eagerly(model, x))


def test_checkpoints_of_compiled_functions():
    model, inputs = Blocks(), batches(3, 3, 3)
    function = torch.compile(lambda y: (y.sin() * y.cos()).exp(), backend="aot_eager")
    with fe.collect(model) as collector:
        for x in inputs:
            checkpoint(function, model(x), use_reentrant=False).sum().backward()
    assert_same(collector.compute(), eagerly(model, *inputs))


def test_threads():
    model, inputs, errors = Blocks(), batches(3, 3, 3), []
    compiled = torch.compile(model, backend="aot_eager")
    loss = torch.compile(lambda y: (y * 2).sum(), backend="aot_eager")

    def work():
        try:
            for x in inputs:
                loss(compiled(x))
        except Exception as error:
            errors.append(error)

    with fe.collect(compiled) as collector:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not errors
    assert_same(collector.compute(), eagerly(model, *inputs * 2))
