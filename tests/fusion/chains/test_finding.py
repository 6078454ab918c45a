"""Which stretches of traced networks are chains, and what the chains compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from fastentropy.fusion.chains.affine import AffineOperator
from fastentropy.fusion.chains.elements import Flatten, Sum, operators, run
from fastentropy.fusion.chains.finding import find_chains, overwritten_constants
from fastentropy.fusion.chains.layouts import append_view
from fastentropy.fusion.chains.nodes import shape_of
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, inference_module
from tests._helpers.linear_networks import IMAGES, NETWORKS, conv2d, image_network, row_network


def traced(model, *inputs):
    return torch.export.export(model.eval(), inputs).module(check_guards=False)


def names(model, *inputs):
    return [chain.names for chain in find_chains(traced(model, *inputs))]


def values_of(module, *inputs):
    """Return a copy of the value of each node as it is made, since in-place operators may overwrite it later."""
    values = {}

    class Record(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            values[n] = value.clone() if isinstance(value, torch.Tensor) else value
            return value

    with torch.no_grad():
        Record(module).run(*inputs)
    return values


def viewed(chain, value):
    """Return the view of a chain's natural value, as the nodes that `append_view` makes compute it."""
    graph = torch.fx.Graph()
    graph.output(append_view(graph, chain.view, graph.placeholder("value"), chain.shape))
    return torch.fx.GraphModule({}, graph)(value)


def assert_computes(module, *inputs):
    """Assert that the elements and views of each chain compute the value of its end from that of its source."""
    values, chains = values_of(module, *inputs), find_chains(module)
    for chain in chains:
        actual = run(chain.elements, values[chain.source].double())
        assert actual.dtype == torch.float64
        assert {operator.bias.dtype for operator in operators(chain.elements)} == {torch.float64}
        actual = actual.float()
        if chain.view:
            actual = viewed(chain, actual)
        assert actual.shape == values[chain.end].shape
        torch.testing.assert_close(actual, values[chain.end], rtol=1e-4, atol=1e-4)
    return chains


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
        (lambda m, x: m.b(torch.add(m.a(x), x, alpha=2)), [("a", "b")]),
        (lambda m, x: m.b(m.a(x) + x[:1]), [("a",), ("b",)]),
        (lambda m, x: m.b(m.whole(x) + x), [("whole",), ("b",)]),
        (lambda m, x: m.b(F.dropout(m.a(x), training=True)), [("a",), ("b",)]),
        (lambda m, x: m.b(F.batch_norm(m.a(x), m.norm.running_mean, m.norm.running_var, training=True)), [("a",), ("b",)]),
        (lambda m, x: (y := m.relu(x)).add_(m.b(m.a(y))), [("b",)]),
        (lambda m, x: m.b(m.a(x) + 1.0), [("a", "b")]),
        (lambda m, x: m.b(2 * m.a(x) / 3), [("a", "b")]),
        (lambda m, x: m.a((x - 0.5) / 0.25), [("a",)]),
        (lambda m, x: m.b(m.a(x).mul_(2)), [("a", "b")]),
        (lambda m, x: m.b(F.avg_pool2d(m.a(x), 2)), [("a", "b")]),
        (lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 3)), [("a", "b")]),
        (lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 4)), [("a",), ("b",)]),
        (lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), [("a",), ("b",)]),
        (lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=2)), [("a", "b")]),
        (lambda m, x: m.b(F.interpolate(m.a(x), scale_factor=1.5)), [("a",), ("b",)]),
        (lambda m, x: m.b(m.a(x).sin()), [("a",), ("b",)]),
        (lambda m, x: m.b(m.a(x) * x), [("a",), ("b",)]),
        (lambda m, x: m.b(m.a(x).transpose(2, 3)), [("a",), ("b",)]),
        (lambda m, x: m.b(m.a(x)[:, :, 1:]), [("a", "b")]),
        (lambda m, x: m.b(m.a(x).double().float()), [("a",), ("b",)]),
        (lambda m, x: m.b(m.relu(x)).add_(m.relu(x)), [("b",)]),
        (lambda m, x: F.conv2d(m.a(x), m.b.weight * 2), [("a",)]),
        (lambda m, x: F.conv2d(m.a(x), m.b.weight), [("a", "b")]),
    ],
)
def test_a_chain_is_a_longest_linear_stretch(forward, expected):
    assert names(image_network(forward), IMAGES) == expected


def test_an_in_place_addition_closes_a_residual_block():
    def forward(m, x):
        x = m.relu(x)
        y = m.b(m.a(x))
        y += x
        return m.relu_(y)

    (chain,) = find_chains(traced(image_network(forward), IMAGES))
    assert [type(element) for element in chain.elements] == [Sum]
    assert [len(branch) for branch in chain.elements[0].branches] == [2, 0]


def test_an_overwritten_value_with_other_readers_starts_no_chain():
    def forward(m, x):
        y = m.relu(x)
        z = m.a(y)
        return m.b(m.relu_(y)) + z

    assert all("a" not in each for each in names(image_network(forward), IMAGES))


def test_a_residual_block_continues_the_stretch_before_it():
    (chain,) = find_chains(traced(image_network(lambda m, x: m.relu(m.b(y := m.a(x)) + y)), IMAGES))
    first, block = chain.elements
    assert (chain.source.op, chain.end.target) == ("placeholder", torch.ops.aten.add.Tensor)
    assert isinstance(first, AffineOperator)
    assert [len(branch) for branch in block.branches] == [1, 0]


def test_a_residual_block_starts_anew_at_a_shared_value():
    chains = find_chains(traced(image_network(lambda m, x: (m.b(y := m.a(x)) + y, y)), IMAGES))
    assert [chain.names for chain in chains] == [("a",), ("b",)]
    assert isinstance(chains[1].elements[0], Sum)


def test_residual_blocks_nest():
    def forward(m, x):
        y = m.a(x) + x
        return m.b(y) + m.a(y) + x

    (chain,) = find_chains(traced(image_network(forward), IMAGES))
    assert chain.names == ("a", "b", "a")
    ((outer,),) = (chain.elements,)
    assert [[type(element) for element in branch] for branch in outer.branches] == [[Sum, Sum], []]


def test_a_downsampling_branch_belongs_to_its_block():
    block = image_network(lambda m, x: m.b(m.long(x)) + m.short(x), long=conv2d(stride=2), short=nn.Conv2d(4, 4, 1, stride=2))
    (chain,) = find_chains(traced(block, IMAGES))
    assert chain.names == ("long", "b", "short")
    assert [operator.stride for operator in operators(chain.elements)] == [(2, 2), (1, 1), (2, 2)]


def test_a_value_overwritten_through_a_view_closes_no_block():
    def forward(m, x):
        y = m.relu(x)
        z = m.b(m.a(y))
        y[:, 0] = 0
        return z + y

    # Nor does it start the chain of `a`, which would read it later than `a` does.
    assert names(image_network(forward), IMAGES) == [("b",)]


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
    model = image_network(forward).eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    assert assert_computes(traced(model, IMAGES), IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Linear(5, 6)), torch.randn(2, 3, 4), [("0", "2")]),
        (nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 6)), torch.randn(2, 4), [("0", "2")]),
        (nn.Sequential(nn.Conv1d(4, 5, 3), nn.BatchNorm1d(5), nn.Conv1d(5, 6, 2)), torch.randn(2, 4, 9), [("0", "2")]),
        (nn.Sequential(nn.Conv3d(1, 2, 2), nn.Conv3d(2, 3, 1)), torch.randn(2, 1, 3, 3, 3), [("0", "1")]),
        (nn.Sequential(nn.Conv1d(4, 5, 3), nn.Linear(7, 6)), torch.randn(2, 4, 9), [("0",), ("1",)]),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), IMAGES, []),
        (nn.Sequential(conv2d(), nn.BatchNorm2d(4, track_running_stats=False), conv2d()), IMAGES, [("0",), ("2",)]),
        (nn.Sequential(conv2d(), nn.MaxPool2d(2), conv2d()), IMAGES, [("0",), ("2",)]),
        (nn.Sequential(conv2d(), nn.ConvTranspose2d(4, 4, 2), conv2d()), IMAGES, [("0", "1", "2")]),
        (nn.Sequential(conv2d(), nn.Sequential(nn.BatchNorm2d(4), conv2d(), nn.Dropout2d())), IMAGES, [("0", "1.1")]),
        (nn.Sequential(conv2d(groups=2), nn.BatchNorm2d(4, affine=False), conv2d(bias=False)), IMAGES, [("0", "2")]),
        (nn.Sequential(conv2d(padding_mode="circular"), nn.Conv2d(4, 4, 1)), IMAGES, [("0", "1")]),
    ],
)
def test_chains_of_common_modules(model, x, expected):
    assert names(model, x) == expected


def test_chains_of_a_whole_network(network, images):
    network.relu1 = network.gelu = nn.Identity()
    chains = assert_computes(traced(network, images), images)
    assert [chain.names for chain in chains] == [("conv1", "conv2"), ("fc1", "fc2")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_chains_of_every_network(name):
    model, x, expected = NETWORKS[name]
    assert names(model, x) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_chains_with_views_compute_what_their_nodes_compute(name):
    model, x, _ = NETWORKS[name]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    assert_computes(traced(model, x), x)


def test_layers_behind_a_flattening_cover_their_input():
    model, x, _ = NETWORKS["a classifier of positions"]
    (chain,) = find_chains(traced(model, x))
    *_, first, second, last = chain.elements
    assert last == Flatten()
    assert (first.kernel, second.kernel) == ((3, 3), (1, 1))


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("GPT-2's MLP", None),
        ("LayerScale", None),
        ("rows that stay flattened", None),
        ("normalised images", None),
        ("tokens of an image", (0, 2, 3, 1)),
        ("rows in another order", (1, 0, 2)),
    ],
)
def test_the_view_holds_the_permutation_that_is_left(name, order):
    model, x, _ = NETWORKS[name]
    (chain,) = find_chains(traced(model, x))
    assert (chain.view and chain.view.order) == order


def test_members_are_the_nodes_from_source_to_end():
    (chain,) = find_chains(traced(image_network(lambda m, x: m.relu(m.b(m.norm(m.a(x))))), IMAGES))
    assert [node.target for node in chain.members] == [
        torch.ops.aten.conv2d.default,
        torch.ops.aten.batch_norm.default,
        torch.ops.aten.conv2d.default,
    ]
    assert chain.source.op == "placeholder"
    assert chain.end is chain.members[-1]


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: [y := m.relu(x), m.a(y), y.mul_(2), m.b(y)][1::2],
        lambda m, x: [y := m.relu(x), z := m.a(y), m.b(y.add_(1)) + z][-1],
        lambda m, x: [y := m.relu(x), z := m.b(m.a(y)), y.div_(2), z + y][-1],
        lambda m, x: [y := m.a(x), y.mul_(2), m.b(y)][-1],
        lambda m, x: [y := m.relu(x), y.view(-1).mul_(2), m.b(m.a(y)) + y][-1],
        lambda m, x: [y := m.a(x), z := y + 1, y.mul_(3), m.b(z)][-1],
        lambda m, x: m.b(m.a(x.mul_(2))),
        lambda m, x: [x.mul_(2), m.b(m.a(x))][-1],
    ],
)
def test_scales_in_place_are_not_moved_past_other_readers(forward):
    """The network computes the same when each chain runs where it ends, on the value that its source has by then."""
    model = image_network(forward).eval()
    module = traced(model, IMAGES)
    chains = {chain.end: chain for chain in find_chains(module)}
    moved = set().union(*(chain.members for chain in chains.values())) - set(chains)
    live = {}

    class Late(torch.fx.Interpreter):
        """Runs each chain where it ends, and nothing in between."""

        def run_node(self, n):
            if n in moved:
                return None
            if n in chains:
                source = live[chains[n].source]
                live[n] = run(chains[n].elements, source.double()).float()
                return live[n]
            live[n] = super().run_node(n)
            return live[n]

    with torch.no_grad():
        expected = model(IMAGES.clone())
        actual = Late(module).run(IMAGES.clone())
    for one, other in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_scaling_an_input_in_place_stays_outside_of_chains():
    (chain,) = find_chains(traced(image_network(lambda m, x: m.b(m.a(x.mul_(2)))), IMAGES))
    assert "mul_" in str(chain.source.target)


def test_overwritten_constants_are_named():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv2d()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return self.a(x)

    assert overwritten_constants(traced(Counts(), IMAGES)) == ["calls"]
    assert overwritten_constants(traced(image_network(lambda m, x: m.b(m.a(x)).mul_(2)), IMAGES)) == []


def test_has_fixed_size():
    model = nn.Sequential(conv2d(), conv2d()).eval()
    for dynamic_sizes in (False, True):
        (chain,) = find_chains(inference_module(export(model, Inputs((IMAGES,)), dynamic_sizes)))
        assert chain.has_fixed_size != dynamic_sizes


@pytest.mark.slow
def test_chains_with_a_free_batch_size():
    for name in ("GPT-2's MLP", "a classifier", "LayerScale", "flattened by reshape", "rows with a new axis"):
        model, x, expected = NETWORKS[name]
        if name == "rows with a new axis":
            model = row_network(lambda m, x: m.b(m.a(x).view(x.shape[0], 1, 3, 5)))
        module = inference_module(export(model.eval(), Inputs((x,))))
        assert [chain.names for chain in find_chains(module)] == expected
        assert_computes(module, torch.cat([x, x[:1]]))


def test_chains_without_a_batch():
    module = traced(image_network(lambda m, x: m.b(m.a(x))), IMAGES[0])
    (chain,) = assert_computes(module, IMAGES[0])
    assert chain.names == ("a", "b")
    assert math.prod(chain.elements[0].kernel) == 9


def test_the_operator_that_ends_a_chain_is_named():
    network = nn.Sequential(conv2d(), nn.Sequential(conv2d(), nn.ReLU()), conv2d(), conv2d())
    assert [chain.ended_by for chain in find_chains(traced(network, IMAGES))] == ["aten.relu in 1.1", ""]
    module = traced(image_network(lambda m, x: (m.relu(y := m.b(m.a(x))), y.sin())), IMAGES)
    assert [chain.ended_by for chain in find_chains(module)] == ["aten.relu in relu, aten.sin"]


@pytest.mark.parametrize("dynamic_sizes", [False, True])
def test_finding_chains_fixes_no_free_size(dynamic_sizes):
    """A comparison of free sizes as numbers would add the condition that they are those of the example."""
    forwards = [
        lambda m, x: m.c(m.c(m.relu(x.movedim(1, -1))).unflatten(1, (2, -1)).transpose(1, 2)),
        lambda m, x: m.b(m.a(x) + x) - x[:, :, :1] * 2,
        lambda m, x: m.c(m.a(x).permute(2, 0, 3, 1).flatten(0, 1)).sin(),
    ]
    for forward in forwards:
        model = image_network(forward, c=nn.Linear(4, 4)).eval()
        images = torch.randn(2, 4, 6, 4)
        module = inference_module(export(model, Inputs((images,)), dynamic_sizes))
        (x,) = module.graph.find_nodes(op="placeholder")
        free = [size for size in shape_of(x) if not isinstance(size, int)]
        find_chains(module)
        assert [str(size) for size in shape_of(x) if not isinstance(size, int)] == [str(size) for size in free]
        assert free
