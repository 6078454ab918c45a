"""Networks whose code looks at classes, attributes and forwards, where a wrapper or a subclass would be noticed."""

import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import nn

from tests._helpers.networks import Reads


def behind_linear(module):
    """Return a network in which a module is between two linear layers, and an activation at the end."""
    return nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 5), nn.ReLU())


class TypeIsAsked(nn.Sequential):
    """Keep the outputs of those layers whose class is nn.ReLU, as feature extractors do."""

    def forward(self, x):
        kept = []
        for layer in self:
            x = layer(x)
            if type(layer) is nn.ReLU:
                kept.append(x)
        return torch.cat([x, *kept], 1)


class ClassIsKey(nn.Sequential):
    """Scale the output of each layer by a number that is looked up under its class."""

    scales = {nn.Linear: 0.5, nn.ReLU: 3.0}  # noqa: RUF012

    def forward(self, x):
        for layer in self:
            x = layer(x) * self.scales[layer.__class__]
        return x


class NameIsAsked(nn.Sequential):
    """Run a layer through the method that is named after its class."""

    def forward(self, x):
        for layer in self:
            x = getattr(self, f"run_{type(layer).__name__}_{len(type(layer).__mro__)}")(layer, x)
        return x

    def run_Linear_3(self, layer, x):  # noqa: N802
        return layer(x) + 1

    def run_ReLU_3(self, layer, x):  # noqa: N802
        return layer(x) * 2


class SuperOfOwnClass(nn.Sequential):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


class SuperOfType(nn.ReLU):
    def forward(self, x):
        return super(type(self), self).forward(x) + 1


class Static(nn.Module):
    @staticmethod
    def forward(x):
        return x * torch.sigmoid(x)


class OfTheClass(nn.Module):
    factor = 2.0

    @classmethod
    def forward(cls, x):
        return x * cls.factor


class StaticActivation(nn.ReLU):
    @staticmethod
    def forward(x):
        return x.clamp(min=0)


class ClassActivation(nn.GELU):
    @classmethod
    def forward(cls, x):
        return F.gelu(x) * len(cls.__mro__)


class Descriptor:
    """A descriptor that gives another function for each module."""

    def __get__(self, module, kind=None):
        return self if module is None else functools.partial(self.run, module)

    @staticmethod
    def run(module, x):
        return module.act(x) + module.shift


class DescriptorForward(nn.Module):
    forward = Descriptor()

    def __init__(self):
        super().__init__()
        self.act, self.shift = nn.GELU(), 0.5


class PropertyForward(nn.Module):
    """A forward that is chosen whenever it is looked up."""

    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    @property
    def forward(self):
        return self.act if self.training else self.evaluate

    def evaluate(self, x):
        return self.act(x) * 2


class PartialMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def scaled(self, factor, x):
        return self.act(x) * factor

    forward = functools.partialmethod(scaled, 3.0)


class BuiltinForward(nn.Module):
    forward = torch.relu  # a builtin function does not bind `self`


class Slots(nn.ReLU):
    __slots__ = ("limit",)

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        return super().forward(x).clamp(max=self.limit)


class Frozen(nn.Module):
    """A module in which nothing but the training mode may be set, once it has its parts."""

    def __init__(self):
        super().__init__()
        self.act = nn.ELU()
        vars(self)["is_frozen"] = True

    def __setattr__(self, name, value):
        if vars(self).get("is_frozen") and name != "training":
            raise AttributeError(f"{name} is frozen")
        super().__setattr__(name, value)

    def __delattr__(self, name):
        raise AttributeError(f"{name} is frozen")

    def forward(self, x):
        return self.act(x)


class Sealed(type):
    """A metaclass of classes that have no subclasses, whose attributes nobody changes, and that count their instances."""

    made = itertools.count()

    def __new__(cls, name, bases, space):
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("no subclasses")
        return super().__new__(cls, name, bases, space)

    def __call__(cls, *args):
        next(Sealed.made)
        return super().__call__(*args)

    def __setattr__(cls, name, value):
        raise AttributeError(f"{name} is sealed")


class OfSealedClass(nn.ReLU, metaclass=Sealed):
    def forward(self, x):
        return super().forward(x) * 2


class Final(nn.GELU):
    def __init_subclass__(cls):
        raise TypeError("no subclasses")


class Delegates(nn.Module):
    """A module that takes every attribute which it lacks from the module inside, private and special ones too."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Mish())

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x)


class AnyAttribute(nn.Module):
    """A module that has every attribute, so that nothing can be marked or found in it."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return lambda *args, **kwargs: None

    def forward(self, x):
        return self.act(x)


class Strict(nn.Module):
    """A module that raises where an attribute is looked up that its author has not thought of."""

    known = frozenset({"act", "forward", "training"})

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def __getattribute__(self, name):
        if name.startswith("_fast") or "entropy" in name:
            raise RuntimeError(f"{name} was looked up")
        return super().__getattribute__(name)

    def forward(self, x):
        return self.act(x)


class Falsy(nn.ReLU):
    """An activation that is false, and as long as an empty list."""

    def __len__(self):
        return 0


class OwnCall(nn.Sequential):
    """A module with a call of its own around PyTorch's."""

    def __call__(self, x):
        return super().__call__(x) * 2


class OnlyForward(nn.Sequential):
    """A module with a call of its own that knows nothing of hooks."""

    def __call__(self, x):
        return self.forward(x)


class Renamed(nn.Module):
    """A module whose `__class__` is not its type."""

    @property
    def __class__(self):
        return nn.Sequential

    def forward(self, x):
        return F.relu(x)


class CallsItself(nn.Module):
    """A module that is called within its own forward."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.ReLU()

    def forward(self, x, depth=0):
        return self(x, depth + 1) if depth < 2 else self.act(self.fc(x))


class Yields(nn.Module):
    """A forward that is a generator, so that its activations run after the call has returned."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 6), nn.GELU()

    def forward(self, x):
        for part in x.split(2):
            yield self.act(self.fc(part))


class InThreads(nn.Module):
    """A forward that runs its branches in threads of their own."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), kind()) for kind in (nn.ReLU, nn.GELU, nn.SiLU))

    def forward(self, x):
        grad = torch.is_grad_enabled()

        def run(branch):
            with torch.set_grad_enabled(grad):
                return branch(x)

        with ThreadPoolExecutor(3) as pool:
            return torch.cat(list(pool.map(run, self.branches)), 1)


def with_partial():
    """Return an activation whose forward is a functools.partial in the instance."""
    module = nn.ReLU()
    module.forward = functools.partial(F.leaky_relu, negative_slope=0.5)
    return module


def with_callable_object():
    """Return a network of which a part has a forward in the instance that is an object, and no function."""

    class Twice:
        def __init__(self, module):
            self.module = module

        def __call__(self, x):
            return self.module(x) * 2

    part = Reads(None, act=nn.Softplus())
    part.forward = Twice(part.act)
    return part


def with_bound_method_of_another():
    """Return a module whose forward is the method of another module."""
    other, part = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Module()
    part.other = other
    part.forward = other.forward
    return part


def small(*kinds):
    """Return two linear layers with activations in between, as a container of one of the kinds above."""
    (kind,) = kinds
    return kind(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))


#: For each name a function that builds the network, for inputs [rows, 4], and how many values each site counts per row.
UNUSUAL = {
    "type(layer) is nn.ReLU": (lambda: small(TypeIsAsked), {"1": 6}),
    "classes as keys": (lambda: small(ClassIsKey), {"1": 6}),
    "methods by class name": (lambda: small(NameIsAsked), {"1": 6}),
    "super(self.__class__, self)": (lambda: small(SuperOfOwnClass), {"1": 6}),
    "super(type(self), self)": (lambda: behind_linear(SuperOfType()), {"1": 6, "3": 5}),
    "static forward": (lambda: behind_linear(Static()), {"3": 5}),
    "classmethod": (lambda: behind_linear(OfTheClass()), {"3": 5}),
    "static activation": (lambda: behind_linear(StaticActivation()), {"1": 6, "3": 5}),
    "activation by classmethod": (lambda: behind_linear(ClassActivation()), {"1": 6, "3": 5}),
    "descriptor": (lambda: behind_linear(DescriptorForward()), {"1.act": 6, "3": 5}),
    "property": (lambda: behind_linear(PropertyForward()), {"1.act": 6, "3": 5}),
    "partialmethod": (lambda: behind_linear(PartialMethod()), {"1.act": 6, "3": 5}),
    "builtin function": (lambda: behind_linear(BuiltinForward()), {"1.relu": 6, "3": 5}),
    "partial in the instance": (lambda: behind_linear(with_partial()), {"1": 6, "3": 5}),
    "object in the instance": (lambda: behind_linear(with_callable_object()), {"1.act": 6, "3": 5}),
    "method of another module": (lambda: behind_linear(with_bound_method_of_another()), {"1.other.1": 6, "3": 5}),
    "slots": (lambda: behind_linear(Slots(0.25)), {"1": 6, "3": 5}),
    "frozen attributes": (lambda: behind_linear(Frozen()), {"1.act": 6, "3": 5}),
    "sealed by a metaclass": (lambda: behind_linear(OfSealedClass()), {"1": 6, "3": 5}),
    "__init_subclass__": (lambda: behind_linear(Final()), {"1": 6, "3": 5}),
    "delegated attributes": (lambda: behind_linear(Delegates()), {"1.inner.1": 6, "3": 5}),
    "every attribute": (lambda: behind_linear(AnyAttribute()), {"1.act": 6, "3": 5}),
    "no attribute of ours": (lambda: behind_linear(Strict()), {"1.act": 6, "3": 5}),
    "falsy": (lambda: behind_linear(Falsy()), {"1": 6, "3": 5}),
    "call of its own": (lambda: small(OwnCall), {"1": 6}),
    "call without hooks": (lambda: small(OnlyForward), {"1": 6}),
    "another __class__": (lambda: behind_linear(Renamed()), {"1.relu": 6, "3": 5}),
    "module within itself": (lambda: behind_linear(CallsItself()), {"1.act": 6, "3": 5}),
    "generator": (lambda: Yields(), {"act": 6}),
    "threads": (
        lambda: behind_linear(nn.Sequential(nn.Linear(6, 4), InThreads(), nn.Linear(18, 6))),
        {
            "1.1.branches.0.1": 6,
            "1.1.branches.1.1": 6,
            "1.1.branches.2.1": 6,
            "3": 5,
        },
    ),
}
