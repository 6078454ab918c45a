"""Replace activations by the identity."""

import ast
import inspect
import textwrap
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from fastentropy.sites.activations import activation_modules
from fastentropy.sites.fast_paths import replace_activation
from fastentropy.sites.finding import no_sites
from fastentropy.sites.inputs import check_model, is_exported, site_names
from fastentropy.surgery.site_names import explain_unknown, names_since_isolation, shared_with


def linearize(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the named activation modules by the identity, in place.

    If an error is raised, no module has been replaced. A module that a forward pass calls several times is replaced for all of
    these calls. If the code of the module around it shows this, a warning tells; `isolate` gives each call a module of its own.

    Args:
        model: the model, which is changed.
        names: the names of sites (calls of activations) that are modules, such as those of `find_sites`.

    Raises:
        ValueError: a name is not an activation module of the model (the error tells what it is, and the nearest names), the
            model holds the module under several names, or `names` is a string.
        TypeError: `model` is not a module, or `names` holds something other than strings.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> fe.linearize(model, ["1"])
        >>> model[1]
        Identity()
    """
    names = site_names(names, "names")
    replace_by_identity(model, names)
    if names_since_isolation(model) is None:
        for name in names:
            _warn_of_other_calls(model, name)


def replace_by_identity(model: nn.Module, names: Sequence[str]) -> None:
    """Do what `linearize` does, without a warning."""
    check_model(model)
    if not names:
        return
    modules = activation_modules(model)
    if not modules:
        text = no_sites(model, "has no module of a known activation")
        isolated = "; functions that it calls become modules with fe.isolate(model, example_inputs)"
        raise ValueError(text if any(map(is_exported, model.modules())) else text + isolated)
    check_replaceable(model, modules, names)
    for name in names:
        replace_activation(model, name, nn.Identity())


def check_replaceable(model: nn.Module, modules: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    """Raise ValueError if names are not those of activation modules that the model holds in one place.

    Args:
        model: the model.
        modules: its activation modules by path.
        names: the names.
    """
    paths = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in modules:
            raise ValueError(f"{name!r} is not an activation module of the model{explain_unknown(name, model, modules)}")
        if not name:
            raise ValueError("the model is itself an activation; put it into a module, such as torch.nn.Sequential(model)")
        if paths.count(id(modules[name])) > 1:
            others = ", ".join(map(repr, shared_with(name, model)))
            raise ValueError(
                f"the model holds the module {name!r} in several places: it is also {others}, which would become linear too; "
                "fe.isolate(model, example_inputs) gives each a module of its own"
            )


def _warn_of_other_calls(model: nn.Module, name: str) -> None:
    """Warn if the module around a module calls it in several places, as far as the source code of its forward tells."""
    path, _, attribute = name.rpartition(".")
    owner = type(model.get_submodule(path))
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(owner.forward)))
    except (OSError, TypeError, SyntaxError):
        return
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{attribute}"]
    if len(calls) > 1:
        warnings.warn(
            f"{owner.__name__}.forward calls {name!r} in {len(calls)} places, and it is the identity in all of them now; in "
            "the model that fe.isolate(model, example_inputs) returns, each call has a module of its own",
            stacklevel=3,
        )
