"""Replace activations by the identity."""

from collections.abc import Mapping, Sequence

from torch import nn

from fastentropy._utils.errors import nearest_names
from fastentropy.sites.activations import activation_modules
from fastentropy.sites.fast_paths import replace_activation
from fastentropy.sites.finding import no_sites
from fastentropy.sites.inputs import check_model, is_exported, site_names


def linearize(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the named activation modules by the identity, in place.

    If an error is raised, no module has been replaced.

    Args:
        model: the model, which is changed.
        names: the names of sites (calls of activations) that are modules, such as those of `find_sites`.

    Raises:
        ValueError: a name is not an activation module of the model (the error tells the nearest names), the model holds the
            module under several names, or `names` is a string.
        TypeError: `model` is not a module, or `names` holds something other than strings.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> fe.linearize(model, ["1"])
        >>> model[1]
        Identity()
    """
    check_model(model)
    names = site_names(names, "names")
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
            nearest = nearest_names(name, modules)
            raise ValueError(f"{name!r} is not an activation module of the model; the nearest are {nearest}")
        if not name:
            raise ValueError("the model is itself an activation; put it into a module, such as torch.nn.Sequential(model)")
        if paths.count(id(modules[name])) > 1:
            raise ValueError(f"the model holds the module {name!r} in several places; give each its own activation module")
