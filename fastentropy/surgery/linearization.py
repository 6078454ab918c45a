"""Replace activations by the identity."""

from collections.abc import Sequence

from torch import nn

from fastentropy._utils.errors import nearest_names
from fastentropy.sites.activations import activation_modules
from fastentropy.sites.interception import replace_activation
from fastentropy.sites.watcher import no_sites


def linearize(model: nn.Module, names: Sequence[str]) -> None:
    """Replace the named activation modules by the identity, in place: all of them, or none where this raises.

    Raises ValueError for a name that is not an activation of the model, with the nearest ones that are, and for a module that
    the model holds under several names.
    """
    if isinstance(names, str):
        raise ValueError(f"names must be a list of site names, not the string {names!r}: [{names!r}]")
    if not names:
        return
    modules = activation_modules(model)
    if not modules:
        raise ValueError(no_sites(model))
    paths = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name not in modules:
            nearest = nearest_names(name, modules)
            raise ValueError(f"{name!r} is not an activation module of the model; the nearest are {nearest}")
        if paths.count(id(modules[name])) > 1:
            raise ValueError(f"the module {name!r} stands in several places of the model; give each its own activation module")
    for name in names:
        replace_activation(model, name, nn.Identity())
