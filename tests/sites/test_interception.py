"""Handlers run in place of the calls of modules, and nobody can see that they do."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from fastentropy._compat import module_call
from fastentropy.sites.fast_paths import fast_paths
from fastentropy.sites.interception import Interception
from tests._helpers.snapshots import assert_unchanged, snapshot


@pytest.fixture
def calls():
    return []


@pytest.fixture
def attach(calls):
    """Intercept some modules; each call is noted."""

    def attach(model, *names):
        def handle(name, module, original, args, kwargs):
            calls.append(name)
            return original(module, *args, **kwargs)

        modules = dict(model.named_modules())
        interception = Interception({"noted": handle}, lambda owner, attribute, module: calls.append((owner, attribute)))
        attached.append(interception)
        interception.attach(model, {name: (modules[name], "noted") for name in names})
        return interception

    attached = []
    yield attach
    for interception in attached:
        interception.detach()


def make():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))


def test_named_modules_are_handled_and_no_others(attach, calls):
    model = make()
    interception = attach(model, "", "1", "2")
    model(torch.zeros(1, 2))
    assert calls == ["", "1", "2"]
    interception.detach()
    model(torch.zeros(1, 2))
    assert len(calls) == 3


def test_modules_look_as_before(attach):
    model = make()
    before, signatures = snapshot(model), [inspect.signature(module.forward) for module in model.modules()]
    attributes = [dict(vars(module)) for module in model.modules()]
    attach(model, "", "1", "2")
    assert repr(model) == repr(make())
    assert [type(module) for module in model.modules()] == [type(module) for module in make().modules()]
    assert [inspect.signature(module.forward) for module in model.modules()] == signatures
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert_unchanged(model, before)


def test_call_of_modules_is_restored(attach):
    original = module_call()
    first, second = attach(make(), "1"), attach(make(), "1")
    assert module_call() is not original
    first.detach()
    assert module_call() is not original
    second.detach()
    second.detach()
    assert module_call() is original


def test_handlers_run_around_the_hooks(attach, calls):
    model = make()
    model[1].register_forward_pre_hook(lambda module, args: calls.append("hook before"))
    model[1].register_forward_hook(lambda module, args, y: calls.append("hook after"))
    attach(model, "1")
    model(torch.zeros(1, 2))
    assert calls == ["1", "hook before", "hook after"]


def test_copies_and_pickles_are_modules_of_their_own(attach, calls):
    model = make()
    interception = attach(model, "", "1", "2")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    copies = [copy.deepcopy(model), copy.deepcopy(model[1]), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    for duplicate in copies:
        duplicate(torch.zeros(1, 2))
    assert calls == []
    interception.detach()


def test_forward_of_the_instance_runs(attach, calls):
    model = make()
    model[1].forward = lambda x: x + 1
    attach(model, "1")
    assert torch.equal(model[1](torch.ones(1)), torch.full((1,), 2.0))
    assert calls == ["1"]


def test_forward_that_is_replaced_meanwhile_runs(attach, calls, monkeypatch):
    class Other(nn.ReLU):
        pass

    model = nn.Sequential(Other())
    attach(model, "0")
    monkeypatch.setattr(Other, "forward", lambda self, x: x + 1, raising=False)
    assert torch.equal(model(torch.ones(1)), torch.full((1,), 2.0))
    model[0].forward = lambda x: x + 2
    assert torch.equal(model(torch.ones(1)), torch.full((1,), 3.0))
    assert calls == ["0", "0"]


def test_one_interception_at_a_time_also_of_a_part(attach):
    model = make()
    interception = attach(model[2], "0")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="attached to this model already; detach it first"):
        attach(model, "")
    assert_unchanged(model, before)
    interception.detach()
    attach(model, "").detach()


def test_what_fails_on_the_way_is_undone(attach):
    model, original = make(), module_call()
    modules = dict(model.named_modules())
    interception = Interception({}, lambda *_: None)
    with pytest.raises(RuntimeError, match="_forward_hooks"):
        interception.attach(model, {"": (model, "noted"), "1": (None, "noted"), "2": (modules["2"], "noted")})
    assert module_call() is original
    attach(model, "").detach()


def test_classes_that_refuse_subclasses_and_attributes(attach, calls):
    class Final(nn.ReLU):
        __slots__ = ("more",)

        def __init_subclass__(cls, tag):
            raise TypeError("this class has no subclasses")

        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("this object keeps its class")
            super().__setattr__(name, value)

    model = nn.Sequential(Final())
    attach(model, "0").detach()
    attach(model, "0")
    assert torch.equal(model(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    assert calls == ["0"]


def test_modules_that_are_put_in_are_told(attach, calls):
    model, other = make(), nn.Sequential()
    attach(model, "", "2")
    model[2].append(nn.ReLU())
    model.extra = nn.GELU()
    model[0] = nn.Linear(2, 2)
    other.extra = nn.ReLU()
    assert calls == [("2", "1"), ("", "extra"), ("", "0")]


def test_module_that_is_compiled_in_place(attach, calls):
    model = make()
    model[1].compile(backend="eager")
    compiled = model[1]._compiled_call_impl
    interception = attach(model, "1")
    model(torch.zeros(1, 2))
    assert calls == ["1"]
    interception.detach()
    assert model[1]._compiled_call_impl is compiled


def test_interception_that_is_deleted_leaves_nothing(calls):
    model, original = make(), module_call()
    interception = Interception({"noted": lambda *_: calls.append(1)}, lambda *_: None)
    interception.attach(model, {"": (model, "noted")})
    gone = weakref.ref(interception)
    del interception
    gc.collect()
    assert gone() is None
    assert module_call() is original
    model(torch.zeros(1, 2))
    assert calls == []


def test_fast_paths_are_those_that_are_on():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True, activation="gelu")
    assert [(name, value) for _, name, value in fast_paths(layer)] == [("activation_relu_or_gelu", 0)]
    assert fast_paths(make()) == []


@pytest.mark.slow
def test_a_model_that_is_forgotten_lets_others_compile_again():
    runs = []

    def backend(graph, inputs):
        runs.append(1)
        return graph

    model = make()
    handlers = {"plain": lambda name, module, original, args, kwargs: original(module, *args)}
    Interception(handlers, lambda *_: None).attach(model, {"1": (model[1], "plain")})
    del model
    gc.collect()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert runs
