"""Models as graphs: traced for every size that they take, and rewritten without a change of what they compute."""

import copy
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy.fusion.chains.elements import spatial_size
from fastentropy.fusion.chains.finding import find_chains
from fastentropy.fusion.chains.merging import merge
from fastentropy.fusion.chains.passes import fold
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.memory_format import is_channels_last
from fastentropy.fusion.traced_inputs import TracedInputs, fits
from fastentropy.fusion.tracing import (
    CHAIN_PREFIX,
    export,
    in_channels_last,
    inference_module,
    rewrite,
    values_of,
)
from tests._helpers.linear_networks import NETWORKS
from tests._helpers.networks import Reads


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def convolutions(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *between, nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)).eval()


X = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_size_is_free(batch):
    model = convolutions(nn.ReLU())
    program = export(model, Inputs((X[:batch] if batch < 3 else torch.cat([X, X[:1]]),)))
    module = inference_module(program)
    for size in (1, 2, 5):
        x = torch.randn(size, 3, 6, 5)
        close(module(x), model(x))
    ((batch_sizes, *others),) = TracedInputs.of(program).sizes
    assert batch_sizes[1] is None
    assert list(others) == [(3, 4), (6, 7), (5, 6)]


def test_dynamic_sizes():
    model = convolutions(nn.ReLU())
    program = export(model, Inputs((X,)), dynamic_sizes=True)
    module = inference_module(program)
    for shape in [(1, 3, 9, 7), (4, 3, 6, 5)]:
        x = torch.randn(shape)
        assert fits(x, TracedInputs.of(program).sizes[0])
        close(module(x), model(x))
    assert not fits(torch.randn(2, 4, 6, 5), TracedInputs.of(program).sizes[0])


@pytest.mark.parametrize("dynamic_sizes", [False, True])
def test_model_of_one_batch_size(dynamic_sizes):
    model = Reads(lambda m, x: m.a(x.reshape(2, 15)), a=nn.Linear(15, 3)).eval()
    x = torch.randn(2, 3, 5)
    program = export(model, Inputs((x,)), dynamic_sizes)
    close(inference_module(program)(x), model(x))
    ((batch, *_),) = TracedInputs.of(program).sizes
    assert batch == (2, 3)


def test_model_of_single_samples():
    model = Reads(lambda m, x: m.a(x.reshape(15)), a=nn.Linear(15, 3)).eval()
    x = torch.randn(1, 3, 5)
    program = export(model, Inputs((x,)))
    close(inference_module(program)(x), model(x))


def test_untraceable_model_is_named_in_one_line():
    with pytest.raises(ValueError, match=r"^torch.export cannot trace Reads: .*") as caught:
        export(Reads(lambda m, x: x if x.sum() > 0 else -x), Inputs((X,)))
    assert "\n" not in str(caught.value)


def test_example_is_not_overwritten():
    x = X.clone()
    export(Reads(lambda m, x: x.mul_(2)), Inputs((x,)))
    assert torch.equal(x, X)


def test_inference_module_owns_what_the_graph_reads():
    model = Reads(lambda m, x: m.a(x), a=nn.Conv2d(3, 4, 1), unused=nn.Linear(4, 4)).eval()
    module = inference_module(export(model, Inputs((X,))))
    assert sorted(name for name, _ in module.named_buffers()) == ["a.bias", "a.weight"]
    assert not list(module.parameters())
    assert not module(X).requires_grad
    assert torch.equal(attrgetter("a.weight")(module), model.a.weight)


def rewritten(model, x, form=lambda elements, x: elements):
    traced = inference_module(export(model, Inputs((x,))))
    chains = find_chains(traced)
    sources = values_of(traced, [chain.source for chain in chains], Inputs((x,)))
    return rewrite(traced, {chain: form(chain.elements, sources[chain.source]) for chain in chains}, sources), traced


def merged(elements, x):
    try:
        return merge(fold(elements), spatial_size(elements, x))
    except ValueError:
        return fold(elements)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", [lambda elements, x: elements, merged], ids=["kept", "merged"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_rewritten_graph_equals_the_model(name, form):
    model, x, _ = NETWORKS[name]
    result, _ = rewritten(model.eval(), x, form)
    close(result(x), model(x))


@pytest.mark.parametrize("name", ["GPT-2's MLP", "a classifier", "LayerScale", "rows that stay flattened"])
def test_rewritten_graph_at_every_batch_size(name):
    model, x, _ = NETWORKS[name]
    if name == "rows that stay flattened":
        model = copy.deepcopy(model)
        model._function = lambda m, x: m.b(m.a(x.reshape(-1, 4)))
    result, _ = rewritten(model.eval(), x, merged)
    for batch in (1, 2, 5):
        other = torch.randn(batch, *x.shape[1:])
        close(result(other), model(other))


def test_rewriting_leaves_the_given_graph():
    model = convolutions(nn.ReLU())
    traced = inference_module(export(model, Inputs((X,))))
    before, weights = str(traced.graph), {name: value.clone() for name, value in traced.named_buffers()}
    chains = find_chains(traced)
    sources = values_of(traced, [chain.source for chain in chains], Inputs((X,)))
    result = rewrite(traced, {chain: fold(chain.elements) for chain in chains}, sources)
    assert str(traced.graph) == before
    assert all(torch.equal(value, weights[name]) for name, value in traced.named_buffers())
    assert result.graph is not traced.graph
    close(result(X), model(X))


def test_replaced_operators_and_weights_are_gone():
    result, traced = rewritten(convolutions(), X, merged)
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 3
    assert [str(node.target) for node in result.graph.nodes if node.op == "call_function"][:1] == ["aten.conv2d.default"]
    assert not any(name.startswith(("0", "1", "2")) for name, _ in result.named_buffers())


def test_chain_that_begins_where_another_ends():
    """A value that two others read is the end of one chain and the source of two."""
    modules = {name: nn.Conv2d(3, 3, 1) for name in "abcd"}
    model = Reads(lambda m, x: (m.c(y := m.b(m.a(x))), m.d(y).relu(), y), **modules).eval()
    result, _ = rewritten(model, X, merged)
    close(result(X), model(X))


def test_weights_in_the_memory_format_of_the_source():
    model = convolutions()
    x = X.contiguous(memory_format=torch.channels_last)
    result, _ = rewritten(model, x, merged)
    weights = [value for value in result.buffers() if value.ndim == 4]
    assert weights
    assert all(is_channels_last(weight) for weight in weights)
    close(result(x), model(x))


VOLUMES = torch.randn(2, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (convolutions(), X),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ReLU()), X),
        (nn.Sequential(nn.Conv3d(2, 3, 2), nn.ReLU()), VOLUMES),
        (nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(2), nn.Conv1d(3, 3, 1)), VOLUMES),
    ],
)
def test_weights_in_channels_last(model, x):
    traced = inference_module(export(model.eval(), Inputs((x,))))
    result = in_channels_last(traced)
    weights = [value for value in result.buffers() if value.ndim in (4, 5) and max(value.shape[2:]) > 1]
    assert weights
    assert all(map(is_channels_last, weights))
    assert not any(map(is_channels_last, traced.buffers()))
    close(result(x), model(x))


@pytest.mark.parametrize("model", [nn.Linear(5, 3), nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 3, 1)), nn.ReLU()])
def test_channels_last_without_images(model):
    assert in_channels_last(inference_module(export(model.eval(), Inputs((X,))))) is None


def test_values_of_nodes():
    model = convolutions(nn.ReLU())
    traced = inference_module(export(model, Inputs((X,))))
    nodes = {str(node.target): node for node in traced.graph.nodes}
    values = values_of(traced, [nodes["x" if "x" in nodes else "input"], nodes["aten.relu.default"]], Inputs((X,)))
    given, between = values.values()
    assert torch.equal(given, X)
    close(between, F.relu(model[0](X)))


def test_values_of_a_copied_graph():
    traced = inference_module(export(convolutions(nn.ReLU()), Inputs((X,))))
    (relu,) = (node for node in traced.graph.nodes if node.target is torch.ops.aten.relu.default)
    other = in_channels_last(traced)
    close(values_of(other, [relu], Inputs((X,)))[relu], values_of(traced, [relu], Inputs((X,)))[relu])


@pytest.mark.parametrize(
    ("value", "sizes", "expected"),
    [
        (torch.zeros(2, 3), ((0, None), (3, 4)), True),
        (torch.zeros(9, 3), ((0, None), (3, 4)), True),
        (torch.zeros(2, 4), ((0, None), (3, 4)), False),
        (torch.zeros(2), ((0, None), (3, 4)), False),
        (torch.zeros(2, 3, 1), ((0, None), (3, 4)), False),
        (torch.zeros(1, 3), ((2, 8), (3, 4)), False),
        (torch.zeros(8, 3), ((2, 8), (3, 4)), False),
        (torch.zeros(7, 3), ((2, 8), (3, 4)), True),
        (3, ((0, None),), False),
        (3, None, True),
        (None, None, True),
    ],
)
def test_allowed_sizes(value, sizes, expected):
    assert fits(value, sizes) == expected


def test_constants_have_no_sizes():
    model = Reads(lambda m, x, scale, pair: x * scale + pair[0] if pair[1] is None else x)
    program = export(model, Inputs((X, 2.5, (X, None))))
    sizes = TracedInputs.of(program).sizes
    assert len(sizes) == 4
    assert [each is None for each in sizes] == [False, True, False, True]


@pytest.mark.parametrize("dynamic_sizes", [False, True])
def test_sample_inputs(dynamic_sizes):
    model = Reads(lambda m, x, ids: m.a(x).mean((2, 3)) + m.t(ids), a=nn.Conv2d(3, 4, 3), t=nn.Embedding(5, 4)).eval()
    program = export(model, Inputs((X, torch.tensor([4, 1]))), dynamic_sizes)
    inputs = TracedInputs.of(program).sample()
    assert all(map(fits, inputs.leaves, TracedInputs.of(program).sizes))
    assert [value.dtype for value in inputs.args] == [torch.float32, torch.int64]
    close(inference_module(program)(*inputs.args), model(*inputs.args))


def constants_of(module):
    return {name: value for name, value in module.named_buffers() if name.startswith(CHAIN_PREFIX)}


def test_rewritten_graph_reads_the_weights_of_the_model_where_they_are_unchanged():
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)).eval()
    result, traced = rewritten(model, torch.randn(2, 6))
    addresses = {value.data_ptr() for value in traced.buffers()}
    assert constants_of(result)
    assert all(value.data_ptr() in addresses for name, value in constants_of(result).items() if value.ndim == 2)


def test_tied_weights_get_memory_of_their_own():
    """New weights may be loaded into a fused model, so that no tensor may be changed by loading another one."""
    tied = nn.Linear(4, 4)
    model = Reads(lambda m, x: m.b(m.a(x)) + m.a.weight, a=tied, b=tied).eval()
    result, _ = rewritten(model, torch.randn(4, 4))
    addresses = [value.untyped_storage().data_ptr() for value in result.buffers()]
    assert len(addresses) == len(set(addresses)) == 5
