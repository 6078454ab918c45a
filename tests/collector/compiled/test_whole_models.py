"""Models that torch.compile has compiled as a whole: they are counted inside of their graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters as dynamo_counters

import fastentropy as fe
from tests._helpers.compiling import Blocks, NotingBackend, assert_same, batches, eagerly
from tests._helpers.counts import plain_counts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::UserWarning"),
]  # the first compilation of a process imports for seconds


@pytest.mark.parametrize("attached_to", ["the compiled model", "the model inside", "module.compile()"])
def test_counts_as_in_eager_mode(attached_to):
    model, backend, (warm, *inputs) = Blocks().eval(), NotingBackend(), batches(4, 4, 4, 4)
    expected = eagerly(model, *inputs)
    if attached_to == "module.compile()":
        model.compile(backend=backend, fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        outputs = [compiled(x) for x in (warm, *inputs)][1:]
        assert backend.compilations() == 1
        with fe.collect(model if attached_to == "the model inside" else compiled) as collector:
            for x, y in zip(inputs, outputs, strict=True):
                assert torch.equal(compiled(x), y)
        assert backend.compilations() == 1
    assert_same(collector.compute(), expected)


def test_compilations_and_graph_breaks():
    model, backend, inputs = Blocks().eval(), NotingBackend(), batches(4, 4, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        compiled(inputs[0])
        assert backend.compilations() == 1
        for attached_to, expected in [(compiled, 1), (model, 0), (compiled, 0)]:
            with fe.collect(attached_to) as collector:
                for x in inputs:
                    compiled(x)
            compiled(inputs[0])
            assert backend.compilations() == expected
            assert_same(collector.compute(), eagerly(model, *inputs))
    assert not dynamo_counters["graph_break"]


def test_other_batch_sizes():
    model, backend, inputs = Blocks().eval(), NotingBackend(), batches(4, 4, 7, 3, 2)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for x in inputs[1:]:
            compiled(x)
        plain = backend.compilations()
        with fe.collect(compiled) as collector:
            for x in inputs:
                compiled(x)
        assert backend.compilations() <= plain == 2
    assert_same(collector.compute(), eagerly(model, *inputs))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "eager"])
def test_backends_of_pytorch(backend):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(inplace=True), nn.Conv2d(6, 4, 3), nn.SiLU()).eval()
    inputs = [torch.randn(2, 3, 9, 12) for _ in range(3)]
    inputs[1][0, 0] = float("nan")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), fe.collect(compiled) as collector:
        outputs = [compiled(x) for x in inputs]
    with torch.no_grad():
        for x, y in zip(inputs[1:], outputs[1:], strict=True):
            assert torch.equal(compiled(x).nan_to_num(), y.nan_to_num())
    statistics, expected = collector.compute(), eagerly(model, *inputs)
    assert list(statistics) == list(expected)
    for name, site in expected.items():
        # What Inductor computes in front of an activation may round to the other side of 0.
        assert (statistics[name].counts - site.counts).abs().sum() <= (2 if backend == "inductor" else 0)
        assert statistics[name].nan == site.nan > 0


@pytest.mark.parametrize("activation", [nn.GELU, nn.PReLU, nn.Mish, nn.Softplus, nn.LeakyReLU, nn.Hardswish, nn.ELU])
def test_activations(activation):
    model, inputs = Blocks(activation, blocks=1).eval(), batches(3, 3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), fe.collect(compiled) as collector:
        for x in inputs:
            compiled(x)
    assert_same(collector.compute(), eagerly(model, *inputs))


class Reads(nn.Module):
    """A network that returns the input of its activation too."""

    def forward(self, x):
        x = x * 2
        return F.relu(x), x


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        *[((7,), 0), ((0, 3), 1), ((1037, 5), 1), ((3, 1025, 6), -1), ((2, 6, 3, 4, 7), 1)],
        *[((2, 6, *image), 1) for image in [(37, 5), (5, 17), (7, 7), (8, 4), (24, 41), (37, 41), (0, 32)]],
    ],
)
def test_every_position_is_counted(backend, dtype, shape, axis):
    model, x = Reads(), torch.randn(shape).to(dtype)
    x.view(-1)[::3] = 0
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad(), fe.collect(compiled, channel_axis={"relu": axis}) as collector:
        if x.numel():
            collector.update(torch.ones_like(x))
            collector.reset()
        else:
            collector.update(torch.ones(1, *x.shape[1:], dtype=dtype))
            collector.reset()
        y, read = collector.update(x)
    assert torch.equal(y, read.relu())
    if x.numel():
        site = collector.compute()["relu"]
        assert torch.equal(site.counts, plain_counts(read.unsqueeze(-1), axis % read.ndim))
        assert site.nan == 0


def test_left_out_sites_and_other_axes_of_later_collectors():
    model, backend, inputs = Blocks().eval(), NotingBackend(), batches(4, 4, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for options in ({}, {"exclude": ["layers.*"]}, {"channel_axis": {"end": 1}}, {}):
        with torch.no_grad(), fe.collect(compiled, **options) as collector:
            for x in inputs:
                compiled(x)
        assert_same(collector.compute(), eagerly(model, *inputs, **options))
    assert backend.compilations() == 3


def test_paused_passes():
    model, backend, inputs = Blocks().eval(), NotingBackend(), batches(4, 4, 4)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), fe.collect(compiled) as collector:
        compiled(inputs[0])
        with collector.paused():
            compiled(inputs[1])
            compiled(inputs[2])
        assert backend.compilations() == 1
        assert backend.compilations() == 0
        compiled(inputs[2])
    assert_same(collector.compute(), eagerly(model, inputs[0], inputs[2]))


def test_batch_averages():
    model, inputs = Blocks().eval(), batches(4, 4, 4)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), fe.collect(compiled, average="batch") as collector:
        for x in inputs:
            compiled(x)
    expected = eagerly(model, *inputs, average="batch")
    assert collector.compute().layer_entropy() == expected.layer_entropy()


class WithRowSums(nn.Module):
    """A sum over rows beside the activation, with which Inductor may join the sums over columns."""

    def forward(self, x):
        x = x * 2
        return F.relu(x), x.sum(-1), x


@pytest.mark.parametrize("shape", [(40961, 129), (2**24 + 37, 1), (3, 2**22 + 5, 2)])
def test_long_sums_are_exact(shape):
    model, x = WithRowSums(), torch.randn(1, 1).expand(shape).clone()
    x[-3:] = 0
    x[0] = float("nan")
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.no_grad(), fe.collect(compiled, channel_axis={"relu": len(shape) - 1}) as collector:
        collector.update(torch.ones(1, *shape[1:]))
        collector.reset()
        read = collector.update(x)[2]
    site = collector.compute()["relu"]
    assert torch.equal(site.counts, plain_counts(read, len(shape) - 1))
    assert site.nan == shape[-1] * (shape[1] if len(shape) == 3 else 1)
