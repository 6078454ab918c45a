"""Find the sites (calls of activations) of a model in one forward pass that leaves the model as it was."""

import contextlib
import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastentropy._compat import buffers_of, has_values, tree_leaves, uncompiled
from fastentropy.sites.activations import activation_modules
from fastentropy.sites.inputs import ExampleInputs, check_inputs, check_model, explained, is_exported, split_inputs
from fastentropy.sites.observer import NoObserver
from fastentropy.sites.site import Site
from fastentropy.sites.watcher import SiteWatcher

#: The names of classes that are probably activations.
_ACTIVATION_LIKE = re.compile(r"Act(?![a-z])|Activation|ReLU|[A-Z]LU|Swish|Mish|Snake|Sine|Tanh|Sigmoid|Soft|Hard|Gate|relu")

#: Nonlinear modules of torch.nn that are no rectifiers.
_STATELESS = (
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.LogSigmoid,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    nn.Softmin,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.Threshold,
    nn.GLU,
)


def find_sites(model: nn.Module, example_inputs: ExampleInputs) -> list[Site]:
    """Find the sites (call sites of activations) of a model, in call order.

    The model runs once in eval mode and is left as it was. If the model is divided among ranks (tensor parallel), the result
    describes the sites of this rank, with the number of neurons on this rank.

    Args:
        model: any module.
        example_inputs: a tuple of the positional inputs of one call, or a mapping of its keyword inputs.

    Returns:
        One `Site` for each call of a known activation.

    Raises:
        TypeError: `model` is not a module, `example_inputs` are of another kind (such as a single tensor), or the model takes
            other inputs.
        ValueError: the model calls no known activation.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> relu = torch.nn.ReLU()
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), relu, torch.nn.Conv2d(4, 2, 3), relu)
        >>> [(site.name, site.neurons) for site in fe.find_sites(model, (torch.zeros(1, 1, 8, 8),))]
        [('1', 4), ('1:1', 2)]
    """
    check_model(model)
    inputs = check_inputs(example_inputs, "fe.find_sites(model, {})")
    watcher = SiteWatcher(model, NoObserver())
    call_watched(watcher, model, inputs)
    if not watcher.sites:
        raise ValueError(no_sites(model))
    return list(watcher.sites.values())


def call_watched(watcher: SiteWatcher[Any], model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> None:
    """Call a model once (see `call_once`) while a watcher is attached to it. Errors of wrong inputs are explained."""
    with explained(model, inputs):
        watcher.attach()
        try:
            call_once(model, inputs)
        finally:
            watcher.detach()


@torch.no_grad()
def call_once(model: nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Any:
    """Call a model in eval mode without gradients, and return its output.

    The model's buffers, its training mode, the inputs and torch's random generators are left as they were.

    Args:
        model: any module.
        inputs: the positional inputs, or a mapping of the keyword inputs.
    """
    training = [module for module in model.modules() if module.training]
    buffers = [
        (module, name, buffer, None if buffer is None or is_lazy(buffer) else buffer.clone())
        for module in model.modules()
        for name, buffer in buffers_of(module).items()
    ]
    # A model may write over its inputs. PyTorch does not deepcopy results of operators that record gradients, and copies the
    # mode of fake tensors with them.
    tensors = [value for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)]
    results = [value for value in tensors if not value.is_leaf or not has_values(value)]
    args, kwargs = split_inputs(copy.deepcopy(inputs, {id(value): value.detach().clone() for value in results}))
    try:
        with torch.random.fork_rng():
            with contextlib.suppress(NotImplementedError):  # an exported graph, whose mode cannot be changed
                model.eval()
            return model(*args, **kwargs)
    finally:
        for module in training:
            module.training = True
        for owner, name, buffer, before in buffers:
            buffers_of(owner)[name] = buffer  # the forward may have put another one there
            if buffer is not None and before is not None:
                buffer.copy_(before)


def no_sites(model: nn.Module, lack: str = "calls no known activation") -> str:
    """Return the error message for a model in which no activation was found: what it has instead, and what to do.

    Args:
        model: the model.
        lack: what the message says of the model.
    """
    model = uncompiled(model)
    modules = list(model.modules())
    reason = _why_hidden(model, modules) or "; ".join(itertools.islice(_unknown(model, modules), 2))
    fallback = "none of its modules is one; make yours known with fe.register_activation(YourModule, 'name')"
    return f"{type(model).__name__} {lack}: {reason or fallback}"


def _why_hidden(model: nn.Module, modules: Sequence[nn.Module]) -> str:
    """Return why the activations of a model were not seen, or "" if it has none. `modules` are all modules of the model."""
    if any(map(is_exported, modules)):
        return "it is a graph of operators, where activations may be taken apart; use the model before torch.export or fe.fuse"
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        return "it is compiled by TorchScript, where calls cannot be seen; use the model before torch.jit"
    if kinds := _kinds(module for module in modules if "quantized" in type(module).__module__.split(".")):
        return f"it is quantised ({kinds}), and only floating-point values are counted; use the model before quantisation"
    if names := [name or "itself" for name in activation_modules(model)]:
        return f"its activation modules ({_listed(names)}) were not called, or not with floating-point values"
    return ""


def _unknown(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[str]:
    """Yield what a model has in place of known activations, and what to do about it, the most probable first.

    Args:
        model: the model.
        modules: all its modules.
    """
    own = [module for module in modules if not type(module).__module__.startswith("torch.") and not any(module.children())]
    likely = [module for module in own if _ACTIVATION_LIKE.search(type(module).__name__)]
    if likely:
        yield f"if {type(likely[0]).__name__} is one, {_registration(type(likely[0]))}"
    if kinds := _kinds(module for module in modules if isinstance(module, nn.RNNBase | nn.RNNCellBase)):
        yield f"it has {kinds}, whose nonlinearity is inside of one operator; write it with modules to count it"
    others = [module for module in modules if isinstance(module, _STATELESS) and module not in likely]
    if others:
        registration = _registration(type(others[0]))
        yield f"it has {_kinds(others)}, for which off, zero and on say little; if they do here, {registration}"
    plain = [module for module in own if module is not model and not module.state_dict() and not _extends_torch(module)]
    if plain and not likely:
        yield f"if {type(plain[0]).__name__} is one, {_registration(type(plain[0]))}"


def _extends_torch(module: nn.Module) -> bool:
    """Return whether the class of a module is a subclass of a module of PyTorch, such as Dropout."""
    return any(kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Module for kind in type(module).__mro__)


def _registration(kind: type[nn.Module]) -> str:
    """Return the request to make a module class known, with the call that does so."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", kind.__name__).lower()
    path = f"torch.nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
    return f"make it known with fe.register_activation({path}, {name!r})"


def _kinds(modules: Iterable[nn.Module]) -> str:
    """Return the names of the classes of modules, each once. Modules that only hold packed weights are left out."""
    names = dict.fromkeys(type(module).__name__ for module in modules)
    return _listed([name for name in names if not name.endswith("PackedParams")])


def _listed(names: Sequence[str]) -> str:
    """Return the first three names, separated by commas."""
    return ", ".join([*names[:3], *["…"] * (len(names) > 3)])
