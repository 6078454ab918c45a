"""Explicit padding, cropping and strided slices are merged like the padding and the stride of a convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastentropy as fe
from fastentropy.fusion.chains.elements import operators
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, prepared_module
from tests._helpers.networks import Reads
from tests._helpers.operators import SEEDS, close, normal
from tests._helpers.reading import read_node

MARGINS = st.integers(-2, 3)


def read(function, x):
    """Read the last operator of a function of x, and the one before it as long as there is one."""
    module = torch.export.export(Reads(lambda m, x: function(x)), (x,)).module(check_guards=False)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return [read_node(node, module) for node in nodes]


@settings(max_examples=30)
@given(st.integers(1, 3), st.data())
def test_padding_and_cropping_are_read(axes, data):
    x = normal(2, 3, *(data.draw(st.integers(4, 7)) for _ in range(axes)), seed=data.draw(SEEDS))
    numbers = [data.draw(MARGINS) for _ in range(2 * data.draw(st.integers(1, axes)))]
    assume(any(numbers))
    assume(all(n + a + b > 0 for n, a, b in zip(reversed(x.shape), numbers[::2], numbers[1::2], strict=False)))
    (affine,) = read(lambda x: F.pad(x, numbers), x)
    assert (affine.axes, affine.name) == (axes, "")
    operator = affine.build(axes)
    close(operator(x), F.pad(x, numbers))
    close(operator.as_convolution()(x), F.pad(x, numbers))


@settings(max_examples=30)
@given(st.data())
def test_slices_of_positions_are_read(data):
    x = normal(2, 3, 7, 6, seed=data.draw(SEEDS))
    start, stop = (data.draw(st.one_of(st.none(), st.integers(-9, 9))) for _ in range(2))
    step = data.draw(st.integers(1, 3))
    expected = x[:, :, start:stop:step]
    assume(0 < expected.numel() < x.numel())
    *_, affine = [affine for affine in read(lambda x: x[:, :, start:stop:step], x) if affine]
    operator = affine.build(2)
    close(operator(x), expected)
    close(operator.as_convolution()(x), expected)


@pytest.mark.parametrize("function", [nn.ZeroPad2d(0), lambda x: F.pad(x, (0, 0)), nn.ReflectionPad2d(0)])
def test_padding_of_nothing_is_an_identity(function):
    (affine,) = read(function, normal(2, 3, 4, 5, seed=0))
    assert affine.build is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (1, 1), value=1.0),
        lambda x: F.pad(x, (1, 1, 0, 0), "reflect"),
        lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
        lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
        lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0)),
        lambda x: x[1:],
        lambda x: x[:, :, 2:2],
    ],
)
def test_other_padding_and_slices_are_not_read(function):
    assert not any(affine and affine.build for affine in read(function, normal(2, 3, 4, 5, seed=0)))


def pad(*numbers):
    return nn.ConstantPad2d(numbers, 0.0)


class Slice(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.rows, self.columns = slice(*rows), slice(*columns)

    def forward(self, x):
        return x[:, :, self.rows, self.columns]


@st.composite
def networks(draw):
    """Draw a chain of convolutions and batch norms with explicit padding, cropping and slices, and the names of its layers."""
    torch.manual_seed(draw(SEEDS))
    channels, layers, names = 4, [], []
    for _ in range(draw(st.integers(2, 3))):
        between = draw(st.sampled_from(["pad", "pad", "crop", "mixed", "slice", "stride", "nothing"]))
        if between in ("pad", "crop", "mixed"):
            low, high = {"pad": (0, 2), "crop": (-1, 0), "mixed": (-1, 2)}[between]
            layers.append(pad(*(draw(st.integers(low, high)) for _ in range(4))))
        elif between == "slice":
            layers.append(Slice((draw(st.integers(0, 1)), -1), (None, -1)))
        elif between == "stride":
            layers.append(Slice((draw(st.integers(0, 1)), None, 2), (None, None, draw(st.integers(1, 2)))))
        kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, channels]))
        out = groups * draw(st.integers(1, 3))
        names.append(str(len(layers)))
        layers.append(nn.Conv2d(channels, out, kernel, draw(st.integers(1, 2)), draw(st.integers(0, 1)), groups=groups))
        if draw(st.booleans()):
            layers.append(nn.BatchNorm2d(out))
            nn.init.normal_(layers[-1].bias)
        channels = out
    return nn.Sequential(*layers).eval(), tuple(names)


@pytest.mark.slow
@settings(max_examples=15)
@given(networks(), st.integers(7, 12), st.integers(7, 12))
def test_drawn_networks_are_one_chain(drawn, height, width):
    model, names = drawn
    x = torch.randn(2, 4, height, width)
    try:
        model(x)
    except RuntimeError:  # nothing is left of the image
        assume(False)
    fused = fe.fuse(model, (x,), measure=False)
    assert [chain.names for chain in fused.report.chains] in ([names], [])
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 4, height, width)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)


def folded(*layers, size=9):
    """Return the operators of the chain of some layers after the folding; it must be one chain."""
    model = nn.Sequential(*layers).double().eval()
    x = normal(2, 4, size, size, seed=0)
    (chain,) = find_chains(prepared_module(export(model, Inputs((x,)))))
    y = x
    for operator in operators(chain.folded):
        y = operator(y)
    close(y, model(x))
    return operators(chain.folded)


@pytest.mark.parametrize(
    ("layers", "paddings"),
    [
        ((pad(1, 1, 1, 1), nn.Conv2d(4, 4, 3)), [((1, 1), (1, 1))]),
        ((pad(0, 1, 0, 1), nn.Conv2d(4, 4, 3, 2)), [((0, 1), (0, 1))]),
        ((pad(0, 1, 2, 0), nn.Conv2d(4, 4, 3, padding=1)), [((3, 1), (1, 2))]),
        ((pad(1, 1, 1, 1), pad(1, 0, 0, 0), nn.Conv2d(4, 4, 3)), [((1, 1), (2, 1))]),
        ((nn.Conv2d(4, 4, 3, padding=1), pad(-1, -1, 0, 0)), [((1, 1), (0, 0))]),
        ((nn.Conv2d(4, 4, 3, 2, padding=1), Slice((1, None), (None,))), [((-1, 1), (1, 1))]),
        ((pad(-1, 0, 0, 0), nn.Conv2d(4, 4, 3)), [((0, 0), (-1, 0))]),
        ((nn.BatchNorm2d(4), pad(-1, 0, 0, 0), nn.Conv2d(4, 4, 3)), [((0, 0), (-1, 0))]),
    ],
)
def test_padding_is_folded_into_a_convolution(layers, paddings):
    assert [operator.padding for operator in folded(*layers)] == paddings


@pytest.mark.parametrize(
    ("layers", "count"),
    [
        ((nn.Conv2d(4, 4, 3), pad(1, 1, 1, 1)), 2),  # zeros, not the bias
        ((pad(-1, 0, 0, 0), nn.Conv2d(4, 4, 3, padding=1)), 2),  # the padding is behind the cropping
        ((pad(1, 1, 1, 1), nn.ConvTranspose2d(4, 4, 3, 2)), 2),
        ((nn.Conv2d(4, 4, 3), Slice((None, None, 2), (None,)), nn.Conv2d(4, 4, 3)), 2),
        ((Slice((None, None, 2), (None, None, 2)), nn.Conv2d(4, 4, 1)), 1),
        ((nn.BatchNorm2d(4), pad(1, 1, 1, 1), nn.Conv2d(4, 4, 3)), 2),
    ],
)
def test_padding_is_folded_only_where_that_is_exact(layers, count):
    assert len(folded(*layers)) == count


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_sizes", [False, True])
def test_padding_before_a_depthwise_convolution(dynamic_sizes):
    """As in transformers' MobileNetV2: padded by the model, in the middle of an inverted residual block."""
    model = nn.Sequential(
        nn.Conv2d(4, 24, 1), nn.BatchNorm2d(24), pad(1, 1, 1, 1), nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 4, 1)
    ).eval()
    fused = fe.fuse(model, (torch.randn(2, 4, 9, 7),), measure=False, dynamic_sizes=dynamic_sizes)
    assert [(chain.names, chain.choice) for chain in fused.report.chains] == [(("0", "3", "4"), "merge")]
    for size in [(9, 7)] + dynamic_sizes * [(5, 12)]:
        x = torch.randn(3, 4, *size)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_cropped_residual():
    model = Reads(lambda m, x: x[:, :, 1:-1, 1:-1] + m.b(m.a(x)), a=nn.Conv2d(4, 16, 3), b=nn.Conv2d(16, 4, 1)).eval()
    fused = fe.fuse(model, (torch.randn(2, 4, 9, 7),), measure=False)
    assert [(chain.names, chain.choice) for chain in fused.report.chains] == [(("a", "b"), "merge")]
    x = torch.randn(3, 4, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_causal_convolutions():
    """Convolutions over time that are padded on both sides, and cut off at the end, as in temporal convolutional networks."""
    layers = {"a": nn.Conv1d(4, 16, 3, padding=2), "b": nn.Conv1d(16, 4, 1), "c": nn.Conv1d(4, 4, 3, padding=4, dilation=2)}
    model = Reads(lambda m, x: m.c(m.b(m.a(x)[:, :, :-2].contiguous()))[:, :, :-4], **layers).eval()
    fused = fe.fuse(model, (torch.randn(2, 4, 11),), measure=False)
    assert [chain.names for chain in fused.report.chains] == [("a", "b", "c")]
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 4, 11)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_an_input_that_is_overwritten_through_a_slice_is_overwritten():
    layers = {"a": nn.Conv2d(4, 16, 1), "b": nn.Conv2d(16, 4, 1)}
    model = Reads(lambda m, x: m.b(m.a(x[:, :, 1:, 1:].mul_(2))), **layers).eval()
    fused = fe.fuse(model, (torch.randn(2, 4, 5, 7),), measure=False)
    x = torch.randn(3, 4, 5, 7)
    given, copied = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(fused(given), model(copied), rtol=1e-4, atol=1e-5)
    assert torch.equal(given, copied)
    assert not torch.equal(given, x)
