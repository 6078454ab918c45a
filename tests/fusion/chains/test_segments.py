"""A chain goes on through views that keep its channels on one axis, exactly and for every batch size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.linear_networks import IMAGES, ROWS, conv2d, image_network
from tests._helpers.networks import Reads
from tests.fusion.chains.test_finding import assert_computes, traced

CLIPS = torch.randn(2, 3, 4, 6, 6)


def network(forward, **modules):
    """Return a network with a convolution `a`, a layer `l` from 4 to 5 features, and a layer `k` back to 4 features."""
    return Reads(forward, **{"a": conv2d(), "b": conv2d(), "l": nn.Linear(4, 5), "k": nn.Linear(5, 4)} | modules)


#: For each description, a forward function, an input, the names of the only chain, and the permutation behind it or None.
CHAINS = {
    "squeeze behind pooling": (
        lambda m, x: m.l(F.adaptive_avg_pool2d(m.a(x), 1).squeeze(-1).squeeze(-1)),
        IMAGES,
        ("a", "l"),
        None,
    ),
    "the first position behind pooling": (
        lambda m, x: m.l(F.adaptive_avg_pool2d(m.a(x), 1)[:, :, 0, 0]),
        IMAGES,
        ("a", "l"),
        None,
    ),
    "the mean of the positions": (lambda m, x: m.k(m.l(m.a(x).mean((2, 3)))), IMAGES, ("a", "l", "k"), None),
    "the mean in another order": (lambda m, x: m.b(m.a(x).mean((-1, -2), keepdim=True)), IMAGES, ("a", "b"), None),
    "the mean before a layer": (lambda m, x: m.k(m.l(x.mean((3, 2)))), IMAGES, ("l", "k"), None),
    "the mean of one position": (lambda m, x: m.l(1 - F.adaptive_avg_pool2d(m.a(x), 1).mean((2, 3))), IMAGES, ("a", "l"), None),
    "one mean after the other": (lambda m, x: m.l(m.a(x).mean(3).mean(2)), IMAGES, ("a", "l"), None),
    "the mean of a row": (lambda m, x: m.b(m.a(x).mean(2, keepdim=True)), IMAGES, ("a", "b"), None),
    "the mean of tokens": (lambda m, x: m.l(m.a(x).flatten(2).transpose(1, 2).mean(1)), IMAGES, ("a", "l"), None),
    "the mean of channels-last images": (lambda m, x: m.l(m.a(x).movedim(1, -1)).mean((1, 2)), IMAGES, ("a", "l"), None),
    "a sum that is divided": (lambda m, x: m.l(m.a(x).sum((2, 3)) / 36), IMAGES, ("a", "l"), None),
    "a sum of rows": (
        lambda m, x: m.l(m.a(x).sum(-1, keepdim=True).squeeze(-1).transpose(1, 2)),
        IMAGES,
        ("a", "l"),
        (0, 2, 1),
    ),
    "squeeze and excite without its gate": (
        lambda m, x: m.k(m.l(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1))).view(-1, 4, 1, 1),
        IMAGES,
        ("a", "l", "k"),
        None,
    ),
    "tokens": (lambda m, x: m.l(m.a(x).flatten(2).transpose(1, 2)), IMAGES, ("a", "l"), (0, 2, 3, 1)),
    "tokens of patches": (
        lambda m, x: m.k(m.l(m.p(x).flatten(2).transpose(1, 2))),
        IMAGES,
        ("p", "l", "k"),
        (0, 2, 3, 1),
    ),
    "tokens and back": (
        lambda m, x: m.b(m.k(m.l(m.a(x).flatten(2).transpose(1, 2))).transpose(1, 2).view(x.shape)),
        IMAGES,
        ("a", "l", "k", "b"),
        None,
    ),
    "channels last and back": (
        lambda m, x: m.b(m.k(m.l(m.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
        IMAGES,
        ("a", "l", "k", "b"),
        None,
    ),
    "a residual of channels last": (
        lambda m, x: x + m.k(m.l(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
        IMAGES,
        ("l", "k"),
        None,
    ),
    "a residual among tokens": (
        lambda m, x: m.l(m.a(x).movedim(1, -1) - m.b(x).movedim(1, -1)).movedim(-1, 1),
        IMAGES,
        ("a", "b", "l"),
        None,
    ),
    "images of channels last": (
        lambda m, x: m.b(m.a(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1),
        IMAGES.permute(0, 2, 3, 1).contiguous(),
        ("a", "b"),
        None,
    ),
    "an unflattened image": (
        lambda m, x: m.b(m.a(x).flatten(2).mul(2).unflatten(2, (6, 6))),
        IMAGES,
        ("a", "b"),
        None,
    ),
    "no-op views": (
        lambda m, x: m.b(m.a(x).unsqueeze(0).squeeze(0).expand(-1, -1, -1, -1).transpose(2, 3).transpose(3, 2)),
        IMAGES,
        ("a", "b"),
        None,
    ),
    "a view as itself": (lambda m, x: m.b(m.a(x).view(x.shape[0], 4, 6, 6)), IMAGES, ("a", "b"), None),
    "reshaped as the input": (
        lambda m, x: m.b(m.a(x).flatten(1).reshape_as(x)) + m.a(x),
        IMAGES,
        ("a", "b", "a"),
        None,
    ),
    "frames of clips": (
        lambda m, x: m.b(m.a(x.flatten(0, 1)).unflatten(0, (-1, 3)).flatten(0, 1)).unflatten(0, (-1, 3)),
        CLIPS,
        ("a", "b"),
        None,
    ),
    "heads that are joined again": (
        lambda m, x: m.k(m.l(x).unflatten(-1, (5, 1)).transpose(1, 2).transpose(1, 2).flatten(2)),
        ROWS,
        ("l", "k"),
        None,
    ),
    "windows that are joined again": (
        lambda m, x: m.k(m.l(x).view(-1, 2, 3, 2, 3, 5).transpose(2, 3).transpose(2, 3).reshape(x.shape[0], 6, 6, 5)),
        IMAGES.permute(0, 2, 3, 1).contiguous(),
        ("l", "k"),
        None,
    ),
    "layers of windows": (
        lambda m, x: m.k(m.l(x).view(x.shape[0], 2, 3, 2, 3, 5).transpose(2, 3)),
        IMAGES.permute(0, 2, 3, 1).contiguous(),
        ("l", "k"),
        (0, 1, 3, 2, 4, 5),
    ),
    "time before the batch": (lambda m, x: m.k(m.l(x).transpose(0, 1)), ROWS, ("l", "k"), (1, 0, 2)),
    "a layer of tokens and a batch norm": (
        lambda m, x: m.k(m.n(m.l(x).transpose(1, 2)).transpose(1, 2)),
        ROWS,
        ("l", "k"),
        None,
    ),
    "a layer across the tokens": (lambda m, x: m.u(m.t(x.transpose(1, 2))).transpose(1, 2) + x, ROWS, ("t", "u"), None),
    "flattened in another order": (lambda m, x: m.f(m.a(x).permute(0, 3, 1, 2).flatten(1)), IMAGES, ("a", "f"), None),
    "flattened in part": (lambda m, x: m.c(m.a(x).permute(0, 2, 1, 3).flatten(1, 2).mT), IMAGES, ("a", "c"), (0, 2, 1)),
    "a single channel": (lambda m, x: m.s(m.o(x).flatten(2).transpose(1, 2)), IMAGES, ("o", "s"), (0, 2, 3, 1)),
}


def model_of(name):
    model = network(
        CHAINS[name][0],
        p=nn.Conv2d(4, 4, 3, 3),
        n=nn.BatchNorm1d(5),
        t=nn.Linear(3, 7),
        u=nn.Linear(7, 3),
        f=nn.Linear(144, 3),
        c=nn.Linear(24, 3),
        o=nn.Conv2d(4, 1, 3),
        s=nn.Linear(1, 3),
    ).eval()
    model.n.running_mean.normal_()
    model.n.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_goes_on_through_a_view(name):
    _, x, expected, order = CHAINS[name]
    model = model_of(name)
    module = inference_module(export(model, Inputs((x,))))
    chains = [chain for chain in find_chains(module) if len(chain.names) > 1]
    assert [(chain.names, chain.view and chain.view.order) for chain in chains] == [(expected, order)]
    for batch in (1, 2, 5):
        assert_computes(module, torch.randn(batch, *x.shape[1:]))


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.slow
def test_a_model_with_views_is_fused(name):
    """Every chain becomes a single operator, whose output is the model's at any batch size."""
    _, x, expected, _ = CHAINS[name]
    model = model_of(name)
    fused = fe.fuse(model, (x,), measure=False)
    assert [chain.names for chain in fused.report.chains] == [expected]
    for batch in (1, 2, 5):
        y = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(fused(y), model(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("forward", "x", "expected"),
    [
        (lambda m, x: m.b(m.a(x).transpose(2, 3)), IMAGES, [("a",), ("b",)]),
        (lambda m, x: m.b(m.a(x).transpose(1, 2).contiguous().view(-1, 4, 6, 6)), IMAGES, [("a",), ("b",)]),
        (lambda m, x: m.t(m.a(x).flatten(2)), IMAGES, [("a",), ("t",)]),
        (lambda m, x: m.s(m.a(x).flatten(0, 1).mT), IMAGES, [("a",), ("s",)]),
        (lambda m, x: m.k(m.l(x).transpose(1, 2).reshape(-1, 3, 5)), ROWS, [("l",), ("k",)]),
        (lambda m, x: m.k(m.l(x).mean(1)), ROWS, [("l",), ("k",)]),
        (lambda m, x: m.k(m.l(x).mean(0)), ROWS, [("l",), ("k",)]),
        (lambda m, x: m.k(m.l(x).sum((0, 1))), ROWS, [("l",), ("k",)]),
        (lambda m, x: m.t(m.a(x).flatten(2).mean(1)), IMAGES, [("a",), ("t",)]),
        (
            lambda m, x: m.s(m.a(x).flatten(2).unflatten(2, (18, 2)).mean(2)[:, :, :1].expand(-1, -1, 6)),
            IMAGES,
            [("a",), ("s",)],
        ),
    ],
)
def test_a_view_that_mixes_channels_and_positions_ends_a_chain(forward, x, expected):
    model = network(forward, t=nn.Linear(36, 3), s=nn.Linear(6, 3))
    assert [chain.names for chain in assert_computes(traced(model, x), x)] == expected


def test_layers_of_tokens_alone_stay_layers():
    """An image that is made into tokens first is no reason for convolutions."""
    model = network(lambda m, x: m.k(m.l(x.flatten(2).transpose(1, 2))))
    (chain,) = assert_computes(traced(model, IMAGES), IMAGES)
    assert [operator.axes for operator in chain.elements] == [(), ()]
    assert "transpose" in str(chain.source.target)


def test_a_view_of_an_output_with_other_strides():
    """A permutation behind the chain leaves other strides than the model, which a `view` of the rest must bear."""
    model = network(lambda m, x: m.l(m.a(x).permute(0, 2, 3, 1)).relu().view(x.shape[0], 36, 5))
    fused = fe.fuse(model.eval(), (IMAGES,), measure=False)
    x = torch.randn(3, 4, 6, 6)
    assert [chain.names for chain in fused.report.chains] == [("a", "l")]
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_chains_through_views_with_free_sizes():
    model = image_network(lambda m, x: m.b(m.relu(m.k(m.l(m.a(x).flatten(2).transpose(1, 2)))).mT.view(x.shape)))
    model.l, model.k = nn.Linear(4, 5), nn.Linear(5, 4)
    fused = fe.fuse(model.eval(), (IMAGES,), measure=False, dynamic_sizes=True)
    assert [chain.names for chain in fused.report.chains] == [("a", "l", "k")]
    for shape in ((2, 4, 6, 6), (1, 4, 9, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
