"""An error at any operator of a pass leaves the model, PyTorch and the counts as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastentropy import collect, register_activation
from tests._helpers.invisibility import appearance, changes, differences, import_all, mechanism
from tests._helpers.networks import Reads
from tests._helpers.statistics import counted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*fe.isolate")]
ERRORS = [RuntimeError, KeyboardInterrupt, RecursionError]
MODES = [torch.enable_grad, torch.inference_mode]


class SquaredReLU(nn.Module):
    """An activation of the user, which has no kernel."""

    def forward(self, x):
        return x.clamp(min=0).square()


@pytest.fixture(scope="module", autouse=True)
def imported():
    import_all()


@pytest.fixture(autouse=True)
def squared_relu():
    register_activation(SquaredReLU, "squared_relu")


def convolutional():
    """Convolution, batch norm, activations as modules and as functions, and one of the user."""

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = F.silu(self.conv2(x)) + x
        return self.fc(self.squared(x.flatten(1)))

    torch.manual_seed(0)
    modules = {"conv": nn.Conv2d(2, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True)}
    modules |= {"conv2": nn.Conv2d(4, 4, 1), "squared": SquaredReLU(), "fc": nn.Linear(36, 3)}
    return Reads(forward, **modules).eval(), (torch.randn(3, 2, 3, 3),), {}, {"relu": 108, "silu": 108, "squared": 108}


class Masked(nn.Module):
    """A model of tokens with a padding mask."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.act, self.head = nn.Embedding(9, 4), nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)

    def forward(self, input_ids, attention_mask=None):
        x = self.act(self.fc(self.embed(input_ids)))
        x = (x * attention_mask[..., None]).sum(1)
        return F.relu(self.head(x))


def masked():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    inputs = {"input_ids": torch.randint(9, (2, 5)), "attention_mask": mask}
    return Masked().eval(), (), inputs, {"act": 8 * 6, "relu": 2 * 2}


NETWORKS = {"convolutional": convolutional, "masked": masked}


class Fails(TorchDispatchMode):
    """Raise an error at the operator with a number. `seen` has the operators up to it."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.seen = at, error, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        if len(self.seen) > self.at:
            raise self.error
        return func(*args, **kwargs or {})


def operators_of(run):
    """Return the operators that a function runs."""
    with Fails(10**6, RuntimeError()) as mode:
        run()
    return mode.seen


def contains(seen, operators):
    """Return whether all of some operators are among those seen, in order."""
    rest = iter(seen)
    return all(operator in rest for operator in operators)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("passes_before", [0, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_error_at_every_operator(name, kind, passes_before, mode):
    """The error passes unchanged, nothing of the pass is counted, everything is as before, and the next pass is right."""
    model, args, kwargs, sites = NETWORKS[name]()

    def run():
        return model(*args, **kwargs)

    with mode():
        expected, untouched = run(), mechanism()
        before = appearance(model)
        operators = operators_of(run)
        for at in range(2 * len(operators)):
            collector, error = collect(model), kind("here")
            with collector:
                attached = mechanism()
                for _ in range(passes_before):
                    run()
                raised = None
                with Fails(at, error) as user:
                    try:
                        run()
                    except BaseException as caught:
                        raised = caught
                assert raised is (error if len(user.seen) > at else None)
                assert changes(before, appearance(model)) == {}
                assert mechanism() == attached
                assert differences(expected, run()) == []
                assert changes(before, appearance(model)) == {}
            assert changes(before, appearance(model)) == {}
            assert changes(untouched, mechanism()) == {}
            totals = [
                {site: passes * count for site, count in sites.items()}
                for passes in range(passes_before + 1, passes_before + 3)
            ]
            if raised is None:
                del totals[0]
            elif not contains(user.seen[:-1], operators):  # else the model was done, and the counts were being added up
                del totals[1]
            assert counted(collector) in totals, f"operator {at}"
            assert differences(expected, run()) == []


class Interrupts:
    """A user's function that raises when it is called for a time with a number."""

    def __init__(self, function, at, error):
        self.function, self.at, self.error, self.calls = function, at, error, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("passes_before", [0, 1])
@pytest.mark.parametrize("when", ["pre", "forward"])
@pytest.mark.parametrize("name", NETWORKS)
def test_error_in_the_hook_of_every_module(name, when, passes_before, kind):
    model, args, kwargs, sites = NETWORKS[name]()
    with torch.inference_mode():
        expected = model(*args, **kwargs)
        for path, module in model.named_modules():
            before, error = appearance(model), kind("here")

            def fail(*given, error=error):
                raise error

            with collect(model) as collector:
                for _ in range(passes_before):
                    model(*args, **kwargs)
                hook = module.register_forward_pre_hook(fail) if when == "pre" else module.register_forward_hook(fail)
                with pytest.raises(kind) as caught:
                    model(*args, **kwargs)
                hook.remove()
                assert caught.value is error
                assert differences(expected, model(*args, **kwargs)) == []
            assert changes(before, appearance(model)) == {}, path
            assert counted(collector) == {site: (passes_before + 1) * count for site, count in sites.items()}, path


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("passes_before", [0, 1])
@pytest.mark.parametrize("function", ["relu", "silu", "conv2d", "batch_norm", "linear"])
def test_error_in_a_patched_function(monkeypatch, function, passes_before, kind):
    model, args, _, sites = convolutional()
    original, error = getattr(F, function), kind("here")
    with collect(model) as collector:
        for _ in range(passes_before):
            model(*args)
        with monkeypatch.context() as patch:
            patch.setattr(F, function, Interrupts(original, 0, error))
            before = appearance(model)
            with pytest.raises(kind) as caught:
                model(*args)
            assert changes(before, appearance(model)) == {}
        assert caught.value is error
        model(*args)
    assert counted(collector) == {site: (passes_before + 1) * count for site, count in sites.items()}


@pytest.mark.parametrize("passes_before", [0, 1])
def test_endless_recursion_of_the_model(passes_before):
    """A forward that calls itself without an end raises as it does without a collector, and the next pass is right."""

    def forward(self, x):
        return self(x) if self.is_endless else self.act(self.fc(x))

    model, x = Reads(forward, fc=nn.Linear(4, 6), act=nn.ReLU()), torch.randn(7, 4)
    model.is_endless = False
    before = appearance(model)
    with torch.no_grad(), collect(model) as collector:
        for _ in range(passes_before):
            model(x)
        model.is_endless = True
        with pytest.raises(RecursionError):
            model(x)
        model.is_endless = False
        assert torch.equal(model(x), model.act(model.fc(x)))
    assert changes(before, appearance(model)) == {}
    assert counted(collector)["act"] == (passes_before + 2) * 42


@pytest.mark.parametrize("average", ["dataset", "batch"])
def test_error_in_backward(average):
    """An error of a gradient hook comes after the pass, which is counted."""
    model, args, _, sites = convolutional()
    error = KeyboardInterrupt()

    def fail(gradient):
        raise error

    handle = model.conv.weight.register_hook(fail)
    before = appearance(model)
    with collect(model, average=average) as collector:
        with pytest.raises(KeyboardInterrupt):
            model(*args).sum().backward()
        assert changes(before, appearance(model)) == {}
    handle.remove()
    assert counted(collector) == sites
