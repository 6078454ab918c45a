"""A model that is followed behaves as it does without: whatever its tensors are, and whatever is raised where."""

import contextlib
import gc
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastentropy.sites import channel_axis, output_notes
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.padding import BY_SHAPE

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6))


def stacks():
    return torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_pass_through(mode, layout):
    x, model = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 5)], layout=layout), network()
    tracker = AxisTracker(model.parameters())
    with mode():
        expected = model(x)
        with tracker.following():
            y = model(x)
        assert stacks() == (0, 0)
        assert all(torch.equal(a, b) for a, b in zip(y.unbind(), expected.unbind(), strict=True))
    assert tracker.axis_of(y) is None
    assert tracker.token_axes(y) == BY_SHAPE


@pytest.mark.parametrize("mode", MODES)
def test_fake_tensors_pass_through(mode):
    with FakeTensorMode(), mode():
        model, x = network(), torch.randn(5, 4)
        tracker = AxisTracker(model.parameters())
        with tracker.following():
            y = model(x)
            assert (y.device.type, tuple(y.shape)) == ("cpu", (5, 6))
    assert tracker.axis_of(y) is None


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_is_exported_while_it_is_followed(strict):
    model, x = network(), torch.randn(5, 4)
    tracker = AxisTracker(model.parameters())
    with tracker.following():
        program = torch.export.export(model, (x,), strict=strict)
        y = model(x)
    assert torch.equal(program.module()(x), y)
    assert tracker.axis_of(y) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "transform",
    [
        lambda model: torch.vmap(model),
        lambda model: torch.func.functionalize(model),
        lambda model: lambda x: torch.func.jvp(model, (x,), (torch.ones_like(x),))[0],
        lambda model: lambda x: model(x.to_sparse().to_dense()),
        lambda model: lambda x: model(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()),
        lambda model: lambda x: torch.cond(torch.tensor(True), lambda x: x + 1, lambda x: x * 2, (x,)),
        lambda model: lambda x: model(torch.ones(5, 5).to_sparse_csr() @ x),
    ],
    ids=["vmap", "functionalize", "jvp", "sparse", "quantised", "cond", "csr"],
)
def test_other_tensors_pass_through(mode, transform):
    torch.compiler.reset()  # in PyTorch 2.11 `cond` raises after it has run inside of any mode
    model, x = network(), torch.randn(5, 4)
    tracker = AxisTracker(model.parameters())
    with mode(), contextlib.suppress(NotImplementedError):
        expected = transform(model)(x)
        with tracker.following():
            y = transform(model)(x)
        assert torch.equal(y, expected)
    assert stacks() == (0, 0)


class Raising(TorchDispatchMode):
    """Raise in one operator, and count them."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine"), RecursionError("mine")], ids=repr)
def test_an_exception_at_any_operator_passes_unchanged(mode, error):
    model, x = network(), torch.randn(5, 4)
    tracker = AxisTracker(model.parameters())
    with mode():
        model(x)
        operators = Raising(0, error)
        with operators, AxisTracker().following():
            model(x)
        for at in range(1, operators.count + 1):
            raising = Raising(at, error)
            with pytest.raises(type(error)) as caught, raising, tracker.following():
                model(x)
            assert caught.value is error
            assert raising.count == at  # nothing ran twice
            assert stacks() == (0, 0)
        with tracker.following():
            y = model(x)
    assert tracker.axis_of(y) == 1


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, MemoryError])
@pytest.mark.parametrize(
    "place", [(channel_axis, "describe"), (channel_axis, "output_note"), (output_notes, "reshaped"), (channel_axis, "note_in")]
)
def test_what_fails_in_the_bookkeeping_stays_there(place, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    model, x = network(), torch.randn(5, 4)
    expected = model(x)
    tracker = AxisTracker(model.parameters())
    with tracker.following():
        tracker.follow_tokens(x[None])
        known = model[0](x)
        assert tracker.axis_of(known) == 1
        monkeypatch.setattr(*place, fail)
        y = model(x).view(5, 6)
        monkeypatch.undo()
    assert torch.equal(y, expected)
    assert (tracker.axis_of(y), tracker.token_axes(y)) == (None, BY_SHAPE)
    assert stacks() == (0, 0)


def test_an_interrupt_at_any_line_leaves_no_mode():
    """An interrupt is raised at the 1st, 2nd, … line that runs in the tracker or in what enters and leaves it."""
    model, x = network(), torch.randn(5, 4)
    files = (channel_axis.__file__, output_notes.__file__, channel_axis.entered.__wrapped__.__code__.co_filename)

    def interrupt(at):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if frame.f_code.co_filename not in files or "_deactivate" in frame.f_code.co_name:
                return None if event == "call" else trace
            if event == "line":
                count += 1
                if count == at:
                    raise KeyboardInterrupt
            return trace

        tracker = AxisTracker(model.parameters())
        sys.settrace(trace)
        try:
            with contextlib.suppress(KeyboardInterrupt), torch.no_grad(), tracker.following():
                model[0](x)
        finally:
            sys.settrace(None)
        gc.collect(1)  # what the interrupt left in cycles is young
        assert stacks() == (0, 0), at
        return count

    total = interrupt(-1)
    assert total > 100
    for at in range(1, total, 3):
        interrupt(at)
    assert torch.equal(model(x), model(x))


def test_kept_notes_hold_in_the_next_block():
    model = nn.ModuleList([nn.Conv1d(3, 6, 1), nn.Conv1d(6, 6, 1)])
    tracker = AxisTracker(model.parameters())
    with torch.no_grad():
        with tracker.following():
            h = model[0](torch.randn(2, 3, 8))
            forgotten = h * 2
        tracker.keep({"h": [h]})
        assert tracker.axis_of(h) == 1
        assert tracker.axis_of(forgotten) is None
        with tracker.following():
            y = h.mT + 1
        assert tracker.axis_of(y) == 2
        tracker.keep((y,))
        assert (tracker.axis_of(h), tracker.axis_of(y)) == (1, 2)


def test_memory_that_is_used_again_is_not_known():
    model = nn.Conv1d(3, 6, 1)
    tracker = AxisTracker(model.parameters())
    for _ in range(200):
        with torch.no_grad(), tracker.following():
            y = model(torch.randn(2, 3, 8))
        tracker.keep(y)
        assert tracker.axis_of(y) == 1
        del y
        assert tracker.axis_of(torch.empty(2, 6, 8)) is None


def test_notes_of_dead_tensors_do_not_pile_up():
    model = nn.Conv1d(3, 3, 1)
    tracker = AxisTracker(model.parameters())
    x, buffer = torch.randn(2, 3, 8), torch.zeros(2, 3, 8000)
    with torch.no_grad(), tracker.following():
        for step in range(2000):
            x = model(x)
            buffer[..., step : step + 8].copy_(x)
    assert len(tracker._notes.storages) < 2100
    assert max(len(storage.notes) for storage in tracker._notes.storages.values()) <= 256
