"""Calls that cannot be isolated and models that are refused."""

import functools
import math
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastentropy import isolate
from fastentropy._utils.text import plural
from tests._helpers.activation_blocks import VECTOR, Block, Functional, Helper, names, outputs_equal
from tests._helpers.snapshots import assert_unchanged, snapshot


class Loop(Block):
    def forward(self, x):
        x = self.fc1(x)
        for _ in range(3):
            x = F.gelu(self.fc2(x))
        return x


class Comprehension(Block):
    def forward(self, x):
        return sum([F.relu(y) for y in (self.fc1(x), self.fc1(-x))])  # noqa: C419 (a call in a list is the case)


class Variable(Block):
    slope = 0.3

    def forward(self, x):
        return F.leaky_relu(self.fc1(x), self.slope)


class SharedPReLU(Block):
    def __init__(self):
        super().__init__()
        self.prelu = nn.PReLU()

    def forward(self, x):
        return self.prelu(self.fc2(self.prelu(self.fc1(x))))


class SharedContainer(Block):
    def __init__(self):
        super().__init__()
        self.block = Functional()
        self.block.fc1 = nn.Linear(5, 5)

    def forward(self, x):
        return self.block(self.block(self.fc1(x)))


class Static(Block):
    @staticmethod
    def function(x):
        return F.relu(x)

    def forward(self, x):
        return self.function(self.fc1(x))


class Partial(Block):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.leaky_relu, negative_slope=0.3)

    def forward(self, x):
        return self.function(self.fc1(x))


class Mapped(Block):
    def forward(self, x):
        return next(map(F.relu, [self.fc1(x)]))


class StarredArguments(Block):
    def forward(self, x):
        arguments, options = (self.fc1(x),), {"negative_slope": 0.3}
        return F.leaky_relu(*arguments) + F.leaky_relu(self.fc1(x), **options)


class Overridden(Helper):
    def forward(self, x):
        return self.fc2(super().forward(x))


def module_level(module, x):
    return F.relu(module.fc1(x))


class OutsideOfMethods(Block):
    def forward(self, x):
        return module_level(self, x)


def without_source():
    namespace = {"Block": Block, "F": F, "__name__": __name__}
    exec("class NoSource(Block):\n    def forward(self, x):\n        return F.relu(self.fc1(x))\n", namespace)
    return namespace["NoSource"]()


def decorated_by_a_local_function():
    def decorated(function):
        @functools.wraps(function)
        def wrapper(*args):
            return function(*args)

        return wrapper

    class Decorated(Block):
        @decorated
        def forward(self, x):
            return F.relu(self.fc1(x))

    return Decorated()


NOT_ISOLATED = {
    "loop": (Loop, ["gelu", "gelu:1", "gelu:2"]),
    "comprehension": (Comprehension, ["relu", "relu:1"]),
    "an argument that is not constant": (Variable, ["leaky_relu"]),
    "prelu": (SharedPReLU, ["prelu:1"]),
    "shared container": (SharedContainer, ["block.relu", "block.relu:1", "block.relu:2", "block.relu:3"]),
    "static method": (Static, ["relu"]),
    "partial": (Partial, ["leaky_relu"]),
    "map": (Mapped, ["relu"]),
    "starred": (StarredArguments, ["leaky_relu", "leaky_relu:1"]),
    "a function": (OutsideOfMethods, ["relu"]),
    "without source": (without_source, ["relu"]),
}


@pytest.mark.parametrize("name", NOT_ISOLATED)
def test_what_cannot_be_isolated_is_named_and_right(name):
    torch.manual_seed(0)
    kind, expected = NOT_ISOLATED[name]
    model, x = kind().eval(), torch.randn(VECTOR)
    with pytest.warns(UserWarning, match="could be given no module") as caught:
        isolated = isolate(model, (x,))
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith(f"{plural(len(expected), 'activation call')} of ")
    assert message.partition("no module: ")[2].partition(" (")[0].split(", ") == expected
    assert outputs_equal(model, isolated, x)
    assert list(isolated.state_dict()) == list(model.state_dict())


def test_the_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="of Loop could be given no module") as caught:
        isolate(Loop(), (torch.randn(VECTOR),))
    assert caught[0].filename == __file__


class TwoNames(Block):
    def run(self, x):
        return F.relu(self.fc1(x))

    forward = run


@pytest.mark.parametrize("kind", [Overridden, decorated_by_a_local_function, TwoNames])
@pytest.mark.filterwarnings("ignore:.*could be given no module")
def test_a_method_that_stays_brings_no_unused_modules(kind):
    model, x = kind().eval(), torch.randn(VECTOR)
    isolated = isolate(model, (x,))
    new = {name: module for name, module in isolated.named_modules() if name not in dict(model.named_modules())}
    called = set()
    for name, module in new.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    assert outputs_equal(model, isolated, x)
    assert called == set(new)


@pytest.mark.filterwarnings("ignore:.*could be given no module")
def test_what_can_be_isolated_beside_what_cannot_is():
    class Both(Block):
        def forward(self, x):
            x = F.relu(self.fc1(x))
            for _ in range(2):
                x = F.gelu(self.fc2(x))
            return torch.relu(x)

    model, x = Both().eval(), torch.randn(VECTOR)
    isolated = isolate(model, (x,))
    assert names(isolated, x) == ["relu", "gelu", "gelu:1", "relu_1"]
    assert outputs_equal(model, isolated, x)


def test_a_branch_that_the_example_does_not_take_is_kept():
    class Branch(Block):
        def forward(self, x, flag: bool = False):
            return F.gelu(self.fc1(x)) if flag else F.relu(self.fc1(x))

    model, x = Branch().eval(), torch.randn(VECTOR)
    isolated = isolate(model, (x,))
    assert torch.equal(isolated(x), model(x))
    assert torch.equal(isolated(x, flag=True), model(x, flag=True))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["whole", "part", "method"])
def test_a_compiled_model_is_refused(wrap):
    model = nn.Sequential(Functional(), nn.Linear(5, 5))
    if wrap == "whole":
        model = torch.compile(model)
    elif wrap == "part":
        model[0] = torch.compile(model[0])
    else:
        model.compile()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="compiled"):
        isolate(model, (torch.randn(VECTOR),))
    assert_unchanged(model, before)


class TimeBased(Block):
    def forward(self, x):
        return F.relu(self.fc1(x)) + time.perf_counter_ns() / 1e6 % 1e3


COUNTER = [0]


class CounterBased(Block):
    def forward(self, x):
        COUNTER[0] += 1
        return F.relu(self.fc1(x)) * COUNTER[0]


class RandomShape(Block):
    def forward(self, x):
        COUNTER[0] += 1
        return (F.relu(self.fc1(x)),) * COUNTER[0]


class NaNLater(Block):
    def forward(self, x):
        COUNTER[0] += 1
        return F.relu(self.fc1(x)) * (math.nan if COUNTER[0] == 3 else 1.0)


@pytest.mark.parametrize("kind", [TimeBased, CounterBased, RandomShape, NaNLater])
def test_a_model_with_varying_outputs_is_refused(kind):
    COUNTER[0] = 0
    with pytest.raises(RuntimeError, match="outputs would differ"):
        isolate(kind(), (torch.full(VECTOR, 2.0),))


def test_dropout_and_random_numbers_are_no_difference():
    class Noisy(Block):
        def forward(self, x):
            return F.relu(self.fc1(x) + torch.randn(5))

    isolate(nn.Sequential(Noisy(), nn.Dropout()), (torch.randn(VECTOR),))


def test_outputs_other_than_tensors_are_kept():
    class Structured(Block):
        def forward(self, x):
            return {"logits": F.relu(self.fc1(x)), "size": 5, "none": None, "more": [x, (x + 1,)]}

    model, x = Structured().eval(), torch.randn(VECTOR)
    output = isolate(model, (x,))(x)
    assert list(output) == ["logits", "size", "none", "more"]
    assert torch.equal(output["logits"], model(x)["logits"])
    assert isinstance(output["more"][1][0], Tensor)


def test_the_model_that_raises_is_unchanged():
    model = Functional()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        isolate(model, (torch.randn(4, 7),))
    assert_unchanged(model, before)
