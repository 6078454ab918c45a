"""Calls that are run by the launch prepared for their site: counts and outputs are those of calls whose site is looked up."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy.collector import counting
from fastentropy.sites.observer import NOT_RUN


class Loop(nn.Module):
    """Steps with shared activations, as modules and as functions, in place and not."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 6), nn.Conv1d(6, 6, 1)
        self.relu, self.gelu, self.inplace, self.leaky = nn.ReLU(), nn.GELU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.3)

    def forward(self, x, attention_mask=None):
        for _ in range(3):
            x = self.relu(self.linear(x))
            x = self.inplace(self.linear(x) + x)
            x = self.leaky(self.conv(x.mT).mT)
            x = F.relu(self.gelu(self.linear(x)))
        return x


def drawn_passes(seed):
    """Functions that run a pass in some way, twice each on average."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(16):
        batch, mode = draw.choice([2, 2, 5]), draw.choice([torch.no_grad, torch.enable_grad, torch.inference_mode])
        change = draw.choice(["none"] * 4 + ["slope", "hook", "double", "mask", "paused", "threads"])
        x = torch.randn(batch, 4, 6, generator=generator)
        yield x, torch.rand(batch, 4, generator=generator) > 0.3, mode, change, draw.random()


def run_pass(model, collector, x, mask, mode, change, value):
    """Run a model in a drawn way, with a collector or without, and leave everything as it was."""
    model.leaky.negative_slope = value if change == "slope" else 0.3
    hook = model.relu.register_forward_hook(lambda module, args, y: y * 2) if change == "hook" else None
    model.to(torch.double if change == "double" else torch.float)
    threads = torch.get_num_threads()
    torch.set_num_threads(2 if change == "threads" else threads)
    try:
        with mode():
            options = {"attention_mask": mask} if change == "mask" else {}
            if collector is None or change != "paused":
                return model(x.to(model.linear.weight.dtype), **options)
            with collector.paused():
                return model(x, **options)
    finally:
        torch.set_num_threads(threads)
        if hook is not None:
            hook.remove()


@pytest.mark.filterwarnings("ignore:.*as functions")
@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_sites_that_are_looked_up(seed, monkeypatch):
    model, ran = Loop(), []
    run_repeated = counting.run_repeated

    def repeat(*args):
        y = run_repeated(*args)
        ran.append(y is not NOT_RUN)
        return y

    def collected():
        with fe.collect(model) as collector:
            outputs = [run_pass(model, collector, *drawn) for drawn in drawn_passes(seed)]
        return collector.compute(), outputs

    expected = [run_pass(model, None, *drawn) for drawn in drawn_passes(seed)]
    monkeypatch.setattr(counting, "run_repeated", repeat)
    fast, outputs = collected()
    monkeypatch.setattr(counting, "run_repeated", lambda *_: NOT_RUN)
    slow, _ = collected()
    assert any(ran)
    assert list(fast) == list(slow)
    for name in slow:
        assert torch.equal(fast[name].counts, slow[name].counts)
        assert fast[name].nan == slow[name].nan
    for y, other in zip(outputs, expected, strict=True):
        assert torch.allclose(y, other, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_sites_that_are_left_out_later(mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with fe.collect(model, misfits="skip") as collector, mode():
        for _ in range(4):
            model(torch.randn(5, 3))
        model[0], model[2] = nn.Linear(3, 7), nn.Linear(7, 4)
        with pytest.warns(UserWarning, match="'1' had 4 neurons"):
            model(torch.randn(5, 3))
        model[0], model[2] = nn.Linear(3, 4), nn.Linear(4, 4)
        for _ in range(3):
            model(torch.randn(5, 3))
    assert list(collector.compute()) == ["3"]


@pytest.mark.filterwarnings("ignore:nothing tells")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_another_activation_at_the_same_place_is_noted(mode):
    class Swaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x, other=None):
            if other is not None:
                self.act = other
            return self.act(x)

    model = Swaps()
    with fe.collect(model) as collector, mode():
        for _ in range(3):
            model(torch.randn(5, 3, requires_grad=mode is torch.enable_grad))
        with pytest.warns(UserWarning, match="was relu and is gelu"):
            model(torch.randn(5, 3, requires_grad=mode is torch.enable_grad), nn.GELU())
    assert collector.compute()["act"].counts.sum() == 4 * 15
