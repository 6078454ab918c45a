"""Compiled models that are called while a collector is attached to another one."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy.sites import outside_calls
from tests._helpers.compiling import Block, Blocks, NotingBackend, assert_same, batches, eagerly

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


class Breaking(Blocks):
    """Has a graph break between two layers."""

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return super().forward(x)


class CallingCompiled(Blocks):
    """Calls another compiled model between two graphs."""

    def __init__(self, other):
        super().__init__()
        self.others = [other]

    def forward(self, x):
        return super().forward(self.call_other(x))

    @torch._dynamo.disable
    def call_other(self, x):
        return self.others[0](x)


class Holding(nn.Module):
    """Calls another model, which is no part of it."""

    def __init__(self, held):
        super().__init__()
        self.held, self.layer = [held], nn.Linear(8, 8)

    def forward(self, x):
        return self.held[0](self.layer(x))


def in_place(model, backend):
    model.compile(backend=backend)
    return model


WAYS = {
    "whole": lambda model, backend: torch.compile(model, backend=backend),
    "in place": in_place,
    "forward": lambda model, backend: torch.compile(model.forward, backend=backend),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Blocks, Breaking])
def test_other_model_stays_compiled(kind, way):
    student, teacher, backend = Blocks().eval(), kind().eval(), NotingBackend()
    compiled, other, inputs = torch.compile(student, backend="aot_eager"), WAYS[way](teacher, backend), batches(3, 3, 3, 3)
    with torch.no_grad():
        outputs = [other(x) for x in inputs]
        usual, made = backend.compilations(), []
        for _ in range(2):
            with fe.collect(compiled) as collector:
                for x, y in zip(inputs, outputs, strict=True):
                    assert torch.equal(other(x), y)
                    compiled(x)
            made.append(backend.compilations())
            assert_same(collector.compute(), eagerly(student, *inputs))
        other(inputs[0])
    assert [*made, backend.compilations()] == [usual, 0, 0]


@pytest.mark.parametrize("way", WAYS)
def test_other_model_of_a_class_of_pytorch_stays_compiled(way):
    student, teacher, backend = Block().eval(), nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), NotingBackend()
    other, x = WAYS[way](teacher, backend), *batches(3)
    with torch.no_grad():
        output, usual = other(x), backend.compilations()
        with fe.collect(student):
            assert torch.equal(other(x), output)
    assert backend.compilations() == usual


def test_other_model_that_calls_compiled_models_stays_compiled():
    student, inner, backend = Blocks().eval(), Block().eval(), NotingBackend()
    other, x = torch.compile(CallingCompiled(torch.compile(inner, backend=backend)).eval(), backend=backend), *batches(3)
    with torch.no_grad():
        output, usual = other(x), backend.compilations()
        with warnings.catch_warnings(), fe.collect(student):
            warnings.filterwarnings("ignore", ".*fe.isolate")
            student(x)
            assert torch.equal(other(x), output)
    assert backend.compilations() == usual


def test_code_of_another_model_is_not_used_for_the_model_that_is_counted():
    one, two, backend = Blocks().eval(), Blocks().eval(), NotingBackend()
    calls, inputs = [torch.compile(model, backend=backend) for model in (one, two)], batches(3, 3, 3)
    for counted in (one, two, one):
        with torch.no_grad(), fe.collect(counted) as collector:
            for x in inputs:
                for call in calls:
                    call(x)
        assert_same(collector.compute(), eagerly(counted, *inputs))


def test_other_model_is_trained_meanwhile():
    student, teacher = Blocks().eval(), Blocks(nn.ReLU)
    compiled, other = torch.compile(student, backend="aot_eager"), torch.compile(teacher, backend="aot_eager")
    inputs = batches(3, 3, 3)
    with fe.collect(compiled) as collector:
        for x in inputs:
            with torch.no_grad():
                compiled(x)
            other(x).sum().backward()
    assert all(each.grad is not None for each in teacher.parameters())
    assert_same(collector.compute(), eagerly(student, *inputs))


@pytest.mark.parametrize("held_first", [False, True])
def test_model_that_another_one_holds_unregistered_is_counted(held_first):
    held, unwatched = Block().eval(), Block().eval()
    model, inputs = Holding(held if held_first else unwatched).eval(), batches(3, 3, 3)
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", ".* it calls modules outside of forward passes|.*fe.isolate")
        for x in inputs:
            compiled(x)
        with fe.collect(unwatched if held_first else held):
            compiled(inputs[0])
        model.held[0] = held
        with fe.collect(held) as collector:
            for x in inputs:
                compiled(x)
    assert_same(collector.compute(), eagerly(held, *map(model.layer, inputs)))


class Encoding(nn.Module):
    """Calls a method of another model that calls an activation, but no module."""

    def __init__(self, held):
        super().__init__()
        self.held, self.layer = [held], nn.Linear(8, 8)

    def forward(self, x):
        return self.held[0].encode(self.layer(x))


class Encoder(Block):
    """A block with another method."""

    def encode(self, x):
        return F.gelu(x)


def test_method_of_a_model_that_another_one_holds_is_counted():
    held, x = Encoder().eval(), *batches(3)
    model = Encoding(held).eval()
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with fe.collect(held) as collector:
            held(x)
            compiled(x)
    values = model.layer(x)
    counts = torch.stack([values < 0, values == 0, values > 0], -1).sum((0, 1))
    assert torch.equal(collector.compute()["gelu"].counts, counts)


def test_list_that_holds_another_model_later():
    held, inputs = Block().eval(), batches(3, 3)
    model = Holding(Block()).eval()
    model.inner = model.held[0]
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with fe.collect(Block().eval()):
            compiled(inputs[0])
        model.held[0] = held
        with fe.collect(held) as collector:
            for x in inputs:
                compiled(x)
    assert_same(collector.compute(), eagerly(held, *map(model.layer, inputs)))


def test_registered_activations_leave_other_models_compiled(monkeypatch):
    student, teacher, backend = Blocks().eval(), Blocks().eval(), NotingBackend()
    compiled, other, inputs = (
        torch.compile(student, backend="aot_eager"),
        torch.compile(teacher, backend=backend),
        batches(3, 3),
    )
    monkeypatch.setattr(outside_calls, "registered_in_python", lambda: ("shifted_relu",))
    with torch.no_grad(), fe.collect(compiled):
        for x in inputs:
            other(x)
    assert backend.compilations() == 1
