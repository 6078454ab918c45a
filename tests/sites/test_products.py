"""Which calls of activations are read as the first factor of a product, from the instructions of the code."""

import dis
import sys

import pytest
import torch
from torch import nn

from fastentropy.sites.products import Product, is_plain, product_at


class Code(nn.Module):
    """Methods of which each multiplies something."""

    def gated(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))

    def local(self, x):
        g = self.gate(x)
        y = self.act(g) * self.up(x)
        return y

    def first_of_two(self, x):
        return self.act(x) * self.up(x) * 2

    def twice(self, x):
        return self.act(x) * self.up(x) + self.act(self.gate(x)) * self.other(x)

    def second_factor(self, x):
        return self.up(x) * self.act(self.gate(x))

    def computed_argument(self, x):
        return self.act(self.gate(x)) * self.up(x + 1)

    def through_a_function(self, x):
        return sum(map(self.act, [x])) * self.up(x)

    def other_operator(self, x):
        return self.act(x) @ self.up(x)

    def power(self, x):
        return self.act(x) ** self.up(x)

    def kept(self, x):
        return (y := self.act(x)) * self.up(x) + y

    def in_place(self, x):
        y = self.act(x)
        y *= self.up(x)
        return y

    def further_argument(self, x):
        return self.act(x) * self.up(x, x)

    def keyword(self, x):
        return self.act(x) * self.up(input=x)

    def of_another(self, x, other):
        return other.act(x) * self.up(x)

    def factor_of_another(self, x, other):
        return self.act(x) * other.up(x)

    def method_of_the_result(self, x):
        return self.act(x).abs() * self.up(x)

    def deeper(self, x):
        return self.act(self.norm(self.gate(x))) * self.up(x)

    def chosen(self, x):
        return self.act(x) * (self.up(x) if x is not None else self.gate(x))

    def replaced(self, x):
        if x is None:
            self = self.other
        return self.act(x) * self.up(x)

    def generator(self, x):
        yield self.act(x) * self.up(x)

    async def coroutine(self, x):
        return self.act(x) * self.up(x)

    @staticmethod
    def without_arguments():
        return None


FOUND = {
    "gated": [("act", "up")],
    "local": [("act", "up")],
    "first_of_two": [("act", "up")],
    "twice": [("act", "up"), ("act", "other")],
}
METHODS = [name for name, value in vars(Code).items() if callable(value) or isinstance(value, staticmethod)]


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="other instructions, which are not read as products")
@pytest.mark.parametrize("name", METHODS)
def test_products_in_code(name):
    code = getattr(Code, name).__code__
    found = [product_at(code, each.offset) for each in dis.get_instructions(code)]
    assert [product for product in found if product] == [Product(*names) for names in FOUND.get(name, [])]


class Gated(nn.Module):
    """A gated MLP."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(3, 5), nn.Linear(3, 5), nn.SiLU()

    def forward(self, x):
        return self.act(self.gate(x)) * self.up(x)


class OwnUp(Gated):
    """Has a class attribute with the name of a child."""

    up = None


class OwnAttributes(Gated):
    """Reads attributes in its own way."""

    def __getattr__(self, name):
        return super().__getattr__(name)


class OtherLinear(nn.Linear):
    """May compute anything."""


def changed(change, kind=Gated):
    module = kind()
    change(module)
    return module


NOT_PLAIN = {
    "class attribute": lambda: OwnUp(),
    "own attributes": lambda: OwnAttributes(),
    "instance attribute": lambda: changed(lambda m: vars(m).update(up=m.up)),
    "other linear": lambda: changed(lambda m: setattr(m, "up", OtherLinear(3, 5))),
    "no linear": lambda: changed(lambda m: setattr(m, "up", nn.Identity())),
    "hook": lambda: changed(lambda m: m.up.register_forward_hook(lambda *args: None)),
    "hook before": lambda: changed(lambda m: m.up.register_forward_pre_hook(lambda *args: None)),
    "backward hook": lambda: changed(lambda m: m.up.register_full_backward_hook(lambda *args: None)),
    "forward": lambda: changed(lambda m: setattr(m.up, "forward", m.up.forward)),
    "weight of a subclass": lambda: changed(
        lambda m: setattr(m.up, "weight", nn.Parameter(torch.ones(5, 3).as_subclass(type("Own", (torch.Tensor,), {}))))
    ),
    "compiled": lambda: changed(lambda m: m.up.compile(backend="eager")),
}


def test_plain_product():
    module = Gated()
    assert is_plain(Product("act", "up"), Gated.forward.__code__, module, module.act)
    assert not is_plain(Product("act", "up"), Gated.forward.__code__, module, nn.SiLU())
    assert not is_plain(Product("act", "up"), Code.gated.__code__, module, module.act)


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_product_that_is_not_plain(what):
    module = NOT_PLAIN[what]()
    assert not is_plain(Product("act", "up"), Gated.forward.__code__, module, module.act)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.Module, "__call__"), (nn.Linear, "forward"), (torch.nn.functional, "linear"), (nn.Linear, "__call__")],
)
def test_nothing_is_plain_while_functions_are_replaced(owner, name, monkeypatch):
    module, original = Gated(), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    assert not is_plain(Product("act", "up"), Gated.forward.__code__, module, module.act)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is new in Python 3.12")
def test_nothing_is_plain_while_calls_are_monitored():
    module, tool = Gated(), 4
    sys.monitoring.use_tool_id(tool, "test")
    try:
        assert not is_plain(Product("act", "up"), Gated.forward.__code__, module, module.act)
    finally:
        sys.monitoring.free_tool_id(tool)


@pytest.mark.parametrize("trace", [sys.settrace, sys.setprofile])
def test_nothing_is_plain_while_calls_are_traced(trace):
    module, before = Gated(), (sys.gettrace(), sys.getprofile())
    trace(lambda *args: None)
    try:
        plain = is_plain(Product("act", "up"), Gated.forward.__code__, module, module.act)
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
    assert not plain
