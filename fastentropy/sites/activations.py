"""The table of activations: modules and functions with a state per neuron (off, zero, on), which is the sign of their input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Full name of a module class -> name of the activation. The keys are names, because not every library is installed.
_MODULES: dict[str, str] = {
    **{
        f"torch.nn.modules.activation.{kind}": name
        for kind, name in {
            "ReLU": "relu",
            "ReLU6": "relu6",
            "LeakyReLU": "leaky_relu",
            "PReLU": "prelu",
            "RReLU": "rrelu",
            "ELU": "elu",
            "SELU": "selu",
            "CELU": "celu",
            "GELU": "gelu",
            "SiLU": "silu",
            "Mish": "mish",
            "Softplus": "softplus",
            "Hardswish": "hardswish",
            "Hardtanh": "hardtanh",
        }.items()
    },
    **{
        f"transformers.activations.{kind}": name
        for kind, name in {
            "GELUActivation": "gelu",
            "AccurateGELUActivation": "gelu_tanh",
            "FastGELUActivation": "gelu_tanh",
            "GELUTanh": "gelu_tanh",
            "NewGELUActivation": "gelu_tanh",
            "ClippedGELUActivation": "clipped_gelu",
            "QuickGELUActivation": "quick_gelu",
            "SiLUActivation": "silu",
            "MishActivation": "mish",
            "ReLUSquaredActivation": "relu2",
            "XIELUActivation": "xielu",
        }.items()
    },
    **{
        f"timm.layers.{kind}": name
        for kind, name in {
            "activations.GELU": "gelu",
            "activations.GELUTanh": "gelu_tanh",
            "activations.QuickGELU": "quick_gelu",
            "activations.Swish": "silu",
            "activations.Mish": "mish",
            "activations.HardSwish": "hardswish",
            "activations.HardMish": "hard_mish",
            "activations.PReLU": "prelu",
            "activations_me.SwishMe": "silu",
            "activations_me.MishMe": "mish",
            "activations_me.HardSwishMe": "hardswish",
            "activations_me.HardMishMe": "hard_mish",
        }.items()
    },
}

#: Function -> name of the activation.
_FUNCTIONS: dict[Callable[..., Any], str] = {
    **{
        getattr(namespace, function): name
        for name in ("relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus")
        for namespace in (F, torch, Tensor)
        for function in (name, f"{name}_")
        if hasattr(namespace, function)
    },
    **dict.fromkeys((F.hardtanh, F.hardtanh_), "hardtanh"),
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), "prelu"),
    F.hardswish: "hardswish",
}


class FusedActivation(NamedTuple):
    """The arguments with which `fastentropy_kernels.activation_states` computes the same output as an activation module."""

    activation: str  # the name of the activation
    parameters: dict[str, Any]  # its parameters by name, such as negative_slope
    inplace: bool  # whether the output is written over the input


#: Full name of a module class -> a function that takes a module of this class. It returns the name and the parameters of the
#: activation that a kernel computes in place of the module's forward. It returns None if the module is set to a formula that
#: rounds differently from the kernel.
_FUSED: dict[str, Callable[[Any], tuple[str, dict[str, float]] | None]] = {
    **{
        f"torch.nn.modules.activation.{kind}": read
        for kind, read in dict[str, Callable[[Any], tuple[str, dict[str, float]]]](
            ReLU=lambda module: ("relu", {}),
            ReLU6=lambda module: ("relu6", {}),
            LeakyReLU=lambda module: ("leaky_relu", {"negative_slope": module.negative_slope}),
            ELU=lambda module: ("elu", {"alpha": module.alpha}),
            SELU=lambda module: ("selu", {}),
            CELU=lambda module: ("celu", {"alpha": module.alpha}),
            GELU=lambda module: ("gelu" if module.approximate == "none" else "gelu_tanh", {}),
            SiLU=lambda module: ("silu", {}),
            Mish=lambda module: ("mish", {}),
            Softplus=lambda module: ("softplus", {"beta": module.beta, "threshold": module.threshold}),
            Hardswish=lambda module: ("hardswish", {}),
            Hardtanh=lambda module: ("hardtanh", {"min_val": module.min_val, "max_val": module.max_val}),
        ).items()
    },
    "transformers.activations.GELUActivation": lambda module: ("gelu", {}) if module.act is F.gelu else None,
    "transformers.activations.SiLUActivation": lambda module: ("silu", {}),
}


def register_activation(activation: type[nn.Module] | Callable[..., Tensor], name: str) -> None:
    """Add a module class (with its subclasses) or a function of a tensor to the known activations.

    The state that is counted is the sign of the input. Calls of a function are seen only if PyTorch dispatches them: the
    function must be one of PyTorch's, or call `torch.overrides.handle_torch_function`. Write any other function as a module.
    Also write a function as a module if its calls are to be removed, because `isolate` cannot make modules for a registered
    function.

    Args:
        activation: the module class, or the function.
        name: the name of the activation in statistics, an identifier.

    Raises:
        TypeError: `activation` is neither a module class nor a function.
        ValueError: `name` is not an identifier.

    Examples:
        >>> import torch
        >>> import fastentropy as fe
        >>> class SquaredReLU(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.clamp(min=0).square()
        >>> fe.register_activation(SquaredReLU, "squared_relu")
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), SquaredReLU())
        >>> fe.find_sites(model, (torch.zeros(1, 3),))[0].activation
        'squared_relu'
    """
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name: got {name!r}, expected an identifier such as 'squared_relu'")
    if isinstance(activation, type):
        if not issubclass(activation, nn.Module):
            raise TypeError(f"activation: got the class {activation.__name__}, expected a subclass of torch.nn.Module")
        _MODULES[_full_name(activation)] = name
    elif callable(activation) and not isinstance(activation, nn.Module):
        _FUNCTIONS[activation] = name
    else:
        raise TypeError(
            f"activation: got an object of {type(activation).__name__}, expected a subclass of torch.nn.Module or a function"
        )


def activation_name(module: nn.Module) -> str | None:
    """Return the name of a module's activation, or None if the module is not a known activation.

    A module of an unknown class has the name of the nearest known ancestor of its class.
    """
    return next((_MODULES[name] for kind in type(module).__mro__ if (name := _full_name(kind)) in _MODULES), None)


def function_name(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's activation, or None if the function is not a known activation."""
    try:
        return _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None


def fused_activation(module: nn.Module, kind: type[nn.Module]) -> FusedActivation | None:
    """Return the arguments with which a kernel computes the same as an activation module, or None if no kernel does.

    Args:
        module: the activation module.
        kind: the class of the module as its user knows it. Subclasses of a class with a kernel may compute something else, so
            they have no kernel.
    """
    read = _FUSED.get(_full_name(kind))
    if read is None or (fused := read(module)) is None:
        return None
    return FusedActivation(*fused, inplace=bool(getattr(module, "inplace", False)))


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the activation modules of a model by dotted path. A module with several paths is listed under the first."""
    return {name: module for name, module in model.named_modules() if activation_name(module)}


def _full_name(kind: type) -> str:
    """Return the name of a class with its module, such as "torch.nn.modules.activation.ReLU"."""
    return f"{kind.__module__}.{kind.__qualname__}"
