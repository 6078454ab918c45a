"""Chains continue through concatenations of branches of one value, and through parts of a value that are joined again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy.fusion.chains.elements import Concatenation
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, inference_module, rewrite
from tests._helpers.networks import Reads

IMAGES = torch.randn(2, 4, 6, 5)


def network(forward):
    """Return a network for images `[batch, 4, 6, 5]`; the names of its layers say how their channels change."""
    return Reads(
        forward,
        a=nn.Conv2d(4, 8, 3, padding=1),
        b=nn.Conv2d(8, 4, 3, padding=1),
        c=nn.Conv2d(4, 4, 1),
        d=nn.Conv2d(4, 4, 3, padding=1, groups=4),
        e=nn.Conv2d(8, 8, 1),
        wide=nn.Conv2d(12, 4, 1),
        norm=nn.BatchNorm2d(8),
        rows=nn.Linear(4, 8),
        rows_back=nn.Linear(12, 4),
    ).eval()


#: For each description, a forward function, and the names of the operators of its chains.
CHAINS = {
    "the input beside a branch": (lambda m, x: m.wide(torch.cat([m.a(x), x], 1)), [("a", "wide")]),
    "the input in front of a branch": (lambda m, x: m.wide(torch.cat([x, m.a(x)], 1)), [("a", "wide")]),
    "ghost": (lambda m, x: m.e(torch.cat([y := m.c(x), m.d(y)], 1)), [("c", "d", "e")]),
    "inception": (lambda m, x: m.b(torch.cat([m.c(x), m.d(F.avg_pool2d(x, 3, 1, 1))], 1)), [("c", "d", "b")]),
    "batch norm behind": (lambda m, x: m.b(m.norm(torch.cat([m.c(x), m.d(x)], 1))), [("c", "d", "b")]),
    "dense": (
        lambda m, x: m.wide(torch.cat([y := torch.cat([z := m.c(x), m.d(z)], 1), m.b(y)], 1)),
        [("c", "d", "b", "wide")],
    ),
    "both parts": (lambda m, x: m.b(torch.cat(m.e(m.a(x)).chunk(2, 1)[::-1], 1)), [("a", "e", "b")]),
    "shuffled": (
        lambda m, x: m.b(F.channel_shuffle(torch.cat([(p := m.a(x).chunk(2, 1))[0], m.c(m.d(p[1]))], 1), 2)),
        [("a", "d", "c", "b")],
    ),
    "one part": (lambda m, x: m.c(m.a(x).chunk(2, 1)[1]), [("a", "c")]),
    "parts that go apart": (lambda m, x: m.c((p := m.a(x).chunk(2, 1))[0]) * m.d(p[1]), [("a",), ("c",), ("d",)]),
    "a negative copy": (lambda m, x: m.e(torch.cat([y := m.c(x), -y], 1)), [("c", "e")]),
    "rows": (
        lambda m, x: m.rows_back(torch.cat([m.rows(x.mean((2, 3))), x.mean((2, 3))], 1)),
        [("rows",), ("rows_back",)],
    ),
    "features of tokens": (
        lambda m, x: m.rows_back(torch.cat([m.rows(t := x.flatten(2).transpose(1, 2).relu()), t], -1)),
        [("rows", "rows_back")],
    ),
    "another value": (lambda m, x: m.wide(torch.cat([m.a(x), x.relu()], 1)), [("a",), ("wide",)]),
    "positions": (lambda m, x: m.c(torch.cat([m.c(x), m.d(x)], 2)), [("c",), ("d",), ("c",)]),
    "the batch": (lambda m, x: m.c(torch.cat([m.c(x), m.d(x)], 0)), [("c",), ("d",), ("c",)]),
    "a branch that is read elsewhere": (lambda m, x: m.wide(torch.cat([y := m.a(x), x], 1)) * y.mean(), [("a",), ("wide",)]),
}


def traced(model, x=IMAGES):
    return torch.export.export(model, (x,)).module(check_guards=False)


def rewritten(module, x, form):
    """Return a module with each chain in another form: the result of `form` for its elements and an input."""
    values = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n]

    Record(module).run(x)
    chains = find_chains(module)
    sources = {chain.source: values[chain.source] for chain in chains}
    return rewrite(module, {chain: form(chain, values[chain.source]) for chain in chains}, sources)


def merged(chain, x):
    try:
        return merge(chain.folded, x.shape[2:] if x.ndim == 4 else ())
    except ValueError:
        return chain.folded


@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_chains_of_branches_that_are_joined(name):
    forward, expected = CHAINS[name]
    model, x = network(forward), torch.randn(2, 4, 6, 5)
    module = traced(model)
    assert sorted(map(sorted, (chain.names for chain in find_chains(module)))) == sorted(map(sorted, expected))
    for form in (lambda chain, _: chain.folded, merged):
        torch.testing.assert_close(rewritten(module, x, form)(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_chain_with_a_concatenation_is_one_operator():
    forward, _ = CHAINS["shuffled"]
    (chain,) = find_chains(traced(network(forward)))
    assert any(isinstance(element, Concatenation) for element in chain.elements)
    assert len(merge(chain.folded, (6, 5))) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (p := m.c(x).chunk(2, 1))[0].mul_(2) + p[1],
        lambda m, x: m.e(torch.cat([(p := x.sin())[:, :2].mul_(3), p[:, 2:], m.c(p)], 1)),
        lambda m, x: [y := m.c(p := x.sin()[:, :]), p.mul_(2), m.d(y) + p][-1],
        lambda m, x: [p := x.sin()[:, :4], y := m.c(p), p.mul_(2), m.d(y) + p][-1],
        lambda m, x: [p := x.sin().chunk(1, 1)[0], y := m.c(p), p.mul_(2), m.d(y) + p][-1],
        lambda m, x: [s := x.sin(), m.c(s[:, 1:].relu_().repeat(1, 2, 1, 1)[:, :4]) + s][-1],
        lambda m, x: [s := x.sin(), y := m.c(torch.cat([s[:, 2:], s[:, :2]], 1)), s.mul_(2), m.d(y) * s][-1],
        lambda m, x: [s := x.sin(), p := s[:, 2:], p.mul_(2), m.c(torch.cat([p, p], 1)) + s][-1],
        lambda m, x: [s := x.sin(), p := s.split(2, 1), p[0].mul_(2), m.c(torch.cat([p[1], p[0]], 1)) + s][-1],
    ],
)
@torch.no_grad()
def test_parts_that_are_overwritten_keep_their_order(forward):
    model, x = network(forward), torch.randn(2, 4, 6, 5)
    module = traced(model)
    for form in (lambda chain, _: chain.folded, merged):
        torch.testing.assert_close(rewritten(module, x, form)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scaling_a_part_of_the_input_in_place_stays_outside_of_chains():
    model, x = network(lambda m, x: m.c(x[:, 1:].mul_(2).repeat(1, 2, 1, 1)[:, :4])), torch.randn(2, 4, 6, 5)
    result = rewritten(traced(model), x.clone(), merged)
    theirs, ours = x.clone(), x.clone()
    torch.testing.assert_close(result(ours), model(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs)


def views(shape, order, after):
    """Return a function that reshapes, permutes and reshapes a value; both shapes follow from that of the value."""
    return lambda x: x.reshape(shape(*x.shape)).permute(order).reshape(after(*x.shape))


#: Views of images, and what they are.
VIEWS = {
    "channel shuffle": (
        views(lambda b, c, h, w: (b, 2, c // 2, h, w), (0, 2, 1, 3, 4), lambda b, c, h, w: (b, c, h, w)),
        lambda x: F.channel_shuffle(x, 2),
    ),
    "channels in another order": (
        views(lambda b, c, h, w: (b, 2, 2, c // 4, h, w), (0, 3, 2, 1, 4, 5), lambda b, c, h, w: (b, -1, h, w)),
        lambda x: x.unflatten(1, (2, 2, -1)).permute(0, 3, 2, 1, 4, 5).flatten(1, 3),
    ),
    "transposed": (lambda x: x.unflatten(1, (4, -1)).transpose(1, 2).contiguous().flatten(1, 2), None),
    "pixel shuffle": (
        views(lambda b, c, h, w: (b, c // 4, 2, 2, h, w), (0, 1, 4, 2, 5, 3), lambda b, c, h, w: (b, c // 4, 2 * h, 2 * w)),
        lambda x: F.pixel_shuffle(x, 2),
    ),
    "pixel unshuffle": (
        views(
            lambda b, c, h, w: (b, c, h // 2, 2, w // 2, 2),
            (0, 1, 3, 5, 2, 4),
            lambda b, c, h, w: (b, 4 * c, h // 2, w // 2),
        ),
        lambda x: F.pixel_unshuffle(x, 2),
    ),
}


@pytest.mark.parametrize("first", [True, False], ids=["layer first", "views first"])
@pytest.mark.parametrize("name", VIEWS)
@torch.no_grad()
def test_selections_that_are_written_as_views(name, first):
    function, meaning = VIEWS[name]
    x = torch.randn(2, 8, 6, 4)
    assert meaning is None or torch.equal(function(x), meaning(x))
    front = nn.Conv2d(8, 8, 3, padding=1) if first else nn.Identity()
    model = Reads(lambda m, x: m.back(function(m.front(x))), front=front, back=nn.Conv2d(function(x).shape[1], 3, 1)).eval()
    module = inference_module(export(model, Inputs((x,), {})))
    (chain,) = find_chains(module)
    assert chain.names == ("front",) * first + ("back",)
    assert len(chain.elements) == 2 + first
    for form in (lambda chain, _: chain.folded, merged):
        result = rewritten(module, x, form)
        for size in (1, 3):
            other = torch.randn(size, 8, 6, 4)
            torch.testing.assert_close(result(other), model(other), rtol=1e-4, atol=1e-5)
    assert len(merged(chain, x)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.unflatten(1, (2, 4)).transpose(2, 3).flatten(1, 2),
        lambda x: x.unflatten(1, (2, 4)).permute(0, 3, 2, 1, 4).reshape(2, 6, 8, 4).permute(0, 2, 1, 3),
        lambda x: x.permute(0, 3, 1, 2).reshape(2, 8, 6, 4),
        lambda x: x.unflatten(2, (2, 3)).permute(0, 2, 1, 3, 4).reshape(2, 8, 6, 4),
    ],
)
@torch.no_grad()
def test_other_views_keep_their_meaning(function):
    x = torch.randn(2, 8, 6, 4)
    channels = function(x).shape[1]
    model = Reads(lambda m, x: m.back(function(m.front(x))), front=nn.Conv2d(8, 8, 1), back=nn.Conv2d(channels, 3, 3)).eval()
    module = traced(model, x)
    for form in (lambda chain, _: chain.folded, merged):
        torch.testing.assert_close(rewritten(module, x, form)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_shufflenet_without_activations_is_one_chain():
    shuffle = VIEWS["channel shuffle"][0]

    def forward(m, x):
        for branch in (m.first, m.second):
            kept, changed = x.chunk(2, dim=1)
            x = shuffle(torch.cat((kept, branch(changed)), dim=1))
        return x

    def branch():
        layers = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
        return nn.Sequential(*layers)

    model, x = Reads(forward, first=branch(), second=branch()).eval(), torch.randn(2, 8, 6, 4)
    module = traced(model, x)
    (chain,) = find_chains(module)
    assert chain.names == ("first.0", "first.2", "first.3", "second.0", "second.2", "second.3")
    for form in (lambda chain, _: chain.folded, merged):
        result = rewritten(module, x, form)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)
        assert not result.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
    assert len(chain.folded) == 4
    assert len(merge(chain.folded, (6, 4))) == 1
