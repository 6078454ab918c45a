"""Plans (prepared launches of a kernel): whatever is changed between two passes, outputs are those without a collector.

No GPU is needed. Its kernels are emulated: as there, every activation is fused with its count, and a prepared launch keeps the
parameters that it was prepared with.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fastentropy import collect
from fastentropy._compat import TorchDispatchMode
from fastentropy_kernels.activations import activate
from fastentropy_kernels.states import dispatch, plan, reference
from tests._helpers.counts import plain_counts
from tests._helpers.tensors import assert_same

REPEATS = 4  # a plan is made when a call is repeated


class Launch:
    """A prepared launch on tensors at given addresses."""

    made = used = 0

    def __init__(self, arranged, counts, y, request):
        self.like, self.counts, self.request = arranged.values, counts, request
        Launch.made += 1

    def is_current(self):
        return True

    def at(self, address, like):
        memory = (ctypes.c_byte * like.nbytes).from_address(address)
        return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)

    def __call__(self, x, y, counts):
        Launch.used += 1
        x, counts = self.at(x, self.like), self.at(counts, self.counts)
        run(x, counts, self.at(y, self.like) if y else None, self.request.activation, self.request.parameters)


def run(values, counts, y, activation, parameters):
    reference.add_states(values, counts, 1)
    if y is not None:
        with torch.no_grad():
            y.copy_(activate(values, activation, parameters))


def add_states(values, counts, *, y=None, activation="identity", parameters=(), **_):
    run(values, counts, torch.empty_like(values) if y is None else y, activation, parameters)


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch):
    kernels = SimpleNamespace(fuses=lambda activation, edges: True, add_states=add_states)
    monkeypatch.setattr(dispatch, "state_kernels", lambda impl: kernels)
    monkeypatch.setattr(dispatch, "_is_fused", lambda activation, device, dtype: True)
    monkeypatch.setattr(plan, "_prepare", Launch)
    Launch.made = Launch.used = 0


def assert_invisible(make, changes, contexts=()):
    """Run a model with a collector and without, and compare all outputs, inputs of the activation and counts.

    Args:
        make: makes the activation.
        changes: functions that change the activation. Between two changes the model runs several times.
        contexts: for each change, a function that returns the context in which the model runs afterwards; or nothing.
    """
    torch.manual_seed(0)
    linear, batches = nn.Linear(3, 5), [torch.randn(7, 3) for _ in range(REPEATS)]
    contexts = contexts or [torch.no_grad] * len(changes)

    def passes(act, collector=None):
        model, outputs, inputs = nn.Sequential(linear, act), [], []
        model.eval()
        with collector or torch.no_grad():
            for change, context in zip(changes, contexts, strict=True):
                change(act)
                for batch in batches:
                    with torch.no_grad(), context():
                        x = linear(batch)
                        inputs.append(x.clone())
                        outputs += [act(x), x, model(batch)]
        return outputs, inputs

    expected, inputs = passes(make())
    act = make()
    collector = collect(nn.Sequential(linear, act), channel_axis={"1": 1})
    actual, _ = passes(act, collector)
    assert [y.dtype for y in actual] == [y.dtype for y in expected]
    assert_same(actual, expected)
    return collector, inputs


def set_to(name, value):
    return lambda act: setattr(act, name, value)


def nothing(act):
    pass


CHANGED = {
    "slope": (lambda: nn.LeakyReLU(0.1), "negative_slope", (0.1, 0.5, 1.0, 0.0, -0.0)),
    "integer slope": (nn.LeakyReLU, "negative_slope", (0.5, 1, 2)),
    "slope that is a tensor": (nn.LeakyReLU, "negative_slope", (torch.tensor(0.5), 0.5, torch.tensor(0.25))),
    "alpha of elu": (nn.ELU, "alpha", (1.0, 0.3)),
    "alpha of celu": (nn.CELU, "alpha", (1.0, 2.5)),
    "beta": (nn.Softplus, "beta", (1, 3.0)),
    "threshold": (nn.Softplus, "threshold", (20, 0.1, 20.0)),
    "maximum": (nn.Hardtanh, "max_val", (1.0, 2.0, 0.25)),
    "minimum": (nn.Hardtanh, "min_val", (-1.0, -0.25)),
    "maximum of relu6": (nn.ReLU6, "max_val", (6.0, 0.5, 6)),
    "minimum at the maximum": (nn.Hardtanh, "min_val", (-1.0, 1.0)),
    "approximation": (nn.GELU, "approximate", ("none", "tanh", "none")),
    "gelu in place, which it is not": (nn.GELU, "inplace", (True, False)),
    **{
        f"{kind.__name__} in place": (kind, "inplace", (False, True, False))
        for kind in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh)
    },
    "another class": (nn.ReLU, "__class__", (nn.ReLU, nn.SELU, nn.ReLU)),
    "another forward": (nn.SiLU, "forward", (lambda x: x + 1, F.silu)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_attributes_that_change(case):
    make, name, values = CHANGED[case]
    assert_invisible(make, [nothing, *(set_to(name, value) for value in values)])
    assert Launch.made


def test_plans_are_used_while_nothing_changes():
    collector, inputs = assert_invisible(lambda: nn.LeakyReLU(0.3), [nothing, nothing])
    assert Launch.used >= REPEATS
    expected = sum(2 * plain_counts(x, 1) for x in inputs)
    assert torch.equal(collector.compute()["1"].counts, expected)


def test_a_slope_that_changes_in_each_pass_makes_no_plan():
    assert_invisible(nn.LeakyReLU, [set_to("negative_slope", index / 10) for index in range(2)])
    made = Launch.made
    model, x = nn.Sequential(nn.LeakyReLU()).eval(), torch.randn(4, 3)
    with torch.no_grad(), collect(model):
        for index in range(5):
            model[0].negative_slope = index / 7
            assert_same(model(x), F.leaky_relu(x, index / 7))
    assert Launch.made == made


def test_a_slope_that_changes_within_a_pass():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(3, 3), nn.LeakyReLU(0.1)

        def forward(self, x, slopes):
            for slope in slopes:
                self.act.negative_slope = slope
                x = self.act(self.linear(x))
            return x

    model, x = Twice().eval(), torch.randn(5, 3)
    for slopes in ((0.1, 0.7), (0.7, 0.1), (0.7, 0.7)):
        with torch.no_grad(), collect(model):
            for _ in range(REPEATS):
                y = model(x, slopes)
            expected = x
            for slope in slopes:
                expected = F.leaky_relu(model.linear(expected), slope)
            assert_same(y, expected)
    assert Launch.used


def doubled(x, *args, **kwargs):
    return 2 * x


class Doubles(TorchFunctionMode):
    """Doubles instead of any gelu."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return 2 * args[0] if func is F.gelu else func(*args, **(kwargs or {}))


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [Doubles, Sees, lambda: torch.device("cpu"), lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("kind", [nn.GELU, nn.Softplus, nn.ReLU])
def test_modes_that_begin_and_end(kind, context):
    contexts = [torch.no_grad, context, torch.no_grad]
    assert_invisible(kind, [nothing] * 3, contexts)
    assert Launch.used


@pytest.mark.parametrize("kind", [nn.GELU, nn.LeakyReLU])
def test_forward_that_is_replaced_on_the_class(kind):
    original = kind.forward
    try:
        assert_invisible(kind, [nothing, *(lambda _, f=f: setattr(kind, "forward", f) for f in (doubled_forward, original))])
    finally:
        kind.forward = original
    assert Launch.used


def doubled_forward(self, x):
    return 2 * x


def test_function_that_is_replaced():
    original = F.gelu
    try:
        assert_invisible(nn.GELU, [nothing, lambda _: setattr(F, "gelu", doubled), lambda _: setattr(F, "gelu", original)])
    finally:
        F.gelu = original
    assert Launch.used


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_hooks_that_come_and_go(kind, everywhere):
    handles = []

    def hook(module, args, *output):
        if not isinstance(module, nn.SiLU):
            return None
        return output[0] + 1 if output else (args[0] - 1,)

    def change(act):
        register = getattr(nn.modules.module, f"register_module_{kind}") if everywhere else getattr(act, f"register_{kind}")
        handles.append(register(hook))

    try:
        assert_invisible(nn.SiLU, [nothing, change, lambda act: handles[-1].remove()])
    finally:
        for handle in handles:
            handle.remove()
    assert Launch.used
