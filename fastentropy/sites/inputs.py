"""Check the model and the example inputs that a function was given."""

import contextlib
import inspect
import numbers
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph

from fastentropy._compat import operator_schema, tree_leaves
from fastentropy._utils.errors import one_line
from fastentropy._utils.text import plural
from fastentropy.sites.site import Site

#: The inputs of one call of a model as a user gives them: the positional ones, or a mapping of the keyword inputs.
ExampleInputs: TypeAlias = "tuple[Any, ...] | list[Any] | Mapping[str, Any]"


def check_model(model: object) -> None:
    """Raise TypeError if `model` is not a module. The message says what it is and what to pass instead."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {described(model)}, expected {_instead_of(model)}")


def check_inputs(example_inputs: object, call: str) -> tuple[Any, ...] | dict[str, Any]:
    """Return example inputs as a tuple of positional inputs or a dict of keyword inputs.

    Args:
        example_inputs: a tuple, a named tuple or a list of positional inputs, or a mapping of keyword inputs, such as a
            `transformers.BatchEncoding`.
        call: the call that is shown in the error message, with {} in place of the inputs: "fe.fuse(model, {})".

    Raises:
        TypeError: they are of another kind, or a key of the mapping is not a string.
    """
    if isinstance(example_inputs, Mapping):
        if others := [key for key in example_inputs if not isinstance(key, str)]:
            raise TypeError(
                f"example_inputs: got a mapping with the key {others[0]!r}, expected the names of the model's inputs as keys; "
                f"a mapping that is itself an input: {call.format('(inputs,)')}"
            )
        return dict(example_inputs)
    if isinstance(example_inputs, tuple | list) and not isinstance(example_inputs, torch.Size):
        return tuple(example_inputs)
    mended = call.format("(x,)")
    if isinstance(example_inputs, Tensor):
        raise TypeError(f"example_inputs: got {described(example_inputs)}, expected a tuple of the model's inputs: {mended}")
    if isinstance(example_inputs, torch.Size):
        mended = call.format(f"(torch.randn({list(example_inputs)}),)")
    elif isinstance(example_inputs, Iterable) and not isinstance(example_inputs, str | bytes) and not _is_array(example_inputs):
        mended = f"take one batch, x = next(iter(…)), then {mended}"
    expected = "a tuple of the model's inputs, or a mapping of them by name"
    raise TypeError(f"example_inputs: got {described(example_inputs)}, expected {expected}: {mended}")


def site_names(names: Iterable[str], argument: str) -> tuple[str, ...]:
    """Return names of sites (calls of activations) that were given as an argument with the name `argument`.

    Raises:
        ValueError: a single string was given.
        TypeError: something other than strings was given.
    """
    if isinstance(names, str):
        raise ValueError(f"{argument} must be a list of site names, not the string {names!r}: [{names!r}]")
    if not isinstance(names, Iterable):
        raise TypeError(f"{argument}: got {described(names)}, expected a list of site names")
    names = tuple(names)
    if others := [name for name in names if not isinstance(name, str)]:
        mended = ": [site.name for site in sites]" if isinstance(others[0], Site) else ""
        raise TypeError(f"{argument}: got {described(others[0])}, expected a list of site names{mended}")
    return names


def check_function(function: object, argument: str, use: str) -> None:
    """Raise TypeError if an argument is not a function (or another callable).

    Args:
        function: the argument.
        argument: its name.
        use: how it is called, such as "train(model)".
    """
    if isinstance(function, type) or not callable(function):
        raise TypeError(f"{argument}: got {described(function)}, expected a function that is called as {use}")


@contextlib.contextmanager
def explained(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Iterator[None]:
    """Turn an error inside the block into a TypeError that names the parameters of the model, if it takes other inputs.

    This is not checked before the call, because a hook may turn inputs that the forward does not take into others.

    Args:
        model: the model that is called in the block.
        inputs: the positional inputs, or a mapping of the keyword inputs.
    """
    try:
        yield
    except (AttributeError, TypeError) as error:
        if text := misfit(model, *split_inputs(inputs), error):
            raise TypeError(f"example_inputs: {text}") from error
        raise


def split_inputs(inputs: tuple[Any, ...] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments of a call with these inputs."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})


def misfit(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    """Return how the inputs of a call that failed differ from what the model takes, or "" if that is not the reason.

    Args:
        model: the model.
        args: the positional inputs.
        kwargs: the keyword inputs.
        error: the error of the call.
    """
    if isinstance(error, TypeError) and (text := _other_parameters(model, args, kwargs)):
        return text
    leaves = tree_leaves((args, kwargs))
    if leaves and isinstance(error, AttributeError | TypeError) and not any(isinstance(leaf, Tensor) for leaf in leaves):
        return f"got no tensor ({one_line(error)}); a tokenizer returns tensors with return_tensors='pt'"
    return ""


def is_exported(module: nn.Module) -> bool:
    """Return whether a module is a graph of ATen operators, such as `torch.export` makes."""
    graph = getattr(module, "graph", None)
    return isinstance(graph, Graph) and any(operator_schema(node.target) is not None for node in graph.nodes)


def described(value: object) -> str:
    """Return what an error message says of a value of the wrong kind."""
    if value is None or isinstance(value, numbers.Number):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, str):
        return f"the string {value!r}" if len(value) <= 40 else f"the string {value[:40] + '…'!r}"
    if isinstance(value, torch.Size):
        return f"the shape {list(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, PathLike):
        return f"the path {str(value)!r}"
    if _is_array(value):
        return f"an array of shape {list(getattr(value, 'shape', ()))}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"


def _other_parameters(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Return the reason why the forward of a model does not take inputs, or "" if it does or its parameters are unknown."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward without a signature, written in C
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = f"the keywords {', '.join(kwargs)}" if kwargs else plural(len(args), "positional input")
        taken = ", ".join(map(_parameter, signature.parameters.values()))
        text = f"got {given}, but {type(model).__name__} takes ({taken}): {error}"
        single = [each for each in signature.parameters.values() if each.kind not in (each.VAR_KEYWORD, each.KEYWORD_ONLY)]
        is_own_input = kwargs and not args and len(single) == 1
        return f"{text}; pass a mapping that is itself an input as (inputs,)" if is_own_input else text
    return ""


def _parameter(parameter: inspect.Parameter) -> str:
    """Return the name of a parameter, with stars as in a signature, and "=…" if it has a default."""
    stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    return f"{stars}{parameter.name}{'' if parameter.default is parameter.empty else '=…'}"


def _is_array(value: object) -> bool:
    """Return whether a value is an array of NumPy or of a similar library."""
    return hasattr(value, "__array__") or hasattr(value, "__array_interface__")


def _instead_of(value: object) -> str:
    """Return what is to be passed instead of a value that is not a module."""
    if isinstance(value, type):
        return f"a module: {value.__name__}(…)" if issubclass(value, nn.Module) else "a torch.nn.Module"
    if isinstance(value, ExportedProgram):
        return "the torch.nn.Module that was exported"
    if isinstance(value, str | PathLike):
        return "a torch.nn.Module: load the model first"
    if isinstance(value, Mapping):
        return "a torch.nn.Module: build the model, and load its state dict with model.load_state_dict"
    for name in ("model", "module"):
        if isinstance(getattr(value, name, None), nn.Module):
            return f"a torch.nn.Module: its attribute .{name}"
    return "a torch.nn.Module"
