import ast
import contextlib
import functools
import inspect
import linecache
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastentropy.surgery.rewriting import Arguments, CannotBeRewrittenError, MethodRewriter, Place

FACTOR = 2.0  # a global that methods read


def doubled(function):
    """A decorator that changes what a method returns."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return wrapper


class Base(nn.Module):
    """What the methods below may call; `new` is the module that takes the place of an activation."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.new = nn.Linear(3, 3), nn.ReLU(), nn.Tanh()
        self.function = F.relu


class Plain(Base):
    def forward(self, x):
        return F.relu(x)


def code_of(module, name="forward"):
    return inspect.unwrap(getattr(type(module), name)).__code__


def rewriter_of(module, name="forward"):
    return MethodRewriter(module, code_of(module, name))


def calls_of(rewriter, *functions):
    """The calls of a method whose function is written so, in the order of the file."""
    calls = [node for node in ast.walk(rewriter._definition) if isinstance(node, ast.Call)]
    calls = [node for node in calls if ast.unparse(node.func) in functions]
    return sorted(calls, key=lambda node: (node.lineno, node.col_offset))


def rewritten(module, call="F.relu", name="forward"):
    """The method with one call replaced by one of `new`."""
    rewriter = rewriter_of(module, name)
    (node,) = calls_of(rewriter, call)
    rewriter.replace(node, "new", rewriter.arguments(node).input)
    return rewriter.compile()


def observed_places(module, *inputs):
    """The places in a method from which F.relu is called."""
    places, code = [], code_of(module)

    def note(frame, event, argument):
        if event == "call" and frame.f_code is F.relu.__code__ and frame.f_back.f_code is code:
            places.append(Place.of(frame.f_back))

    sys.setprofile(note)
    try:
        module.forward(*inputs)
    finally:
        sys.setprofile(None)
    return places


# ---- Place and find


class Places(Base):
    def forward(self, x):
        x = F.relu(x)
        x = F.relu(F.relu(x) + F.relu(-x))
        x = F.relu(
            F.relu(
                x,
            )
        )
        é = "ßß", F.relu(x)
        return [é[1], F.relu(x)][1 if F.relu(x).sum() > 0 else 0]


def test_each_call_is_found_where_it_ran():
    module = Places()
    rewriter = rewriter_of(module)
    found = [rewriter.find(place) for place in observed_places(module, torch.ones(3))]
    assert len({id(node) for node in found}) == len(found) == 9
    assert set(map(id, found)) == set(map(id, calls_of(rewriter, "F.relu")))


def test_calls_on_one_line_are_told_apart():
    class OneLine(Base):
        def forward(self, x):
            return F.relu(x - 1) + F.relu(x)

    module = OneLine()
    rewriter = rewriter_of(module)
    assert [ast.unparse(rewriter.find(place)) for place in observed_places(module, torch.ones(3))] == [
        "F.relu(x - 1)",
        "F.relu(x)",
    ]


def test_a_call_in_code_without_source_has_no_place():
    module = from_text("class Text(Base):\n    def forward(self, x):\n        return F.relu(x)\n")
    assert observed_places(module, torch.ones(3)) == [None]


def test_a_call_in_a_rewritten_assertion_is_exact_or_unknown():
    class Asserting(Base):
        def forward(self, x):
            assert F.relu(x + 1).sum() >= 0
            return F.relu(x)

    module = Asserting()
    rewriter = rewriter_of(module)
    asserted, returned = observed_places(module, torch.ones(3))
    assert asserted is None or ast.unparse(rewriter.find(asserted)) == "F.relu(x + 1)"
    assert ast.unparse(rewriter.find(returned)) == "F.relu(x)"


@pytest.mark.parametrize("place", [None, Place(10**6, 10**6, 0, 5), Place(1, 1, 0, 5)])
def test_a_place_without_a_call_is_refused(place):
    with pytest.raises(CannotBeRewrittenError):
        rewriter_of(Plain()).find(place)


# ---- arguments


def global_function(x):
    return x


class Forms(Base):
    """One call in each method, of x and at most one further argument."""

    shared = staticmethod(F.relu)

    def function(self, x):
        return F.leaky_relu(x, 0.2)

    def by_name(self, x):
        return F.leaky_relu(negative_slope=0.2, input=x)

    def mixed(self, x):
        return F.leaky_relu(x, negative_slope=0.2)

    def module(self, x):
        return self.act(x)

    def nested_module(self, x):
        return torch.nn.functional.relu(x)

    def method(self, x):
        return x.relu()

    def method_of_a_result(self, x):
        return self.fc(x).relu()

    def own(self, x):
        return self.function_attribute(x)

    def of_the_class(self, x):
        return self.shared(x)

    def of_the_module(self, x):
        return global_function(x)

    def unbound(self, x):
        return Tensor.relu(x)

    function_attribute = None


@pytest.mark.parametrize(
    ("name", "call", "given", "constants"),
    [
        ("function", "F.leaky_relu", "x", ([0.2], {})),
        ("by_name", "F.leaky_relu", "x", ([], {"negative_slope": 0.2})),
        ("mixed", "F.leaky_relu", "x", ([], {"negative_slope": 0.2})),
        ("module", "self.act", "x", ([], {})),
        ("nested_module", "torch.nn.functional.relu", "x", ([], {})),
        ("method", "x.relu", "x", ([], {})),
        ("method_of_a_result", "self.fc(x).relu", "self.fc(x)", ([], {})),
        ("of_the_class", "self.shared", "x", ([], {})),
        ("of_the_module", "global_function", "x", ([], {})),
        ("unbound", "Tensor.relu", "x", ([], {})),
    ],
)
def test_input_and_constants_of_a_call(name, call, given, constants):
    rewriter = rewriter_of(Forms(), name)
    (node,) = calls_of(rewriter, call)
    arguments = rewriter.arguments(node)
    assert ast.unparse(arguments.input) == given
    assert arguments.constants() == constants


class Starred(Base):
    def starred(self, x):
        return F.relu(*(x,))

    def two_starred(self, x):
        return F.relu(**{"input": x})

    def starred_behind(self, x):
        return F.leaky_relu(x, *(0.2,))

    def two_starred_behind(self, x):
        return F.leaky_relu(x, **{"negative_slope": 0.2})

    def no_arguments(self, x):
        return F.relu()

    def other_name(self, x):
        return F.relu(inplace=True)


@pytest.mark.parametrize(
    "name", ["starred", "two_starred", "starred_behind", "two_starred_behind", "no_arguments", "other_name"]
)
def test_a_call_whose_input_is_not_written_down_is_refused(name):
    rewriter = rewriter_of(Starred(), name)
    (node,) = calls_of(rewriter, "F.relu", "F.leaky_relu")
    with pytest.raises(CannotBeRewrittenError):
        rewriter.arguments(node)


def arguments_of(call):
    node = ast.parse(call, mode="eval").body
    return Arguments(node.args[0], node.args[1:], node.keywords)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("f(x)", ([], {})),
        ("f(x, 0.2, True)", ([0.2, True], {})),
        ("f(x, -0.5, beta=+2, approximate='tanh')", ([-0.5], {"beta": 2, "approximate": "tanh"})),
        ("f(x, None, size=(1, 2))", ([None], {"size": (1, 2)})),
    ],
)
def test_constants_are_what_python_would_pass(call, expected):
    assert arguments_of(call).constants() == expected


@pytest.mark.parametrize("call", ["f(x, y)", "f(x, self.slope)", "f(x, slope=SLOPE)", "f(x, 1 / 3)", "f(x, float('inf'))"])
def test_what_is_not_constant_is_refused(call):
    with pytest.raises(CannotBeRewrittenError):
        arguments_of(call).constants()


# ---- own_function


class Own(Base):
    shared = staticmethod(F.relu)

    def forward(self, x):
        return self.function(x) + self.shared(x) + self.act(x) + F.relu(x)


@pytest.mark.parametrize(
    ("call", "expected"), [("self.function", "function"), ("self.shared", None), ("self.act", None), ("F.relu", None)]
)
def test_a_function_that_the_module_itself_holds(call, expected):
    rewriter = rewriter_of(Own())
    (node,) = calls_of(rewriter, call)
    assert rewriter.own_function(node) == expected


# ---- compile


class Signature(Base):
    def forward(self, x: Tensor, scale: float = 2.0, *rest: int, shift: "float" = 1.0, flag: bool, **options: str) -> Tensor:
        """Says what it does."""
        return F.relu(x) * scale + shift


def test_nothing_of_the_signature_is_lost():
    method, original = rewritten(Signature()), Signature.forward
    assert inspect.signature(method) == inspect.signature(original)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__", "__annotations__"):
        assert getattr(method, name) == getattr(original, name), name
    assert method.__globals__ is original.__globals__


def test_defaults_are_the_same_objects():
    default = [1.0]

    class Mutable(Base):
        def forward(self, x, scale=default, *, shift=default):
            return F.relu(x)

    method = rewritten(Mutable())
    assert method.__defaults__[0] is method.__kwdefaults__["shift"] is default


def test_attributes_of_a_function_are_kept():
    class Marked(Base):
        def forward(self, x):
            return F.relu(x)

        forward.mark = "kept"

    assert rewritten(Marked()).mark == "kept"


def test_the_call_is_replaced_and_nothing_else():
    class Several(Base):
        def forward(self, x):
            y = F.relu(x)
            z = F.leaky_relu(y - 0.5, 0.1)
            return self.act(z) + y

    module, x = Several(), torch.randn(7, 3)
    y = torch.tanh(x)
    expected = F.relu(F.leaky_relu(y - 0.5, 0.1)) + y
    assert torch.equal(rewritten(module)(module, x), expected)


def test_the_class_of_the_module_is_unchanged():
    module, original, x = Plain(), Plain.forward, torch.randn(7, 3)
    rewritten(module)
    assert Plain.forward is original
    assert torch.equal(module(x), F.relu(x))


def test_a_rewriter_knows_whether_it_changed_something():
    rewriter = rewriter_of(Plain())
    assert not rewriter.changed
    (node,) = calls_of(rewriter, "F.relu")
    rewriter.replace(node, "new", rewriter.arguments(node).input)
    assert rewriter.changed


def test_a_global_that_changes_later_is_followed(monkeypatch):
    class Scaled(Base):
        def forward(self, x):
            return F.relu(x) * FACTOR

    module, x = Scaled(), torch.randn(7, 3)
    method = rewritten(module)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    assert torch.equal(method(module, x), torch.tanh(x) * 5)


def test_no_global_is_left_behind():
    before = set(globals())
    rewritten(Plain())
    assert set(globals()) == before


def test_values_of_a_closure():
    first, second = 2.0, torch.ones(3)

    class Closure(Base):
        def forward(self, x):
            return F.relu(x) * first + second

    module, x = Closure(), torch.randn(7, 3)
    assert torch.equal(rewritten(module)(module, x), torch.tanh(x) * 2 + 1)


def test_a_closure_that_changes_later_is_followed():
    factor = 2.0

    class Closure(Base):
        def forward(self, x):
            return F.relu(x) * factor

    module, x = Closure(), torch.randn(7, 3)
    method = rewritten(module)
    factor = 5.0
    assert torch.equal(method(module, x), torch.tanh(x) * 5)


def test_a_nonlocal_name_is_written_to():
    calls = 0

    class Counting(Base):
        def forward(self, x):
            nonlocal calls
            calls += 1
            return F.relu(x)

    module = Counting()
    rewritten(module)(module, torch.ones(3))
    assert calls == 1


def test_a_closure_without_a_value_yet_is_refused_or_followed():
    class Early(Base):
        def forward(self, x):
            return F.relu(x) * late

    module, method = Early(), None
    with contextlib.suppress(CannotBeRewrittenError):
        method = rewritten(module)
    late = 2.0
    assert method is None or torch.equal(method(module, torch.ones(3)), torch.ones(3).tanh() * late)


def test_super_without_arguments():
    class Parent(Base):
        def forward(self, x):
            return x + 1

    class Child(Parent):
        def forward(self, x):
            return F.relu(super().forward(x))

    module, x = Child(), torch.randn(7, 3)
    assert torch.equal(rewritten(module)(module, x), torch.tanh(x + 1))


def test_a_decorator_is_applied():
    class Decorated(Base):
        @doubled
        @torch.no_grad()
        def forward(self, x, scale=3.0):
            return F.relu(x) * scale

    module, x = Decorated(), torch.randn(7, 3, requires_grad=True)
    method = rewritten(module)
    y = method(module, x)
    assert torch.equal(y, torch.tanh(x.detach()) * 3 * 2)
    assert not y.requires_grad
    assert (method.__name__, method.__qualname__) == (Decorated.forward.__name__, Decorated.forward.__qualname__)


def test_a_decorator_of_a_closure_is_applied_or_refused():
    def plus(number):
        def decorator(function):
            @functools.wraps(function)
            def wrapper(*args):
                return function(*args) + number

            return wrapper

        return decorator

    class Decorated(Base):
        @plus(3)
        def forward(self, x):
            return F.relu(x)

    module, x = Decorated(), torch.randn(7, 3)
    try:
        method = rewritten(module)
    except CannotBeRewrittenError:
        return
    assert torch.equal(method(module, x), torch.tanh(x) + 3)


@pytest.mark.parametrize("name", ["before", "after", "only"])
def test_self_by_position_only(name):
    class PositionalOnly(Base):
        def before(self, x, /):
            return F.relu(x)

        def after(self, /, x):
            return F.relu(x)

        def only(this, x, /, y=1.0):  # noqa: N805
            return F.relu(x)

    module, x = PositionalOnly(), torch.randn(7, 3)
    method = rewritten(module, name=name)
    assert torch.equal(method(module, x), torch.tanh(x))
    assert inspect.signature(method) == inspect.signature(getattr(PositionalOnly, name))


def test_self_by_another_name():
    class Renamed(Base):
        def forward(module, x):  # noqa: N805
            return F.relu(x)

    module, x = Renamed(), torch.randn(7, 3)
    assert torch.equal(rewritten(module)(module, x), torch.tanh(x))


class Failing(Base):
    def forward(self, x):
        """One
        two
        """
        x = F.relu(x)

        # a comment
        raise ValueError(
            "told",
        )


def test_line_numbers_in_tracebacks():
    module = Failing()
    method = rewritten(module)
    places = []
    for function in (Failing.forward, method):
        with pytest.raises(ValueError, match="told") as caught:
            function(module, torch.ones(3))
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        places.append((frame.filename, frame.lineno, frame.name, frame.line))
    assert places[0] == places[1]
    assert places[0][3] == "raise ValueError("


def test_line_numbers_behind_decorators():
    class Decorated(Base):
        @doubled
        @functools.cache  # noqa: B019
        def forward(self, x):
            return F.relu(x)

    original, method = (inspect.unwrap(each).__code__ for each in (Decorated.forward, rewritten(Decorated())))
    assert (method.co_filename, method.co_firstlineno) == (original.co_filename, original.co_firstlineno)
    assert {line for *_, line in method.co_lines() if line} == {line for *_, line in original.co_lines() if line}


def test_texts_without_indentation():
    class Ugly(Base):
        def forward(self, x):
            # a comment
            text = """
  a
b"""
            return F.relu(x) * len(text)

    module, x = Ugly(), torch.randn(7, 3)
    assert torch.equal(rewritten(module)(module, x), torch.tanh(x) * 6)


def test_lambdas_and_functions_inside_of_a_method():
    class Inner(Base):
        def forward(self, x):
            def add(y, amount=1.0):
                return self.fc(y) + amount

            return (lambda y: add(y))(F.relu(x))

    module, x = Inner(), torch.randn(7, 3)
    assert torch.equal(rewritten(module)(module, x), module.fc(torch.tanh(x)) + 1)


def test_a_method_of_an_ancestor_is_found_under_its_name():
    class Child(Plain):
        pass

    assert rewriter_of(Child()).names == ["forward"]


# ---- what cannot be rewritten


def from_text(text, filename="<text>"):
    namespace = {"Base": Base, "F": F, "torch": torch, "__name__": __name__}
    exec(compile(text, filename, "exec"), namespace)
    return namespace["Text"]()


def test_code_without_source_is_refused():
    with pytest.raises(CannotBeRewrittenError):
        rewriter_of(from_text("class Text(Base):\n    def forward(self, x):\n        return F.relu(x)\n"))


def test_source_that_is_no_longer_python_is_refused(monkeypatch):
    name = "<fastentropy test>"
    module = from_text("class Text(Base):\n    def forward(self, x):\n        return F.relu(x)\n", name)
    lines = ["class Text(Base):\n", "    def forward(self, x:\n", "        return (\n"]
    monkeypatch.setitem(linecache.cache, name, (1, None, lines, name))
    with pytest.raises(CannotBeRewrittenError):
        rewriter_of(module)


def test_code_of_another_class_is_refused():
    with pytest.raises(CannotBeRewrittenError):
        MethodRewriter(Plain(), Places.forward.__code__)


def test_code_that_another_method_of_that_name_hides_is_refused():
    class Child(Plain):
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(CannotBeRewrittenError):
        MethodRewriter(Child(), Plain.forward.__code__)


def test_lambdas_are_refused():
    class Lambda(Base):
        forward = lambda self, x: F.relu(x)  # noqa: E731

    with pytest.raises(CannotBeRewrittenError):
        rewriter_of(Lambda())


@pytest.mark.parametrize("kind", [staticmethod, classmethod, property])
def test_what_is_no_method_of_an_object_is_refused(kind):
    def function(x):
        return F.relu(x)

    body = type("Other", (Base,), {"helper": kind(function)})
    with pytest.raises(CannotBeRewrittenError):
        MethodRewriter(body(), function.__code__)


class Mangled(Base):
    def attribute(self, x):
        self.__hidden = 1
        return F.relu(x)

    def local(self, x):
        __hidden = 1
        return F.relu(x) * __hidden

    def read(self, x):
        return F.relu(x) * self.__slope

    def argument(self, x, *, __scale=2.0):
        return F.relu(x)

    def called(self, x):
        return self.argument(F.relu(x), __scale=3.0)

    __slope = 2.0


@pytest.mark.parametrize("name", ["attribute", "local", "read", "argument", "called"])
def test_mangled_names_are_refused_or_right(name):
    module, x = Mangled(), torch.randn(7, 3)
    try:
        method = rewritten(module, name=name)
    except CannotBeRewrittenError:
        return
    assert inspect.signature(method) == inspect.signature(getattr(Mangled, name))
    method(module, x)


def test_names_between_two_underscores_are_not_mangled():
    class Dunder(Base):
        def forward(self, x):
            return F.relu(x) * len(self.__class__.__name__)

    module, x = Dunder(), torch.randn(7, 3)
    assert torch.equal(rewritten(module)(module, x), torch.tanh(x) * 6)


def test_a_decorator_that_raises_is_refused():
    times = []

    def once(function):
        times.append(function)
        if len(times) > 1:
            raise ValueError
        return functools.wraps(function)(lambda self, x: function(self, x))

    class Decorated(Base):
        @once
        def forward(self, x):
            return F.relu(x)

    with pytest.raises(CannotBeRewrittenError):
        rewritten(Decorated())
