"""Modules whose operators are not followed in each call: all that is known is the same as if each were followed."""

import contextlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy.sites import channel_axis, known_calls, tensor_notes
from fastentropy.sites.channel_axis import AxisTracker
from fastentropy.sites.padding import TokenAxes
from tests._helpers.modes import RecordsOperators

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
WIDTH, TOKENS = 6, 6  # equal, so that no size tells the axes apart


class Loop(nn.Module):
    """Steps drawn at random, many times over, of which some outputs are kept, and uses of what was kept after the loop."""

    STEPS = (
        lambda m, h: m.act(m.linear(h)),
        lambda m, h: m.gelu(m.norm(m.linear(h))),
        lambda m, h: F.relu(m.linear(h)),
        lambda m, h: m.inplace(m.linear(h) + h),
        lambda m, h: m.act(m.conv(h)),
        lambda m, h: m.act(h.transpose(1, 2)).transpose(1, 2),
        lambda m, h: torch.cat([m.linear(h[:, :2]), h[:, 2:]], 1),
        lambda m, h: m.leaky(h.data),
        lambda m, h: m.linear(h).mul_(2),
        lambda m, h: m.conv(h.mT).mT,
    )
    USES = (
        lambda m, kept: torch.stack(kept),
        lambda m, kept: torch.stack(kept, -1),
        lambda m, kept: kept[-1].transpose(1, 2),
        lambda m, kept: torch.cat(kept, 2).mT,
        lambda m, kept: kept[-1].flatten(1),
        lambda m, kept: sum(kept).permute(2, 0, 1),
        lambda m, kept: kept[0].as_strided((2, WIDTH, TOKENS), (WIDTH * TOKENS, 1, WIDTH)),
    )

    def __init__(self, seed):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.act, self.gelu, self.leaky, self.inplace = nn.ReLU(), nn.GELU(), nn.LeakyReLU(0.2), nn.ReLU(inplace=True)
        self.last = nn.ModuleList(nn.ReLU() for _ in self.USES)
        generator = torch.Generator().manual_seed(seed)
        self.steps = torch.randint(len(self.STEPS), (4,), generator=generator).tolist()
        self.keeps = torch.randint(2, (4,), generator=generator).tolist()

    def forward(self, h):
        kept = []
        for _ in range(5):
            for step, keeps in zip(self.steps, self.keeps, strict=True):
                h = self.STEPS[step](self, h)
                kept += [h] * keeps
        kept.append(h)
        return [act(use(self, kept)) for use, act in zip(self.USES, self.last, strict=True)]


class Masked(nn.Module):
    """A model that takes a padding mask."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, attention_mask):
        return self.inner(x)


@contextlib.contextmanager
def every_operator_followed(monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr(channel_axis, "is_only_mode", lambda mode: False)
        yield


def collected(model, batches, first_counts=True):
    with fe.collect(model) as collector:
        outputs = [model(batches[0])]
        if not first_counts:
            collector.reset()
        outputs += [model(x) for x in batches[1:]]
    return collector.compute(), outputs


@pytest.mark.filterwarnings("ignore:nothing tells", "ignore:.*as functions")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(12))
def test_loops_are_counted_as_if_every_operator_were_followed(seed, mode, monkeypatch):
    # In inference mode PyTorch rounds otherwise where composed operators are followed.
    model, is_exact = Loop(seed), mode is not torch.inference_mode
    batches = [torch.randn(2, TOKENS, WIDTH) for _ in range(3)]
    with mode():
        expected = [model(x.clone()) for x in batches]
        with every_operator_followed(monkeypatch):
            slow, _ = collected(model, [x.clone() for x in batches], is_exact)
        fast, outputs = collected(model, [x.clone() for x in batches], is_exact)
    assert list(fast) == list(slow)
    for name in slow:
        assert torch.equal(fast[name].counts, slow[name].counts)
        assert fast[name].axis_is_inferred == slow[name].axis_is_inferred
    for ys, others in list(zip(outputs, expected, strict=True))[not is_exact :]:
        assert all(torch.equal(y, other) for y, other in zip(ys, others, strict=True))


def evidence_in(model, monkeypatch):
    """All that is found for the sites of a model when they are discovered."""

    def find(tracker, x):
        found.append(evidence(tracker, x))
        return found[-1]

    found, evidence = [], AxisTracker.evidence
    with monkeypatch.context() as patches, torch.no_grad():
        patches.setattr(AxisTracker, "evidence", find)
        with fe.collect(model):
            model(torch.randn(2, TOKENS, WIDTH), attention_mask=torch.ones(2, TOKENS, dtype=torch.bool))
    return found


@pytest.mark.filterwarnings("ignore:nothing tells", "ignore:.*as functions")
@pytest.mark.parametrize("seed", range(12))
def test_evidence_is_that_of_every_operator_followed(seed, monkeypatch):
    model = Masked(Loop(seed))
    with every_operator_followed(monkeypatch):
        expected = evidence_in(model, monkeypatch)
    assert evidence_in(model, monkeypatch) == expected
    assert any(isinstance(found.token_axes, TokenAxes) for found in expected)


def operators_of(tracker, run, monkeypatch):
    """How many operators the tracker follows in a function."""
    count, handle = 0, AxisTracker.__torch_dispatch__

    def follow(*args, **kwargs):
        nonlocal count
        count += 1
        return handle(*args, **kwargs)

    with monkeypatch.context() as patches, torch.no_grad(), tracker.following():
        patches.setattr(AxisTracker, "__torch_dispatch__", follow)
        run()
    return count


def run_layer(tracker, layer, *args, **kwargs):
    return tracker.run_layer(layer, type(layer).__call__, args, kwargs)


def test_a_known_layer_is_not_followed_until_anything_changes(monkeypatch):
    layer, x = nn.Linear(4, 6), torch.randn(5, 4)
    tracker = AxisTracker(layer.parameters())

    def follows(*args, layer=layer, **kwargs):
        return bool(operators_of(tracker, lambda: run_layer(tracker, layer, *args, **kwargs), monkeypatch))

    assert [follows(x), follows(x), follows(torch.randn(5, 4))] == [True, False, False]
    assert [follows(torch.randn(3, 4)), follows(torch.randn(3, 4))] == [True, False]
    assert [follows(x.T.contiguous().T), follows(x), follows(x)] == [True, True, False]
    assert follows(input=x)
    assert follows(nn.Parameter(x))
    with torch.autocast("cpu"):
        assert follows(x)
    assert not follows(x)
    hook = layer.register_forward_hook(lambda *_: None)
    assert follows(x)
    hook.remove()
    assert not follows(x)
    layer.forward = lambda x: F.linear(x, layer.weight)
    assert follows(x)
    del layer.forward
    with tracker.following():
        known = run_layer(tracker, nn.Linear(4, 4), x)
    assert follows(known)  # of which something else is known


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 1), nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=str)
def test_the_output_of_a_known_layer_has_the_same_note(layer):
    tracker, notes = AxisTracker(layer.parameters()), []
    for _ in range(3):
        x = torch.randn(2, 4, 4)
        with tracker.following():
            tracker.follow_tokens(x)
            y = run_layer(tracker, layer, x)
            notes.append((tracker.axis_of(y), tracker.axis_of(y.mT), tracker.token_axes(y.mT)))
    assert notes[0] == notes[1] == notes[2]
    assert notes[0][0] == (2 if type(layer) in (nn.Linear, nn.LayerNorm) else 1)


def test_what_is_computed_from_weights_stays_a_weight():
    layer, weight = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))
    tracker = AxisTracker([*layer.parameters(), weight])
    with tracker.following(), torch.no_grad():
        w = weight * 2
        made = [tracker.run_elementwise(w, w.relu), *(run_layer(tracker, layer, w) for _ in range(3))]
        axes = [tracker.axis_of(torch.randn(5, 4) @ y) for y in made]
    assert axes == [1] * 4


def test_an_output_of_another_shape_has_no_note():
    layer, x = nn.Linear(4, 4), torch.randn(5, 4)
    tracker = AxisTracker(layer.parameters())
    with tracker.following(), torch.no_grad():
        run_layer(tracker, layer, x)
        layer.weight.data, layer.bias.data = torch.randn(7, 4), torch.randn(7)
        y = run_layer(tracker, layer, x)
    assert tracker.axis_of(y) is None


@pytest.mark.parametrize(
    "transform",
    [
        lambda call: torch.vmap(call),
        lambda call: torch.func.functionalize(call),
        lambda call: lambda x: torch.func.jvp(call, (x,), (torch.ones_like(x),))[0],
        lambda call: lambda x: torch.func.grad(lambda x: call(x).sum())(x),
    ],
    ids=["vmap", "functionalize", "jvp", "grad"],
)
def test_transforms_pass_through(transform):
    layer, x = nn.Linear(4, 6), torch.randn(5, 4)
    tracker = AxisTracker(layer.parameters())
    with tracker.following():
        for _ in range(3):
            assert tracker.axis_of(run_layer(tracker, layer, x)) == 1
            assert torch.allclose(transform(lambda x: run_layer(tracker, layer, x))(x), transform(layer)(x))


@pytest.mark.parametrize("place", ["layer_input", "layer_call", "place_of"])
def test_what_fails_in_the_bookkeeping_stays_there(place, monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError

    layer, x = nn.Linear(4, 6), torch.randn(5, 4)
    tracker = AxisTracker(layer.parameters())
    with tracker.following():
        run_layer(tracker, layer, x)
        monkeypatch.setattr(channel_axis if place != "place_of" else tensor_notes, place, fail)
        y = run_layer(tracker, layer, x)
        monkeypatch.undo()
        assert torch.equal(y, layer(x))
        assert tracker.axis_of(y) in (None, 1)
        assert tracker.axis_of(run_layer(tracker, layer, x)) == 1


@pytest.mark.parametrize("inside", [False, True])
def test_other_modes_see_every_operator(inside):
    layer, x = nn.Linear(4, 6), torch.randn(5, 4)
    tracker = AxisTracker(layer.parameters())
    with torch.no_grad():
        with RecordsOperators() as expected:
            layer(x).relu()
        with contextlib.ExitStack() as stack:
            seeing = RecordsOperators()
            for mode in (tracker.following(), seeing) if inside else (seeing, tracker.following()):
                stack.enter_context(mode)
            for _ in range(3):
                y = run_layer(tracker, layer, x)
                tracker.run_elementwise(y, y.relu)
    assert seeing.seen == 3 * expected.seen


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, RecursionError])
def test_what_an_activation_raises_passes_and_leaves_the_mode(error):
    def fail():
        raise error

    tracker = AxisTracker()
    with tracker.following():
        with pytest.raises(error):
            tracker.run_elementwise(torch.ones(2), fail)
        assert torch._C._len_torch_dispatch_stack() == 1
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_interrupt_at_any_line_leaves_no_mode():
    layer, x = nn.Linear(4, 6), torch.randn(5, 4)
    files = (channel_axis.__file__, known_calls.__file__, channel_axis.step_back.__code__.co_filename)
    names = ("_run_aside", "step_aside", "step_back", "is_only_mode", "run_layer", "layer_input", "_set_note", "_look_at")

    def interrupt(at):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if frame.f_code.co_filename not in files or frame.f_code.co_name not in names:
                return None if event == "call" else trace
            if event == "line":
                count += 1
                if count == at:
                    raise KeyboardInterrupt
            return trace

        tracker = AxisTracker(layer.parameters())
        with contextlib.suppress(KeyboardInterrupt, RuntimeError), torch.no_grad(), tracker.following():
            run_layer(tracker, layer, x)
            sys.settrace(trace)
            try:
                run_layer(tracker, layer, x)
            finally:
                sys.settrace(None)
        assert (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()) == (0, 0), at
        return count

    total = interrupt(-1)
    assert total > 20
    for at in range(1, total):
        interrupt(at)
