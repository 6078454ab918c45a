"""A finished graph computes the same values, with fewer copies, and its outputs lie in memory as those of the model."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastentropy.fusion.finishing import finish
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.networks import Reads

ACTIVATIONS = {
    "relu_": nn.ReLU(),
    "relu6_|hardtanh_": nn.ReLU6(),
    "hardswish_": nn.Hardswish(),
    "silu_": nn.SiLU(),
    "gelu_": nn.GELU(approximate="tanh"),
    "leaky_relu_": nn.LeakyReLU(0.3),
    "elu_": nn.ELU(0.7),
    "hardtanh_": nn.Hardtanh(-0.5, 0.3),
}


def finished(model, *inputs):
    given = Inputs(inputs)
    with torch.no_grad():
        return finish(inference_module(export(model.eval(), given)), given, model(*inputs))


def called(graph):
    return [node.target.name().split("::")[1].split(".")[0] for node in graph.graph.nodes if hasattr(node.target, "name")]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_behind_a_layer_runs_in_place(name):
    model = nn.Sequential(nn.Linear(5, 7), ACTIVATIONS[name], nn.Linear(7, 3))
    graph, x = finished(model, torch.randn(4, 5)), torch.randn(6, 5)
    assert set(called(graph)) & set(name.split("|"))
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


KERNELS = {
    "linear_pair": lambda x, w: torch.ops.fastentropy_kernels.linear_pair(
        x.flatten(1), w, None, w, None, None, "identity", "auto"
    ),
    "conv_pointwise": lambda x, w: torch.ops.fastentropy_kernels.conv_pointwise(
        x, w[..., None, None], None, w, None, None, [1, 1], [0, 0], [1, 1], 1, "identity", "auto"
    ),
    "conv_bordered": lambda x, w: torch.ops.fastentropy_kernels.conv_bordered(
        x, w[..., None, None], None, None, None, [1, 1], [0, 0], [1, 1], 1, "identity", False, "auto"
    )[0],
}


@pytest.mark.parametrize("name", ["relu", "relu6", "hardswish", "silu", "mish", "gelu"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_of_a_chain_computes_the_activation(kernel, name):
    model = Reads(lambda m, x: getattr(F, name)(KERNELS[kernel](x, m.weight)))
    model.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    graph, x = finished(model, torch.randn(4, 6, 1, 1)), torch.randn(7, 6, 1, 1)
    assert set(called(graph)) - {"flatten", "unsqueeze"} == {kernel}
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "activate",
    [lambda y: F.relu(y) + y, lambda y: F.hardtanh(y, -0.5, 0.5), lambda y: F.leaky_relu(y, 0.3), lambda y: F.elu(y)],
)
def test_activation_that_the_kernel_does_not_compute(kernel, activate):
    model = Reads(lambda m, x: activate(KERNELS[kernel](x, m.weight)))
    model.weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    graph, x = finished(model, torch.randn(4, 6, 1, 1)), torch.randn(7, 6, 1, 1)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (y := m.a(x)).relu() + y,
        lambda m, x: (m.a(x).relu(), x.relu()),
        lambda m, x: m.a(x)[:, :2].relu(),
        lambda m, x: ((y := m.a(x)).relu(), y),
        lambda m, x: (y := m.a(x)).view(-1).relu().sum() + y.sum(),
    ],
)
def test_value_that_is_read_again_is_not_overwritten(forward):
    model, x = Reads(forward, a=nn.Linear(5, 5)), torch.randn(4, 5)
    graph, before = finished(model, x), x.clone()
    with torch.no_grad():
        actual, expected = (torch.utils._pytree.tree_leaves(each(x)) for each in (graph, model))
    assert all(map(torch.equal, actual, expected))
    assert torch.equal(x, before)


def test_weights_can_be_trained_through_activations_in_place():
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 7), nn.SiLU())
    graph, x = finished(model, torch.randn(4, 5)), torch.randn(6, 5, requires_grad=True)
    (ours,) = torch.autograd.grad(graph(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("arrange", [lambda x: x.transpose(1, 2), lambda x: x.permute(2, 0, 1), lambda x: x.expand(3, -1, -1)])
def test_linear_layer_reads_a_matrix(arrange):
    model = Reads(lambda m, x: m.a(arrange(x)), a=nn.Linear(4, 4))
    x = torch.randn(1, 4, 4) if arrange(torch.zeros(1, 4, 4)).shape[0] == 3 else torch.randn(5, 4, 4)
    graph = finished(model, x)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), model(x))
    strided = [arrange(x).stride(), called(graph)]
    assert ("contiguous" in strided[1]) == (not arrange(x).is_contiguous())


def test_dense_input_of_a_linear_layer_is_not_copied():
    assert "contiguous" not in called(finished(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(5, 3, 4)))


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4)), st.tuples(*[st.sampled_from([1, 2, 3])] * 4))
def test_outputs_have_the_order_of_the_model(ours, wanted, sizes):
    def dense(x, order):
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])

    x = torch.randn(2, *sizes[1:])
    model = Reads(lambda m, x: dense(x, ours) * 2).eval()
    given_inputs = Inputs((x,))
    graph = finish(inference_module(export(model, given_inputs)), given_inputs, dense(x * 2, wanted))
    actual, expected = graph(x), dense(x * 2, wanted)
    assert torch.equal(actual, expected)
    long = [axis for axis in range(4) if x.shape[axis] > 1]
    assert [actual.stride(axis) for axis in long] == [expected.stride(axis) for axis in long]
