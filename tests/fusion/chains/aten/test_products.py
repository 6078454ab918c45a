"""Products with a constant matrix are linear layers or pointwise convolutions, however they are written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastentropy as fe
from tests._helpers.networks import Reads
from tests._helpers.operators import SEEDS, close, normal
from tests._helpers.reading import read_output


@pytest.mark.parametrize(
    ("function", "shape", "axes"),
    [
        (lambda m, x: m.w @ x, (2, 4, 7), 1),
        (lambda m, x: torch.matmul(m.w[None], x), (2, 4, 7), 1),
        (lambda m, x: torch.bmm(m.w.expand(x.shape[0], -1, -1), x), (2, 4, 7), 1),
        (lambda m, x: torch.bmm(x, m.w.t().expand(x.shape[0], -1, -1)), (2, 7, 4), 0),
        (lambda m, x: x @ m.w.t()[None], (2, 7, 4), 0),
        (lambda m, x: x @ m.w.t()[None, None], (2, 3, 7, 4), 0),
        (lambda m, x: torch.einsum("bc,oc->bo", x, m.w), (2, 4), 0),
        (lambda m, x: torch.einsum("btc,oc->bto", x, m.w), (2, 7, 4), 0),
        (lambda m, x: torch.einsum("oc,btc->bto", m.w, x), (2, 7, 4), 0),
        (lambda m, x: torch.einsum("btc, co -> bto", x, m.w.t()), (2, 7, 4), 0),
        (lambda m, x: torch.einsum("...c,oc->...o", x, m.w), (2, 3, 7, 4), 0),
        (lambda m, x: torch.einsum("bct,oc->bot", x, m.w), (2, 4, 7), 1),
        (lambda m, x: torch.einsum("bchw,oc->bohw", x, m.w), (2, 4, 3, 5), 2),
        (lambda m, x: torch.einsum("oc,bc...->bo...", m.w, x), (2, 4, 3, 5), 2),
        (lambda m, x: torch.einsum("BCXYZ,OC->BOXYZ", x, m.w), (2, 4, 3, 5, 2), 3),
    ],
)
def test_products_are_read(function, shape, axes):
    x = normal(*shape, seed=0)
    (affine,), expected = read_output(function, x, w=normal(6, 4, seed=1))
    assert (affine.axes, affine.name) == (axes, "w")
    close(affine.build(axes)(x), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.w @ x,
        lambda m, x: torch.einsum("bhct,oc->bhot", x, m.w),
        lambda m, x: torch.einsum("bchw,oc->bhwo", x, m.w),
        lambda m, x: torch.einsum("bchw,oc->bhw", x, m.w),
        lambda m, x: torch.einsum("bchw,bohw->bco", x, x),
        lambda m, x: torch.einsum("bchw,cc->bchw", x, m.w[:, :4].new_ones(4, 4)),
        lambda m, x: torch.einsum("bchw,o->bchwo", x, m.w[0]),
        lambda m, x: torch.matmul(x, torch.stack([m.w.t()] * 4)),
    ],
)
def test_other_products_are_not_read(function):
    assert read_output(function, normal(3, 4, 4, 4, seed=0), w=normal(6, 4, seed=1))[0] == ()


@st.composite
def networks(draw):
    """Draw a chain of three layers on tokens or on channels, each a product that is written in one of many ways."""
    torch.manual_seed(draw(SEEDS))
    tokens = {
        "linear": lambda m, x: m(x),
        "matmul": lambda m, x: x @ m.weight.t(),
        "bmm": lambda m, x: torch.bmm(x, m.weight.t().expand(x.shape[0], -1, -1)),
        "einsum": lambda m, x: torch.einsum("...c,oc->...o", x, m.weight) + m.bias,
    }
    channels = {
        "convolution": lambda m, x: nn.functional.conv1d(x, m.weight[..., None], m.bias),
        "matmul": lambda m, x: m.weight @ x,
        "bmm": lambda m, x: torch.bmm(m.weight.expand(x.shape[0], -1, -1), x) + m.bias[:, None],
        "einsum": lambda m, x: torch.einsum("oc,bct->bot", m.weight, x),
    }
    kinds = tokens if draw(st.booleans()) else channels
    sizes = [draw(st.sampled_from([1, 3, 5, 16])) for _ in range(4)]
    calls = [kinds[draw(st.sampled_from(list(kinds)))] for _ in range(3)]
    layers = {f"l{index}": nn.Linear(*sizes[index : index + 2]) for index in range(3)}

    def forward(model, x):
        for index, call in enumerate(calls):
            x = call(getattr(model, f"l{index}"), x)
        return x

    length = draw(st.sampled_from([1, 2, 7]))
    return Reads(forward, **layers).eval(), (length, sizes[0]) if kinds is tokens else (sizes[0], length)


@pytest.mark.slow
@settings(max_examples=12)
@given(networks())
def test_drawn_networks_are_one_chain(drawn):
    model, shape = drawn
    fused = fe.fuse(model, (torch.randn(2, *shape),), measure=False)
    assert [chain.names for chain in fused.report.chains] == [("l0", "l1", "l2")]
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
