"""Bind the inputs of a call to the inputs with which a model was traced, as Python binds arguments to parameters."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from fastentropy._compat import tree_leaves, tree_node, tree_unflatten
from fastentropy._utils.text import plural
from fastentropy.fusion.inputs import is_same
from fastentropy.fusion.traced_inputs import TracedInputs

#: The types of a default value that a file can hold.
_PLAIN = (type(None), bool, int, float, str)


#: The types of mappings and sequences in the structure of a trace. It has the function `namedtuple` for named tuples.
_MAPPINGS: tuple[Any, ...] = (dict, OrderedDict, defaultdict)
_SEQUENCES: tuple[Any, ...] = (tuple, list, namedtuple)


class Signature(NamedTuple):
    """The parameters of the forward of a model, as far as they tell which calls give it the same inputs.

    Attributes:
        positional: the names of the parameters that positional inputs belong to, in order; "" for one that has no name.
        defaults: the default values by name of the parameter, if they are numbers, strings, booleans or None.
    """

    positional: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = {}

    @classmethod
    def of(cls, model: nn.Module) -> Signature:
        """Return the signature of a model. It is empty if the model does not tell its parameters."""
        try:
            parameters = inspect.signature(model.forward).parameters.values()
        except (TypeError, ValueError):  # a forward without a signature, written in C
            return cls()
        named = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        positional = tuple("" if each.kind is each.POSITIONAL_ONLY else each.name for each in named)
        return cls(positional, {each.name: each.default for each in parameters if type(each.default) in _PLAIN})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as values of JSON types."""
        return {"positional": list(self.positional), "defaults": dict(self.defaults)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Signature:
        """Make a signature from the dict that `to_dict` returned, after it was written to JSON and read."""
        defaults = {str(name): value for name, value in dict(values["defaults"]).items() if type(value) in _PLAIN}
        return cls(tuple(map(str, values["positional"])), defaults)

    def key(self, index: int) -> str | int:
        """Return the name of the parameter of a positional input, or its index if it has no name."""
        return (self.positional[index] if index < len(self.positional) else "") or index


class Binding:
    """The inputs with which a model was traced, and the parameters of the model."""

    def __init__(self, inputs: TracedInputs, signature: Signature) -> None:
        """Take over the inputs of a trace.

        Args:
            inputs: the inputs.
            signature: the signature of the model that was traced.
        """
        _, _, (args, kwargs) = tree_node(inputs.structure)
        _, names, keywords = tree_node(kwargs)
        self.signature = signature
        self._args, self._kwargs = tree_node(args)[2], dict(zip(names or (), keywords, strict=True))
        self._specs: dict[str | int, Any] = {signature.key(index): spec for index, spec in enumerate(self._args)}
        self._specs |= self._kwargs
        self._is_flat = all(tree_node(spec)[0] is None for spec in self._specs.values())
        leaves = iter(inputs.values)
        traced = {key: [next(leaves) for _ in range(spec.num_leaves)] for key, spec in self._specs.items()}
        self._constants = {key: values[0] for key, values in traced.items() if tree_node(self._specs[key])[0] is None}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """Return the arguments of a call in the form in which the model was traced, and all their values in flat order.

        Args:
            args: the positional arguments of the call.
            kwargs: its keyword arguments.

        Raises:
            ValueError: the call gives other inputs.
        """
        if len(args) != len(self._args) or len(kwargs) != len(self._kwargs) or any(name not in self._kwargs for name in kwargs):
            args, kwargs = self._rearranged(args, kwargs)
        if self._is_flat:
            return args, kwargs, [*args, *(kwargs[name] for name in self._kwargs)]
        leaves: list[Any] = []
        given = [*args, *(kwargs[name] for name in self._kwargs)]
        for index, (key, spec) in enumerate(self._specs.items()):
            found = _leaves(spec, given[index], f"input {key!r}")
            leaves += found
            if _is_plain(spec):  # the graph takes mappings and sequences only of the classes that the trace had
                given[index] = tree_unflatten(found, spec)
        return tuple(given[: len(args)]), dict(zip(self._kwargs, given[len(args) :], strict=True)), leaves

    def _rearranged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with positional ones by keyword, or the reverse, as in the trace.

        An argument may be left out or given if it equals its default.
        """
        given: dict[str | int, Any] = {self.signature.key(index): value for index, value in enumerate(args)}
        if twice := [name for name in kwargs if name in given]:
            raise ValueError(f"the input {twice[0]!r} is given twice, by its position and by its name")
        given.update(kwargs)
        missing = [key for key in self._specs if key not in given and not self._is_default(key, self._constants.get(key, self))]
        other = [key for key, value in given.items() if key not in self._specs and not self._is_default(key, value)]
        if missing or other:
            raise ValueError(self._refusal(len(args), kwargs, missing, other))
        given = {key: given[key] if key in given else self._constants[key] for key in self._specs}
        return tuple(given.values())[: len(self._args)], {name: given[name] for name in self._kwargs}

    def _is_default(self, key: str | int, value: Any) -> bool:
        """Return whether a value is the default of the parameter with this name."""
        return key in self.signature.defaults and is_same(value, self.signature.defaults[str(key)])

    def _refusal(self, count: int, kwargs: Mapping[str, Any], missing: list[str | int], other: list[str | int]) -> str:
        """Return the error message for a call with other inputs.

        Args:
            count: the number of positional inputs.
            kwargs: the keyword inputs.
            missing: the inputs of the trace that the call does not give.
            other: the inputs of the call that the trace does not have.
        """
        if not kwargs and not self._kwargs:
            return f"this model was fused for {plural(len(self._args), 'input')}, but is called with {count}"
        wrong = [f"{_listed(missing)} missing"] * bool(missing) + [f"{_listed(other)} not among them"] * bool(other)
        names = ", ".join(map(_name, self._specs))
        return f"this model was fused for the inputs {names}: {' and '.join(wrong)}; fuse it again for other inputs"


def _name(key: str | int) -> str:
    """Return what an error message calls an input: its name, or its position, which is counted from 0."""
    return key if isinstance(key, str) else f"[{key}]"


def _listed(keys: list[str | int]) -> str:
    """Return names of inputs, followed by "is" or "are"."""
    return f"{', '.join(map(_name, keys))} {'is' if len(keys) == 1 else 'are'}"


def _is_plain(spec: Any) -> bool:
    """Return whether an input is nested and consists of mappings and sequences of Python, not of objects of other classes."""
    kind, _, parts = tree_node(spec)
    return kind in (*_MAPPINGS, *_SEQUENCES) and all(tree_node(part)[0] is None or _is_plain(part) for part in parts)


def _leaves(spec: Any, value: Any, name: str) -> list[Any]:
    """Return the values in a nested input, in the order of the trace.

    Args:
        spec: the structure of the input in the trace.
        value: the input in the call.
        name: its name, for the message.

    Raises:
        ValueError: the input has another structure.
    """
    kind, keys, parts = tree_node(spec)
    if kind is None:
        return [value]
    if kind in _MAPPINGS and isinstance(value, Mapping):
        keys = keys[1] if kind is defaultdict else keys
        if len(value) != len(keys) or any(key not in value for key in keys):
            given = ", ".join(map(str, value))
            raise ValueError(f"the {name} has the keys {given}, but this model was fused for {', '.join(map(str, keys))}")
        return [leaf for key, part in zip(keys, parts, strict=True) for leaf in _leaves(part, value[key], f"{name}[{key!r}]")]
    if kind in _SEQUENCES and isinstance(value, tuple | list) and len(value) == len(parts):
        pairs = enumerate(zip(parts, value, strict=True))
        return [leaf for index, (part, each) in pairs for leaf in _leaves(part, each, f"{name}[{index}]")]
    leaves = tree_leaves(value)
    if len(leaves) != spec.num_leaves:
        raise ValueError(f"the {name} holds {plural(len(leaves), 'value')}, but this model was fused for {spec.num_leaves}")
    return leaves
