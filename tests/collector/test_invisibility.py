"""Nobody can tell that a collector is attached: not by looking at the model, and not by what it computes."""

import contextlib
import copy
import functools
import pickle
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastentropy import collect
from tests._helpers.counts import plain_counts
from tests._helpers.invisibility import assert_invisible, differences
from tests._helpers.networks import Reads, make_part
from tests._helpers.statistics import counted
from tests._helpers.unusual_modules import UNUSUAL, behind_linear

pytestmark = pytest.mark.filterwarnings("ignore:.*fe.isolate")


def slow(value):
    """Mark a parameter of a test as slow."""
    return pytest.param(value, marks=pytest.mark.slow)


MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@contextlib.contextmanager
def set_meanwhile(owner, name, value):
    with mock.patch.object(owner, name, value, create=True):
        yield


@contextlib.contextmanager
def other_class(model):
    """Give an activation a subclass of its class with the same name."""
    model.gelu.__class__ = type("GELU", (nn.GELU,), {})
    yield
    model.gelu.__class__ = nn.GELU


@contextlib.contextmanager
def left_behind(model):
    """Change nothing meanwhile, and leave a hook behind."""
    yield
    LEFT_BEHIND.append(nn.modules.module.register_module_module_registration_hook(lambda *args: None))


LEFT_BEHIND = []


class PassesOn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def without_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def drawing(self, x):
    torch.rand(())
    return self.fc2(self.gelu(self.fc1(self.relu1(self.bn1(self.conv1(x))).flatten(1))))


#: Each changes one thing while it is entered, or for good.
NOTICED = {
    "attribute": lambda m: set_meanwhile(m.fc2, "note", 1),
    "class attribute": lambda m: set_meanwhile(type(m), "note", 1),
    "class": other_class,
    "forward": lambda m: set_meanwhile(m.gelu, "forward", lambda *args, **kwargs: nn.GELU.forward(m.gelu, *args, **kwargs)),
    "forward of the class": lambda m: set_meanwhile(nn.GELU, "forward", lambda self, x: F.gelu(x)),
    "call of a class": lambda m: set_meanwhile(type(m), "__call__", lambda self, *args: self._call_impl(*args)),
    "function": lambda m: set_meanwhile(F, "gelu", lambda x, approximate="none": torch.ops.aten.gelu(x)),
    "dispatch mode": lambda m: PassesOn(),
    "function mode": lambda m: torch.overrides.BaseTorchFunctionMode(),
    "hook": lambda m: m.gelu.register_forward_hook(lambda *args: None),
    "global hook": lambda m: nn.modules.module.register_module_forward_hook(lambda *args: None),
    "hook of registration left behind": left_behind,
    "fast path": lambda m: without_fast_path(),
    "output": lambda m: set_meanwhile(m.gelu, "approximate", "tanh"),
    "random numbers": lambda m: set_meanwhile(
        m.fc2, "forward", lambda x: F.linear(x, m.fc2.weight, m.fc2.bias + 0 * torch.rand(()))
    ),
    "gradients": lambda m: torch.no_grad(),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", NOTICED)
def test_what_is_noticed(network, images, what):
    with pytest.raises(AssertionError):
        assert_invisible(network.eval(), lambda: network(images), NOTICED[what](network))
    while LEFT_BEHIND:
        LEFT_BEHIND.pop().remove()


@pytest.mark.parametrize("mode", MODES)
def test_small_network(network, images, mode):
    network.eval()
    with mode():
        assert_invisible(network, lambda: [network(images), network(images[:1])])


def test_training_step(network, images):
    def step():
        network.zero_grad()
        output = network(images)
        output.square().sum().backward()
        return output, [parameter.grad for parameter in network.parameters()]

    assert_invisible(network, step)


def random_in_training():
    """A network that draws random numbers before, in and behind its activations."""

    def forward(self, x):
        return self.norm(F.dropout(F.relu(self.drop(self.fc(x))), 0.3, self.training) + torch.rand(5))

    modules = {"fc": nn.Linear(4, 5), "drop": nn.Dropout(0.2), "norm": nn.Sequential(nn.RReLU(), nn.AlphaDropout(0.1))}
    return Reads(forward, **modules)


def test_random_numbers_in_training():
    model, x = random_in_training(), torch.randn(7, 4)
    assert_invisible(model, lambda: [model(x), model(x)])


@pytest.mark.parametrize("mode", [slow(torch.enable_grad), torch.inference_mode])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_modules(name, mode):
    build, sites = UNUSUAL[name]
    model, x = build().eval(), torch.randn(7, 4)

    def run():
        output = model(x)
        return output if isinstance(output, torch.Tensor) else list(output)

    with mode():
        collector = assert_invisible(model, run)
    assert counted(collector) == {site: 2 * 7 * width for site, width in sites.items()}


@pytest.fixture
def user_class():
    """A class of the user that is a network of its own, and a subclass of an activation."""

    class Act(nn.ReLU):
        def forward(self, x):
            return super().forward(x)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act, self.head = nn.Linear(4, 6), Act(), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.act(self.fc(x)))

    return Network


def doubled(self, x):
    return self.head(self.act(self.fc(x)) * 2)


def negated(self, x):
    return -F.relu(x)


PATCHES = {
    "forward of the model's class": lambda m: (type(m), "forward", doubled),
    "forward of the model": lambda m: (m, "forward", functools.partial(doubled, m)),
    "forward of the activation's class": lambda m: (type(m.act), "forward", negated),
    "forward of the activation": lambda m: (m.act, "forward", functools.partial(negated, m.act)),
    "forward of nn.ReLU": lambda m: (nn.ReLU, "forward", negated),
    "function inside": lambda m: (F, "relu", lambda x, inplace=False: x.clamp(min=0) - 1),
}


@pytest.mark.parametrize("is_plain", [True, False], ids=["nn.ReLU", "subclass"])
@pytest.mark.parametrize("passes_before", [slow(0), 2])
@pytest.mark.parametrize("what", PATCHES)
def test_patched_meanwhile_takes_effect(user_class, monkeypatch, what, passes_before, is_plain):
    model, x = user_class().eval(), torch.randn(7, 4)
    if is_plain:
        model.act = nn.ReLU()
    original = model(x)
    with torch.inference_mode(), collect(model) as collector:
        for _ in range(passes_before):
            assert torch.equal(model(x), original)
        with monkeypatch.context() as patch:
            patch.setattr(*PATCHES[what](model))
            with collector.paused():
                during = model(x)
            assert torch.equal(model(x), during)
            assert not torch.equal(during, original)
        assert torch.equal(model(x), original)
        before = counted(collector)
    with torch.inference_mode(), monkeypatch.context() as patch:
        patch.setattr(*PATCHES[what](model))
        assert torch.equal(model(x), during)
    assert before == {"act": 7 * 6 * (passes_before + 2)}


HOOKS = {
    "pre": lambda m, log: m.register_forward_pre_hook(lambda *given: log("pre", *given)),
    "pre with keywords": lambda m, log: m.register_forward_pre_hook(lambda *given: log("pre", *given), with_kwargs=True),
    "forward": lambda m, log: m.register_forward_hook(lambda *given: log("forward", *given)),
    "forward with keywords": lambda m, log: m.register_forward_hook(lambda *given: log("forward", *given), with_kwargs=True),
    "always": lambda m, log: m.register_forward_hook(lambda *given: log("always", *given), always_call=True),
    "backward": lambda m, log: m.register_full_backward_hook(lambda *given: log("backward", *given)),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(lambda *given: log("backward pre", *given)),
}
GLOBAL_HOOKS = {
    "global pre": nn.modules.module.register_module_forward_pre_hook,
    "global forward": nn.modules.module.register_module_forward_hook,
    "global backward": nn.modules.module.register_module_full_backward_hook,
}


@pytest.mark.parametrize("when", ["before", slow("meanwhile"), "after a pass"])
@pytest.mark.parametrize("kind", [*HOOKS, *GLOBAL_HOOKS])
def test_hooks_see_the_same_calls(kind, when):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.GELU(), nn.Linear(6, 3))), torch.randn(7, 4)
    names = {module: name for name, module in model.named_modules()}
    calls = []

    def log(what, module, *given):
        tensors = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, given)
        calls.append((what, names[module], tensors))

    def register():
        if kind in HOOKS:
            return [HOOKS[kind](module, log) for module in names]
        return [GLOBAL_HOOKS[kind](lambda *given: log(kind, *given))]

    def logged():
        calls.clear()
        model.zero_grad()
        model(x).square().sum().backward()
        return list(calls), [parameter.grad for parameter in model.parameters()]

    hooks = register()
    expected = logged()
    for hook in hooks if when != "before" else ():
        hook.remove()
    with collect(model) as collector:
        if when == "after a pass":
            logged()
        if when != "before":
            hooks = register()
        actual = [logged() for _ in range(2)]
    for hook in hooks:
        hook.remove()
    assert [differences(expected, each) for each in actual] == [[], []]
    assert len(expected[0]) >= 3
    assert counted(collector) == {"1": 42 * (2 + (when == "after a pass")), "2.0": 42 * (2 + (when == "after a pass"))}


@pytest.mark.parametrize("way", ["arguments", "keywords", "global", "in place"])
@pytest.mark.parametrize("passes_before", [0, 2])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_activation_counts_what_its_pre_hook_gives(way, passes_before, mode):
    def change(module, args, kwargs=None):
        if not isinstance(module, nn.ReLU):
            return None
        if way == "in place":
            args[0].sub_(0.7)
            return None
        x = (args[0] - 0.7,)
        return x if kwargs is None else (x, kwargs)

    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(7, 4)
    with mode(), collect(model) as collector:
        for _ in range(passes_before):
            model(x)
        collector.reset()
        if way == "global":
            hook = nn.modules.module.register_module_forward_pre_hook(change)
        else:
            hook = model[1].register_forward_pre_hook(change, with_kwargs=way == "keywords")
        inside = [model(x) for _ in range(2)]
        counts = collector.compute()["1"].counts
    assert torch.equal(inside[0], model(x))
    assert torch.equal(inside[1], model(x))
    hook.remove()
    assert torch.equal(counts, 2 * plain_counts(model[0](x) - 0.7, 1))
    assert not torch.equal(counts, 2 * plain_counts(model[0](x), 1))


CALLS = {
    "nn.Module.__call__": lambda m, x: nn.Module.__call__(m, x),
    "module.__call__": lambda m, x: m.__call__(x),
    "type(module).__call__": lambda m, x: type(m).__call__(m, x),
    "module._call_impl": lambda m, x: m._call_impl(x),
}


@pytest.mark.parametrize("how", CALLS)
def test_other_ways_to_call_are_counted(how):
    model, x = make_part(), torch.randn(7, 3)
    with collect(model) as collector:
        assert torch.equal(CALLS[how](model, x), model(x))
    assert counted(collector) == {"1": 56, "2.1": 70}


def test_call_that_is_kept_from_before_or_meanwhile():
    model, x = make_part(), torch.randn(7, 3)
    kept_before, expected = model.__call__, model(x)
    with collect(model) as collector:
        kept_meanwhile = model.__call__
        assert torch.equal(kept_before(x), expected)
        assert torch.equal(kept_meanwhile(x), expected)
    assert torch.equal(kept_meanwhile(x), expected)
    assert counted(collector) == {"1": 56, "2.1": 70}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("passes_before", [0, 1])
def test_copy_made_meanwhile_is_not_counted(duplicate, passes_before):
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(7, 4)
    with collect(model) as collector:
        for _ in range(passes_before):
            model(x)
        parts = [duplicate(module) for module in model]
        other = nn.Sequential(*parts)
        model(x)
        assert [type(module) for module in other] == [nn.Linear, nn.ReLU]
        assert torch.equal(other(x), model(x))
    assert counted(collector) == {"1": 42 * (2 + passes_before)}


def test_modules_of_others_are_not_touched():
    other, x = behind_linear(nn.ReLU()), torch.randn(7, 4)
    model = make_part()

    def run():
        return other(x), other[3].forward(x)

    collector = assert_invisible(other, run, collect(model))
    assert not collector._statistics()


class FreesItsInput(nn.Module):
    """It drops a value that it has passed to an activation."""

    def __init__(self):
        super().__init__()
        self.relu, self.kept = nn.ReLU(), []

    def forward(self, x):
        x = x + 1
        kept = weakref.ref(x)
        y = self.relu(x)
        x = None
        self.kept.append(kept() is not None)
        return y


@pytest.mark.parametrize("other", [False, True])
@torch.no_grad()
def test_values_that_a_model_drops_are_freed(other):
    """Also in a model of the same class that nobody watches, as a teacher may be."""
    model = FreesItsInput()
    with collect(FreesItsInput() if other else model):
        for _ in range(3):
            model(torch.ones(2, 3))
    assert model.kept == [False] * 3
