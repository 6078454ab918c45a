"""What is read from a node: constants are dense real tensors of the model, and only tensors have a shape."""

import pytest
import torch
import torch.nn.functional as F

from fastentropy.fusion.chains.nodes import constant, shape_of
from tests._helpers.networks import Holder
from tests._helpers.operators import normal


def traced(model, x):
    return torch.export.export(model, (x,)).module(check_guards=False)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_sparse_weight_is_not_a_constant():
    module = traced(Holder(lambda m, x: F.linear(x, m.weight), weight=normal(3, 4, seed=0)), normal(2, 4, seed=1))
    (node,) = (n for n in module.graph.nodes if n.op == "get_attr")
    assert torch.equal(constant(node, module), module.weight)
    for other in (module.weight.to_sparse(), module.weight.to_sparse_csr(), module.weight.long(), module.weight.bool()):
        module.weight = other
        assert constant(node, module) is None


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_weight_is_not_a_constant():
    module = traced(Holder(lambda m, x: F.linear(x, m.weight), weight=normal(3, 4, seed=0)), normal(2, 4, seed=1))
    (node,) = (n for n in module.graph.nodes if n.op == "get_attr")
    module.weight = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8)
    assert constant(node, module) is None


def test_a_value_is_not_a_constant():
    module = traced(Holder(lambda m, x: x.relu()), normal(2, 4, seed=0))
    for node in module.graph.nodes:
        assert constant(node, module) is None
    assert constant(3.0, module) is None
    assert constant(None, module) is None


def test_only_tensors_have_a_shape():
    module = traced(Holder(lambda m, x: x.relu()), normal(2, 4, seed=0))
    shapes = {node.op: shape_of(node) for node in module.graph.nodes}
    assert shapes["placeholder"] == shapes["call_function"] == (2, 4)
    assert shapes["output"] is None
    assert shape_of(3) is None
