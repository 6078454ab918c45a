"""Models whose activation calls can all be isolated: what the result is, and what it has in common with the model."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastentropy import find_sites, isolate, linearize
from tests._helpers.activation_blocks import VECTOR, Block, Functional, Helper, names, no_warnings, outputs_equal
from tests._helpers.snapshots import assert_unchanged, snapshot

torchvision = pytest.importorskip("torchvision")

SCALE = 0.5  # a global that methods read


class Inplace(Block):
    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x), inplace=True)).relu_()


class InplaceStatement(Block):
    def forward(self, x):
        x = self.fc1(x)
        F.relu_(x)
        return self.fc2(x)


class Options(Block):
    def forward(self, x):
        x = F.gelu(self.fc1(x), approximate="tanh")
        x = F.leaky_relu(x, 0.2) + F.leaky_relu(x, negative_slope=-0.3) + F.softplus(x, 2, threshold=1)
        return F.hardtanh(x - 1, -0.1, 0.2) + torch.celu(x - 1, alpha=2.0) + F.elu(x - 1, 0.5)


class Nested(Block):
    def forward(self, x):
        return F.relu(F.gelu(self.fc1(x)) - 0.1)


class Keyword(Block):
    def forward(self, x):
        return F.relu(inplace=False, input=self.fc1(x)) + self.act(input=self.fc1(x)) + self.act(self.fc1(x))


class Chained(Block):
    def forward(self, x):
        return self.fc2(self.fc1(x).relu()).relu().neg().add(0.5).relu()


class OverSeveralLines(Block):
    def forward(self, x):
        x = F.relu(
            self.fc1(
                x,  # é: bytes and characters are not the same
            ),
        )
        y = {"é": F.relu(x - 0.1), "y": F.silu(x)}
        return y["é"] + y["y"]


class Named(Block):
    def forward(self, input, *, scale=1.0, shift=0.5):
        return F.relu(self.fc1(input) * scale + shift)


class Globals(Block):
    def forward(self, x):
        return F.relu(self.fc1(x)) * SCALE


class NoGrad(Block):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.fc1(x))


class SuperCall(Block):
    def forward(self, x):
        return F.relu(super().get_submodule("fc1")(x))


class Inherited(Helper):
    pass


class OwnFunction(Block):
    def __init__(self):
        super().__init__()
        self.function = F.relu

    def forward(self, x):
        return self.function(self.fc2(self.function(self.fc1(x))))


class ClassFunction(Block):
    function = staticmethod(F.relu)

    def forward(self, x):
        return self.function(self.fc1(x))


class Repeated(Block):
    def forward(self, x):
        return self.act(self.fc2(self.act(self.fc1(x))))


class SelfInLambda(Block):
    def forward(self, x):
        layer = lambda y: self.fc1(y)  # noqa: E731
        return F.relu(layer(x))


class PositionalOnly(Block):
    def forward(self, x, /):
        return F.relu(self.fc1(x))


class SelfPositionalOnly(Block):
    def forward(self, /, x):
        return F.gelu(self.fc1(x))


class LocalName(Block):
    """A module is called by way of a local name of its parent."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(5, 5), "act": nn.GELU()})

    def forward(self, x):
        block = self.block
        return block.act(block.fc(block.act(self.fc1(x))))


class InList(Block):
    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.GELU()])

    def forward(self, x):
        return self.acts[0](self.fc2(self.acts[0](self.fc1(x))))


class OfListItem(Block):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"act": nn.GELU()})])

    def forward(self, x):
        return self.blocks[0].act(self.fc2(self.blocks[0].act(self.fc1(x))))


class TakenName(Block):
    """The obvious names for the new modules are taken."""

    def __init__(self):
        super().__init__()
        self.relu, self.relu_1 = nn.Identity(), 3

    def forward(self, x):
        return F.relu(self.relu(self.fc1(x)) * self.relu_1)


class KeptTensor(Block):
    """Features are kept for others to see."""

    def forward(self, x):
        self.features = self.fc1(x)
        return self.features.relu()


class FunctionalSequential(nn.Sequential):
    """The forward goes through all children; a new one would be among them."""

    def __init__(self):
        super().__init__(nn.Linear(3, 5))

    def forward(self, x):
        return F.gelu(super().forward(x))


def with_closure():
    shift = torch.full((5,), 0.1)

    class Closure(Block):
        def forward(self, x):
            return F.relu(self.fc1(x) + shift)

    return Closure()


def transformer(activation="relu", layers=2):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation)
    return nn.TransformerEncoder(layer, layers)


def places():
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(3, 5), relu, nn.Linear(5, 5), relu, nn.Sequential(nn.Linear(5, 5), relu))


TOKENS = (2, 5, 8)
IMAGE = (2, 3, 64, 64)
BLOCKS = {
    kind.__name__: (kind, VECTOR)
    for kind in (
        *(Functional, Inplace, InplaceStatement, Options, Nested, Keyword, Chained, OverSeveralLines, Named, Globals),
        *(NoGrad, SuperCall, Helper, Inherited, OwnFunction, ClassFunction, Repeated, SelfInLambda, InList, TakenName),
    )
}
SMALL = {
    **BLOCKS,
    "closure": (with_closure, VECTOR),
    "places": (places, VECTOR),
    "transformer": (transformer, TOKENS),
    "transformer with module": (lambda: transformer(nn.GELU()), TOKENS),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=F.gelu), TOKENS),
}
UNUSUAL = {kind.__name__: (kind, VECTOR) for kind in (LocalName, OfListItem, KeptTensor, FunctionalSequential)}
LARGE = {
    "resnet18": (torchvision.models.resnet18, IMAGE),
    "densenet121": (torchvision.models.densenet121, IMAGE),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False, aux_logits=False), IMAGE),
}
ALL = [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
TABLE = {**SMALL, **LARGE, **UNUSUAL}


def build(name, training=False):
    """A model of the table with odd weights, and an input for it."""
    torch.manual_seed(0)
    kind, shape = TABLE[name]
    return kind().train(training), torch.randn(shape)


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_the_same_bits(name):
    model, x = build(name)
    assert outputs_equal(model, isolate(model, (x,)), x)


@pytest.mark.parametrize("name", ALL)
def test_every_site_is_a_module_called_once(name):
    model, x = build(name)
    with no_warnings():
        isolated = isolate(model, (x,))
    sites = names(isolated, x)
    assert len(sites) == len(find_sites(model, (x,)))
    assert set(sites) <= set(dict(isolated.named_modules()))


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_ways_to_write_a_call_are_isolated_or_named(name):
    model, x = build(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        isolated = isolate(model, (x,))
    left = [site for site in names(isolated, x) if site not in dict(isolated.named_modules())]
    assert len(caught) == bool(left)
    assert all(f": {', '.join(left)} (" in str(warning.message) for warning in caught)
    assert outputs_equal(model, isolated, x)


@pytest.mark.parametrize("kind", [PositionalOnly, SelfPositionalOnly])
def test_positional_only_arguments(kind):
    model, x = kind().eval(), torch.randn(VECTOR)
    with no_warnings():
        isolated = isolate(model, (x,))
    assert set(names(isolated, x)) <= set(dict(isolated.named_modules()))
    assert outputs_equal(model, isolated, x)


@pytest.mark.parametrize("name", ALL)
def test_the_given_model_is_unchanged(name):
    model, x = build(name, training=True)
    with torch.no_grad():
        model(x.clone())  # what a forward leaves on a model is there before
    before, classes = snapshot(model), [type(module) for module in model.modules()]
    isolate(model, (x,))
    assert_unchanged(model, before)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_buffers_are_shared_under_the_same_keys(name):
    model, x = build(name)
    isolated = isolate(model, (x,))
    assert list(isolated.state_dict()) == list(model.state_dict())
    for kind in ("named_parameters", "named_buffers"):
        before, after = (list(getattr(each, kind)(remove_duplicate=False)) for each in (model, isolated))
        assert [key for key, _ in after] == [key for key, _ in before]
        assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_training_mode_is_kept_also_of_new_modules(name, training):
    model, x = build(name, training)
    isolated = isolate(model, (x,))
    assert {path: module.training for path, module in isolated.named_modules()} == dict.fromkeys(
        dict(isolated.named_modules()), training
    )


def test_training_modes_that_differ_are_kept():
    model = nn.Sequential(Functional().eval(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    isolated = isolate(model, (torch.randn(VECTOR),))
    assert (isolated.training, isolated[0].training, isolated[0].relu.training, isolated[1].training) == (
        *(True, False),
        *(False, False),
    )


@pytest.mark.parametrize("name", SMALL)
def test_a_deep_copy_of_the_result_is_as_isolated(name):
    model, x = build(name)
    isolated = isolate(model, (x,))
    copied = copy.deepcopy(isolated)
    assert outputs_equal(model, copied, x)
    assert names(copied, x) == names(isolated, x)
    assert not {id(parameter) for parameter in copied.parameters()} & {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("name", [name for name in SMALL if name != "NoGrad"])
def test_gradients_are_the_same(name):
    model, x = build(name)
    isolated = isolate(model, (x,))
    gradients = [
        torch.autograd.grad(each(x.clone()).square().sum(), list(model.parameters()), allow_unused=True)
        for each in (model, isolated)
    ]
    for left, right in zip(*gradients, strict=True):
        assert left is right if left is None else torch.equal(left, right)


@pytest.mark.parametrize("name", [*SMALL, pytest.param("resnet18", marks=pytest.mark.slow)])
def test_one_activation_is_linearised_and_no_other(name):
    model, x = build(name)
    isolated = isolate(model, (x,))
    sites = names(isolated, x)
    for site in sites:
        linear = copy.deepcopy(isolated)
        linearize(linear, [site])
        if len(sites) > 1:
            assert names(linear, x) == [other for other in sites if other != site]
        assert not outputs_equal(isolated, linear, x)


def test_linearised_model_equals_one_without_the_activation():
    class Linear(Block):
        def forward(self, x):
            return torch.relu(self.fc2(self.fc1(x)))

    model, x = build("Functional")
    expected = Linear()
    expected.load_state_dict(model.state_dict())
    isolated = isolate(model, (x,))
    linearize(isolated, ["relu"])
    assert outputs_equal(expected, isolated, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_result_can_be_exported(name):
    model, x = build(name)
    with torch.no_grad():
        expected = model(x.clone())
        exported = torch.export.export(isolate(model, (x,)), (x,), strict=False)
        torch.testing.assert_close(exported.module()(x.clone()), expected)


@pytest.mark.slow
def test_repeated_modules_of_resnet18():
    model, x = build("resnet18")
    isolated = isolate(model, (x,))
    blocks = [f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)]
    assert names(isolated, x) == ["relu", *(f"{block}.{relu}" for block in blocks for relu in ("relu", "relu_1"))]
    assert all(type(isolated.get_submodule(name)) is nn.ReLU for name in names(isolated, x))
    assert all(isolated.get_submodule(name).inplace for name in names(isolated, x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Functional", {"relu": nn.ReLU(), "relu_1": nn.ReLU()}),
        ("Inplace", {"relu": nn.ReLU(inplace=True), "relu_1": nn.ReLU(inplace=True)}),
        ("InplaceStatement", {"relu": nn.ReLU(inplace=True)}),
        ("Nested", {"gelu": nn.GELU(), "relu": nn.ReLU()}),
        (
            "Options",
            {
                "gelu": nn.GELU("tanh"),
                "leaky_relu": nn.LeakyReLU(0.2),
                "leaky_relu_1": nn.LeakyReLU(-0.3),
                "softplus": nn.Softplus(2, 1),
                "hardtanh": nn.Hardtanh(-0.1, 0.2),
                "celu": nn.CELU(2.0),
                "elu": nn.ELU(0.5),
            },
        ),
        ("TakenName", {"relu_2": nn.ReLU()}),
    ],
)
def test_a_functional_call_becomes_the_module_with_its_arguments(name, expected):
    model, x = build(name)
    isolated = isolate(model, (x,))
    assert {site: repr(isolated.get_submodule(site)) for site in names(isolated, x)} == {
        site: repr(module) for site, module in expected.items()
    }


def test_a_module_in_several_places_gets_one_for_each():
    model, x = build("places")
    isolated = isolate(model, (x,))
    assert names(isolated, x) == ["1", "3", "4.1"]
    assert len({id(isolated[1]), id(isolated[3]), id(isolated[4][1])}) == 3


def test_prelu_in_several_places_shares_its_weight():
    prelu = nn.PReLU()
    model = nn.Sequential(prelu, nn.Linear(3, 3), prelu)
    isolated = isolate(model, (torch.randn(VECTOR),))
    assert isolated[0] is not isolated[2]
    assert isolated[0].weight is isolated[2].weight is prelu.weight


@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fast_path_does_not_bring_an_activation_back(activation, mode):
    torch.manual_seed(0)
    model, x = transformer(activation).eval(), torch.randn(TOKENS)
    isolated = isolate(model, (x,))
    linearize(isolated, ["layers.0.activation", "layers.1.activation"])
    expected = copy.deepcopy(model)
    for layer in expected.layers:
        layer.activation_relu_or_gelu, layer.activation = 0, nn.Identity()
    with mode():
        torch.testing.assert_close(isolated(x), expected(x))


def test_inputs_by_name():
    model = Named().eval()
    x = torch.randn(VECTOR)
    isolated = isolate(model, {"input": x, "scale": 2.0})
    assert [site.name for site in find_sites(isolated, {"input": x})] == ["relu"]
    for options in ({}, {"scale": 3.0}, {"shift": -1.0}):
        assert torch.equal(isolated(x, **options), model(x, **options))


def test_example_inputs_are_not_written_to():
    x = torch.randn(VECTOR)
    before = x.clone()
    isolate(nn.Sequential(nn.ReLU(inplace=True), Functional()), (x,))
    assert torch.equal(x, before)


def test_random_numbers_are_left_as_they_were():
    model, x = nn.Sequential(Functional(), nn.Dropout()), torch.randn(VECTOR)
    state = torch.get_rng_state()
    isolate(model, (x,))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_class_is_one_of_the_original_with_its_name():
    model = Functional()
    isolated = isolate(model, (torch.randn(VECTOR),))
    assert isinstance(isolated, Functional)
    assert (type(isolated).__name__, type(isolated).__qualname__) == ("Functional", "Functional")


@pytest.mark.slow
def test_what_is_isolated_already_is_left_as_it_is():
    model, x = build("resnet18")
    isolated = isolate(model, (x,))
    assert names(isolate(isolated, (x,)), x) == names(isolated, x)


def test_training_one_trains_both():
    model, x = build("Functional")
    isolated = isolate(model, (x,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    isolated(x).sum().backward()
    optimizer.step()
    assert outputs_equal(model, isolated, x)


def test_a_name_of_the_closure_that_changes_later_is_followed():
    scale = 1.0

    class Scaled(Block):
        def forward(self, x):
            return F.relu(self.fc1(x)) * scale

    model, x = Scaled().eval(), torch.randn(VECTOR)
    isolated = isolate(model, (x,))
    scale = 3.0
    assert outputs_equal(model, isolated, x)
