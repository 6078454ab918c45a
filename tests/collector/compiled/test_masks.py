"""Padding masks in compiled code."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.compiling import Block, NotingBackend, assert_same

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::UserWarning")]


class Inner(nn.Module):
    """Takes a mask of its own, and ignores it."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, attention_mask=None):
        return self.block(x)


class Tokens(nn.Module):
    """Reads token ids. The tokens lie on axes 0 and 1, on axis 0 alone, and on axes 0 and 2."""

    def __init__(self, passed="same"):
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, 8), nn.ModuleList([Block(), Block()])
        self.inner, self.conv, self.flat, self.passed = Inner(), nn.Conv1d(8, 6, 1), nn.Linear(8, 5), passed

    def forward(self, ids, attention_mask=None):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        given = {"same": attention_mask, "none": None, "reversed": None if attention_mask is None else attention_mask.flip(1)}
        x = self.inner(x, given[self.passed])
        z = F.silu(self.flat(x.flatten(0, 1)))
        pooled = F.gelu(x.mean(1))
        return F.relu(self.conv(x.transpose(1, 2))).sum(), z, pooled


def calls(*shapes):
    """Token ids and masks of these shapes. Every mask leaves something out."""
    given = []
    for batch, tokens in shapes:
        mask = torch.arange(tokens)[None] < torch.randint(1, tokens, (batch, 1))
        given.append((torch.randint(11, (batch, tokens)), mask.long()))
    return given


def collected(run, model, given):
    with warnings.catch_warnings(), torch.no_grad(), fe.collect(model) as collector:
        warnings.filterwarnings("ignore", ".*fe.isolate")
        for ids, mask in given:
            run(ids) if mask is None else run(ids, attention_mask=mask)
    return collector.compute()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_masks(backend):
    model, backend = Tokens().eval(), NotingBackend(backend)
    given = calls((4, 5), (4, 5), (4, 5), (4, 5))
    given.insert(2, (given[0][0], None))
    given.append((given[0][0], torch.ones(4, 5, dtype=torch.long)))
    plain = copy.deepcopy(model)
    expected = collected(plain, plain, given)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert_same(collected(compiled, compiled, given), expected)
    assert backend.compilations() == 3  # padded, with a mask but without padding, and without a mask
    assert_same(collected(compiled, compiled, given), expected)
    assert backend.compilations() == 0


def test_other_sizes():
    model, backend = Tokens().eval(), NotingBackend()
    given = calls((4, 5), (4, 5), (3, 7), (2, 6), (5, 9), (3, 3))
    plain = copy.deepcopy(model)
    expected = collected(plain, plain, given)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for ids, mask in given[1:]:
        compiled(ids, attention_mask=mask)
    usual = backend.compilations()
    assert_same(collected(compiled, compiled, given), expected)
    assert backend.compilations() <= usual


def test_masks_of_parts():
    model = Tokens().eval()
    given = [*calls((4, 5), (4, 5), (3, 7), (2, 6)), (torch.randint(11, (2, 6)), None)]
    plain = copy.deepcopy(model)
    expected = collected(plain, plain, given)
    for layer in (*model.layers, model.inner):
        layer.compile(backend="aot_eager")
    assert_same(collected(model, model, given), expected)


@pytest.mark.parametrize("passed", ["none", "reversed"])
def test_inner_module_with_another_mask_runs_eagerly(passed):
    model, given = Tokens(passed).eval(), calls((4, 5), (4, 5), (4, 5), (4, 5))
    plain = copy.deepcopy(model)
    expected = collected(plain, plain, given)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="'inner' has a padding mask of its own"):
        statistics = collected(compiled, compiled, given)
    assert list(statistics) == list(expected)
    assert_same(statistics, expected)
