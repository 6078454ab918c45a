"""Instrumented programs compute what the programs compute, and count what a collector counts."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastentropy as fe
from tests._helpers.counts import plain_counts
from tests._helpers.networks import Reads, Residual

#: A free batch size.
BATCH = {0: torch.export.Dim.AUTO}


def exported(model, *args, shapes=None, **kwargs):
    """Export a model. `shapes` are its dynamic shapes."""
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


class Images(nn.Module):
    """Convolutions with a repeated module, a function, an activation in place and a linear head."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)
        self.relu, self.act, self.head = nn.ReLU(inplace=True), nn.GELU(approximate="tanh"), nn.Linear(4, 6)

    def forward(self, x):
        x = self.relu(self.norm(self.b(self.relu(self.a(x)))))
        return F.silu(self.head(self.act(x.mean((2, 3)) - 0.2)))


class Tokens(nn.Module):
    """A gated MLP on tokens, with outputs that are nested."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(8, 12), nn.Linear(8, 12), nn.SiLU()

    def forward(self, x, scale=None):
        y = self.act(self.gate(x)) * self.up(x)
        return {"y": y if scale is None else y * scale, "all": [x, (y,)]}


def collected(model, *args, **kwargs):
    """Return what a collector counts in one call."""
    with fe.collect(model, mask=None) as collector:
        model(*args, **kwargs)
    return collector.compute()


def assert_same(actual, expected):
    """Assert that statistics have the same sites, in the same order, with the same counts."""
    assert list(actual) == list(expected)
    for name, site in expected.items():
        assert actual[name].activation == site.activation
        assert torch.equal(actual[name].counts, site.counts), name
        assert actual[name].nan == site.nan


@pytest.mark.filterwarnings("ignore:.* calls .* of its activations as functions")
@pytest.mark.parametrize("batch", [4, 1, 7])
def test_counts_are_those_of_a_collector(batch):
    torch.manual_seed(batch)
    model = Images().eval()
    program = exported(model, torch.randn(4, 3, 9, 7), shapes=(BATCH,))
    counting = fe.instrument(program).module()
    x = torch.randn(batch, 3, 9, 7)
    x[0, 0, 0, 0] = torch.nan
    y, counts = counting(x)
    assert torch.equal(y.isnan(), program.module()(x).isnan())
    torch.testing.assert_close(y, program.module()(x), rtol=0, atol=0, equal_nan=True)
    assert_same(fe.statistics_of(counts), collected(model, x))


def test_nested_outputs_and_inputs_by_name():
    model, x, scale = Tokens().eval(), torch.randn(3, 5, 8), torch.randn(3, 5, 12)
    counting = fe.instrument(exported(model, x, scale=scale, shapes={"x": BATCH, "scale": BATCH})).module()
    outputs, counts = counting(x, scale=scale)
    expected = model(x, scale=scale)
    assert outputs.keys() == expected.keys()
    assert torch.equal(outputs["y"], expected["y"])
    assert torch.equal(outputs["all"][1][0], expected["all"][1][0])
    assert counts.keys() == {"act"}
    x = model.gate(x).flatten(0, 1)
    assert torch.equal(
        counts["act"]["silu"], torch.stack([(x < 0).sum(0), (x == 0).sum(0), (x > 0).sum(0), x.isnan().sum(0)], 1)
    )


def test_inputs_with_the_names_of_builtins_and_of_weights():
    class Model(nn.Module):
        def forward(self, max, p_hidden, b_value, c_1):
            return torch.relu(max), F.leaky_relu(p_hidden), F.silu(b_value), F.gelu(c_1)

    inputs = [torch.randn(2, size) for size in (3, 4, 5, 6)]
    with pytest.warns(UserWarning, match="channel_axis"):
        program = fe.instrument(exported(Model(), *inputs))
    _, counts = program.module()(*inputs)
    for name, x in zip(("relu", "leaky_relu", "silu", "gelu"), inputs, strict=True):
        assert torch.equal(fe.statistics_of(counts)[name].counts, plain_counts(x, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = nn.Sequential(nn.Linear(6, 1100), nn.ReLU()).to(dtype).eval()
    x = torch.randn(1030, 6, dtype=dtype)
    _, counts = fe.instrument(exported(model, x)).module()(x)
    assert_same(fe.statistics_of(counts), collected(model, x))


def test_axis_that_is_squeezed_away():
    model = Reads(lambda m, x: torch.relu(m.a(x).squeeze(-1)), a=nn.Linear(4, 1)).eval()
    x = torch.randn(9, 4)
    _, counts = fe.instrument(exported(model, x)).module()(x)
    (each,) = counts["relu"].values()
    assert each.tolist() == [[*((model.a(x) < 0).sum().item(), 0, (model.a(x) > 0).sum().item()), 0]]


def test_neuron_axis_of_the_user_and_of_nobody():
    model = Reads(lambda m, x: torch.relu(x * 2), a=nn.Linear(1, 1)).eval()
    program = exported(model, torch.randn(3, 5))
    with pytest.warns(UserWarning, match="channel_axis"):
        _, counts = fe.instrument(program).module()(torch.randn(3, 5))
    assert counts["relu"]["relu"].shape == (5, 4)
    _, counts = fe.instrument(program, channel_axis={"relu": 0}).module()(torch.randn(3, 5))
    assert counts["relu"]["relu"].shape == (3, 4)


@pytest.mark.filterwarnings("ignore:.* calls .* of its activations as functions")
def test_excluded_sites_are_not_counted():
    x = torch.randn(2, 3, 9, 7)
    _, counts = fe.instrument(exported(Images().eval(), x), exclude=["relu*", "silu"]).module()(x)
    assert counts.keys() == {"act"}


@pytest.mark.parametrize("train", [False, True])
def test_program_is_left_as_it_was(train):
    model, x = Images().train(train), torch.randn(4, 3, 9, 7)
    program = exported(model, x)
    graph, weights = str(program.graph), {name: value.clone() for name, value in program.state_dict.items()}
    given = program.example_inputs[0][0].clone()
    counting = fe.instrument(program)
    assert str(program.graph) == graph
    assert torch.equal(program.example_inputs[0][0], given)
    for name, value in program.state_dict.items():
        assert torch.equal(value, weights[name]), name
        assert value.data_ptr() == counting.state_dict[name].data_ptr()
    counting.module()(x)
    assert torch.equal(program.state_dict["norm.num_batches_tracked"], weights["norm.num_batches_tracked"] + train)


def test_constants_to_which_the_program_writes_are_left_as_they_were():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.calls = nn.Linear(3, 5), torch.zeros(5)

        def forward(self, x):
            self.calls.add_(1)
            return F.relu(self.a(x)) + self.calls

    model = Counting()
    program = exported(model, torch.randn(2, 3))
    before = model.calls.clone()
    fe.instrument(program)
    assert torch.equal(model.calls, before)


def test_activation_written_as_a_formula():
    activations = pytest.importorskip("transformers.activations")
    model = nn.Sequential(nn.Linear(4, 6), activations.NewGELUActivation(), nn.Linear(6, 5), activations.QuickGELUActivation())
    x = torch.randn(8, 4)
    _, counts = fe.instrument(exported(model.eval(), x)).module()(x)
    assert_same(fe.statistics_of(counts), collected(model, x))


def test_saved_program(tmp_path):
    model, x = Residual().eval(), torch.randn(4, 1, 5, 5)
    torch.export.save(fe.instrument(exported(model, x)), tmp_path / "model.pt2")
    y, counts = torch.export.load(tmp_path / "model.pt2").module()(x)
    assert torch.equal(y, exported(model, x).module()(x))
    assert_same(fe.statistics_of(counts), collected(model, x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_compiled_package(tmp_path):
    model, x = Tokens().eval(), torch.randn(3, 5, 8)
    program = fe.instrument(exported(model, x))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    outputs, counts = torch._inductor.aoti_load_package(path)(x)
    torch.testing.assert_close(outputs["y"], model(x)["y"])
    assert_same(fe.statistics_of(counts), collected(model, x))


def test_activations_in_branches_are_named():
    def forward(m, x):
        return m.b(m.relu(m.a(torch.cond(x.sum() > 0, lambda x: F.gelu(x), lambda x: x * 2, (x,)))))

    model = Reads(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), relu=nn.ReLU()).eval()
    with pytest.warns(UserWarning, match=r"^not counted, because they are in programs within .*: gelu$"):
        program = fe.instrument(exported(model, torch.randn(3, 4)))
    assert program.module()(torch.randn(3, 4))[1].keys() == {"relu"}


class Scaled(nn.ReLU):
    """An activation with two tensors as its inputs."""

    def forward(self, x, scale):
        return super().forward(scale * x)


def test_activation_whose_input_is_not_known():
    model = Reads(lambda m, x, scale: m.b(m.act(x, scale)), act=Scaled(), b=nn.Sequential(nn.Linear(3, 3), nn.ReLU())).eval()
    program = exported(model, torch.randn(4, 3), torch.ones(4, 1))
    with pytest.raises(ValueError, match=r"^site 'act' reads several tensors, .*; leave it out with exclude=\['act'\]$"):
        fe.instrument(program)
    assert fe.instrument(program, exclude=["act"]).module()(torch.randn(4, 3), torch.ones(4, 1))[1].keys() == {"b.1"}


def test_programs_that_cannot_be_instrumented():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.randn(2, 4)
    with pytest.raises(
        TypeError, match=r"^program: got .*Sequential.*, expected an exported program; pass torch\.export\.export"
    ):
        fe.instrument(model)
    program = torch.export.export(model, (x,))
    with pytest.raises(ValueError, match=r"^the program was decomposed, so that activations may be taken apart"):
        fe.instrument(program.run_decompositions())
    with pytest.raises(ValueError, match=r"^the program calls no known activation"):
        fe.instrument(torch.export.export(nn.Linear(4, 3), (x,)))
    with pytest.raises(ValueError, match=r"^channel_axis of site '1' is 5, but its input has shape \[2, 3\]$"):
        fe.instrument(program, channel_axis={"1": 5})
    program.example_inputs = None
    with pytest.raises(ValueError, match=r"^the program has no example inputs; "):
        fe.instrument(program)


@pytest.mark.parametrize(
    "counts",
    [None, {}, torch.zeros(2, 4), {"a": torch.zeros(2, 4)}, {"a": {"relu": torch.zeros(2, 4)}}, {"a": {"relu": [1]}}],
)
def test_what_is_no_counts(counts):
    with pytest.raises(TypeError, match=r"^counts.*: got .*, expected "):
        fe.statistics_of(counts)
