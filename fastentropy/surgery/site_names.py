"""Remember how the sites (calls of activations) of an isolated model were called before, and explain names that it lacks."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from fastentropy._utils.errors import nearest_names
from fastentropy.collector.statistics import Statistics
from fastentropy.sites.activations import function_names

#: The attribute of an isolated model that holds the names of its sites, by their names before.
_ATTRIBUTE = "_fastentropy_site_names"


def keep_names(isolated: nn.Module, model: nn.Module, before: Sequence[str], after: Sequence[str]) -> None:
    """Keep the names that the sites of a model had before it was isolated.

    Args:
        isolated: the isolated model, which gets an attribute.
        model: the model before. If it was isolated already, its own former names are kept too.
        before: the names of the sites of `model`, in call order.
        after: the names of the sites of `isolated`, in call order.
    """
    names = dict(zip(before, after, strict=True)) if len(before) == len(after) else {}
    earlier = names_since_isolation(model) or {}
    vars(isolated)[_ATTRIBUTE] = {**names, **{name: names.get(own, own) for name, own in earlier.items()}}


def names_since_isolation(model: nn.Module) -> dict[str, str] | None:
    """Return the names of the sites by their names before `isolate`; None if neither the model nor a part was isolated."""
    found = [(path, vars(module)[_ATTRIBUTE]) for path, module in model.named_modules() if _ATTRIBUTE in vars(module)]
    if not found:
        return None
    return {_join(path, name): _join(path, own) for path, names in reversed(found) for name, own in names.items()}


def named_as_now(statistics: Statistics, model: nn.Module) -> Statistics:
    """Return statistics of a model with the names that its sites have now, if they were collected before `isolate`."""
    names = names_since_isolation(model)
    if not names or set(statistics) <= set(names.values()):
        return statistics
    renamed = {names.get(name, name): site for name, site in statistics.items()}
    return Statistics(renamed, statistics.notes)


def explain_unknown(name: str, model: nn.Module, known: Collection[str], *, all_calls: bool = False) -> str:
    """Return what a name is that is not among those of activations, and which names are near it, for an error message.

    Args:
        name: the name.
        model: the model.
        known: the names of activations of the model that could be meant.
        all_calls: whether these are the names of all calls, and not of modules alone.
    """
    names, modules = names_since_isolation(model), dict(model.named_modules(remove_duplicate=False))
    if names and names.get(name) in known:
        return f": since fe.isolate its name is {names[name]!r}"
    path = name.partition(":")[0]
    kind, near = "", f"; the nearest are {nearest_names(name, known)}" if known else ""
    if not all_calls and (path != name or _is_call_of_function(name, modules)):
        isolation = "fe.isolate could not give it" if names is not None else "fe.isolate(model, example_inputs) makes"
        kind = f": a call without a module of its own, which {isolation}"
    elif name in modules:
        kind = f": it is a {type(modules[name]).__name__}"
        near = f"; the nearest are {', '.join(_neighbours(name, list(modules), known))}"
    return kind + near


def shared_with(name: str, model: nn.Module) -> list[str]:
    """Return the other names under which a model holds a module."""
    paths: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    return [path for path, module in paths.items() if module is paths[name] and path != name]


def _is_call_of_function(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a name is one that the call of a function has: that of a module, and the name of the function."""
    owner, _, own = name.rpartition(".")
    return name not in modules and owner in modules and re.sub(r"_\d+$", "", own) in function_names()


def _neighbours(name: str, paths: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the activations inside of a module, or else the last one before and the first one after it."""
    if inside := [each for each in known if each.startswith(f"{name}.")]:
        return inside[:3]
    places = {each: paths.index(each.partition(":")[0]) for each in known if each.partition(":")[0] in paths}
    before = [each for each, place in places.items() if place < paths.index(name)]
    after = [each for each, place in places.items() if place > paths.index(name)]
    return before[-1:] + after[:1]


def _join(path: str, name: str) -> str:
    """Return the path of a name inside of the module at a path."""
    return f"{path}.{name}" if path else name
