import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from fastentropy.sites.interception import Interception, fast_paths, original_class
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
        interception = Interception(model)
        attached.append(interception)
        interception.attach({name: (modules[name], handle) for name in names})
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
    model.forward(torch.zeros(1, 2))
    assert calls == ["", "1", "2"] * 2
    interception.detach()
    model(torch.zeros(1, 2))
    assert len(calls) == 6


def test_classes_look_as_before_and_are_as_before(attach):
    model = make()
    before = snapshot(model)
    interception = attach(model, "", "1", "2")
    assert repr(model) == repr(make())
    assert isinstance(model[1], nn.ReLU)
    assert original_class(model[1]) is nn.ReLU
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    interception.detach()
    assert [type(module) for module in model.modules()] == [type(module) for module in make().modules()]
    assert_unchanged(model, before)


def test_hooks_run_around_the_forward(attach, calls):
    model = make()
    model[1].register_forward_pre_hook(lambda module, args: calls.append("hook before"))
    model[1].register_forward_hook(lambda module, args, y: calls.append("hook after"))
    attach(model, "1")
    model(torch.zeros(1, 2))
    assert calls == ["hook before", "1", "hook after"]


def test_copies_and_pickles_are_of_the_original_class(attach, calls):
    model = make()
    interception = attach(model, "", "1", "2")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    copies = [copy.deepcopy(model), copy.copy(model[1]), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    for duplicate in copies:
        assert {type(module) for module in duplicate.modules()} <= {nn.Sequential, nn.Linear, nn.ReLU}
        assert not any("fastentropy" in name for module in duplicate.modules() for name in vars(module))
    copies[0](torch.zeros(1, 2))
    assert calls == []
    interception.detach()


def test_an_own_forward_is_handled_as_a_call(attach, calls):
    model = make()
    model[1].forward = lambda x: x + 1
    attach(model, "1")
    assert torch.equal(model[1](torch.ones(1)), torch.full((1,), 2.0))
    assert calls == ["1"]


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
    class Slots(nn.Linear):
        __slots__ = ("more",)

    model = nn.Sequential(nn.ReLU(), Slots(2, 2))
    before = snapshot(model)
    with pytest.raises(TypeError, match="layout"):
        attach(model, "", "0", "1")
    assert_unchanged(model, before)
    assert type(model[0]) is nn.ReLU


def test_classes_that_count_or_refuse_subclasses_and_attributes(attach, calls):
    class Final(nn.ReLU):
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


def test_a_copy_of_the_attributes_alone_is_of_no_consequence(attach, calls):
    class Copies(nn.ReLU):
        def __deepcopy__(self, memo):
            other = type(self).__new__(type(self))
            other.__dict__ = copy.deepcopy(self.__dict__, memo)
            return other

    model = nn.Sequential(Copies())
    attach(model, "0")
    duplicate = copy.deepcopy(model)
    assert torch.equal(duplicate(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    assert calls == []


def test_a_class_that_was_put_on_top_meanwhile_runs_the_original(attach, calls):
    model = make()
    interception = attach(model, "1")
    model[1].__class__ = type("OnTop", (type(model[1]),), {})
    interception.detach()
    assert torch.equal(model[1](torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))
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
    Interception(model).attach({"1": (model[1], lambda name, module, original, args, kwargs: original(module, *args))})
    del model
    gc.collect()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert runs
