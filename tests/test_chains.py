"""What is a chain, and where it ends, on traced networks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import Reads
from fastentropy.fusion.affine import AffineOperator, Sum, operators, run
from fastentropy.fusion.chains import find_chains


def traced(model, *inputs):
    return torch.export.export(model.eval(), inputs).module(check_guards=False)


def names(model, *inputs):
    return [chain.names for chain in find_chains(traced(model, *inputs))]


def conv(channels=4, **options):
    return nn.Conv2d(4, channels, 3, padding=1, **options)


X = torch.randn(2, 4, 6, 6)


def two(forward, **modules):
    """A network of two convolutions and what the forward does with them."""
    modules |= {"whole": nn.Conv2d(4, 4, 6), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True)}
    return Reads(forward, a=conv(), b=conv(), **modules)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: m.b(m.a(x)), [("a", "b")]),
        (lambda m, x: m.b(m.relu(m.a(x))), [("a",), ("b",)]),
        (lambda m, x: m.b(F.dropout(m.a(x), training=m.training)), [("a", "b")]),
        (lambda m, x: m.b(m.a(x).clone()), [("a", "b")]),
        (lambda m, x: (m.a(x), m.b(m.a(x))), [("a",), ("a", "b")]),
        (lambda m, x: m.b(y := m.a(x)) * y, [("a",), ("b",)]),
        (lambda m, x: [y := m.a(x), m.b(y)], [("a",), ("b",)]),
        (lambda m, x: m.a(x) + x, [("a",)]),
        (lambda m, x: m.a(x) + m.b(x), [("a", "b")]),
        (lambda m, x: m.b(m.a(x) + x), [("a", "b")]),
        (lambda m, x: m.b(y := m.a(x)) + y, [("a", "b")]),
        (lambda m, x: m.a(x) + m.relu(x), [("a",)]),
        (lambda m, x: m.a(x) + m.b(m.relu(x)), [("a",), ("b",)]),
        (lambda m, x: m.b(torch.add(m.a(x), x, alpha=2)), [("a",), ("b",)]),
        (lambda m, x: m.b(m.a(x) + x[:1]), [("a",), ("b",)]),
        (lambda m, x: m.b(m.whole(x) + x), [("whole",), ("b",)]),
        (lambda m, x: m.b(F.dropout(m.a(x), training=True)), [("a",), ("b",)]),
        (lambda m, x: m.b(F.batch_norm(m.a(x), m.norm.running_mean, m.norm.running_var, training=True)), [("a",), ("b",)]),
        (lambda m, x: (y := m.relu(x)).add_(m.b(m.a(y))), [("b",)]),
        (lambda m, x: m.a(x) + 1.0, [("a",)]),
        (lambda m, x: m.b(m.relu(x)).add_(m.relu(x)), [("b",)]),
        (lambda m, x: F.conv2d(m.a(x), m.b.weight * 2), [("a",)]),
        (lambda m, x: F.conv2d(m.a(x), m.b.weight), [("a", "b")]),
    ],
)
def test_a_chain_is_a_maximal_linear_stretch(forward, expected):
    assert names(two(forward), X) == expected


def test_an_in_place_addition_closes_a_residual_block():
    def forward(m, x):
        x = m.relu(x)
        y = m.b(m.a(x))
        y += x
        return m.relu_(y)

    (chain,) = find_chains(traced(two(forward), X))
    assert [type(element) for element in chain.elements] == [Sum]
    assert [len(branch) for branch in chain.elements[0].branches] == [2, 0]


def test_a_value_that_is_overwritten_while_others_read_it_starts_no_chain():
    def forward(m, x):
        y = m.relu(x)
        z = m.a(y)
        return m.b(m.relu_(y)) + z

    assert all("a" not in each for each in names(two(forward), X))


def test_a_residual_block_behind_a_linear_stretch_continues_it():
    (chain,) = find_chains(traced(two(lambda m, x: m.relu(m.b(y := m.a(x)) + y)), X))
    first, block = chain.elements
    assert (chain.source.op, chain.end.target) == ("placeholder", torch.ops.aten.add.Tensor)
    assert isinstance(first, AffineOperator)
    assert [len(branch) for branch in block.branches] == [1, 0]


def test_a_residual_block_does_not_continue_a_value_that_others_read_too():
    chains = find_chains(traced(two(lambda m, x: (m.b(y := m.a(x)) + y, y)), X))
    assert [chain.names for chain in chains] == [("a",), ("b",)]
    assert isinstance(chains[1].elements[0], Sum)


def test_blocks_nest():
    def forward(m, x):
        y = m.a(x) + x
        return m.b(y) + m.a(y) + x

    (chain,) = find_chains(traced(two(forward), X))
    assert chain.names == ("a", "b", "a")
    ((outer,),) = (chain.elements,)
    assert [[type(element) for element in branch] for branch in outer.branches] == [[Sum, Sum], []]


def test_a_downsampling_branch_is_part_of_its_block():
    block = two(lambda m, x: m.b(m.long(x)) + m.short(x), long=conv(stride=2), short=nn.Conv2d(4, 4, 1, stride=2))
    (chain,) = find_chains(traced(block, X))
    assert chain.names == ("long", "b", "short")
    assert [operator.stride for operator in operators(chain.elements)] == [(2, 2), (1, 1), (2, 2)]


def test_a_value_that_is_overwritten_through_a_view_closes_no_block():
    def forward(m, x):
        y = m.relu(x)
        z = m.b(m.a(y))
        y[:, 0] = 0
        return z + y

    # Nor does it start the chain of `a`, which would read it later than `a` does.
    assert names(two(forward), X) == [("b",)]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.norm(m.a(x))),
        lambda m, x: m.relu(m.norm(m.a(m.relu(x))) + x),
        lambda m, x: m.b(y := m.norm(m.a(x))) + y,
        lambda m, x: m.b(m.norm(m.a(x)) + x) + m.a(x),
        lambda m, x: m.b(y := m.relu(x)).add_(m.norm(m.a(y))),
        lambda m, x: m.a((y := m.b(x)) + y),
        lambda m, x: F.conv2d(m.a(x), m.b.weight, stride=(1, 2), padding=(2, 0), dilation=2, groups=1),
    ],
)
def test_a_chain_computes_what_its_nodes_compute(forward):
    model = two(forward).eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    module, values = traced(model, X), {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            values[n] = values[n].clone() if isinstance(values[n], torch.Tensor) else values[n]
            return values[n]

    with torch.no_grad():
        Record(module).run(X)
    chains = find_chains(module)
    assert chains
    for chain in chains:
        assert {operator.weight.dtype for operator in operators(chain.elements)} == {torch.float64}
        actual = run(chain.elements, values[chain.source].double()).float()
        torch.testing.assert_close(actual, values[chain.end], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Linear(5, 6)), torch.randn(2, 3, 4), [("0", "2")]),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 6)), torch.randn(2, 4), [("0", "2")]),
        (nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.Conv1d(5, 6, 2)), torch.randn(2, 4, 9), [("0", "2")]),
        (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 3, 1)), torch.randn(2, 1, 3, 3, 3), [("0", "1")]),
        (nn.Sequential(nn.Conv1d(4, 5, 3), nn.Linear(7, 6)), torch.randn(2, 4, 9), [("0",), ("1",)]),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), X, []),
        (nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False), conv()), X, [("0",), ("2",)]),
        (nn.Sequential(conv(), nn.MaxPool2d(2), conv()), X, [("0",), ("2",)]),
        (nn.Sequential(conv(), nn.ConvTranspose2d(4, 4, 2), conv()), X, [("0",), ("2",)]),
        (nn.Sequential(conv(), nn.Sequential(nn.BatchNorm2d(4), conv(), nn.Dropout2d())), X, [("0", "1.1")]),
        (nn.Sequential(conv(groups=2), nn.BatchNorm2d(4, affine=False), conv(bias=False)), X, [("0", "2")]),
        (nn.Sequential(conv(padding_mode="circular"), nn.Conv2d(4, 4, 1)), X, [("0", "1")]),
    ],
)
def test_linear_layers_and_batch_norm_are_operators_of_their_own_kind(model, x, expected):
    assert names(model, x) == expected


def test_the_elements_compute_what_the_graph_computes(network, images):
    network.relu1 = network.gelu = nn.Identity()
    module = traced(network, images)
    values = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            values[n] = super().run_node(n)
            return values[n].clone() if isinstance(values[n], torch.Tensor) else values[n]

    Record(module).run(images)
    chains = find_chains(module)
    assert [chain.names for chain in chains] == [("conv1", "conv2"), ("fc1", "fc2")]
    for chain in chains:
        actual = run(chain.elements, values[chain.source].double())
        torch.testing.assert_close(actual.float(), values[chain.end], rtol=1e-4, atol=1e-4)
