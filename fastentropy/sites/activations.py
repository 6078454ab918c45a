"""The table of activations: the modules and functions that are rectifiers, whose state is the sign of their input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Full name of a module type (not every library is installed) -> the activation's name.
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

#: Function -> the activation's name.
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
    """The arguments of `fastentropy_kernels.activation_states` that stand for an activation module."""

    activation: str
    parameters: dict[str, Any]
    inplace: bool


#: Module type -> a function of a module that returns the activation that the kernels compute in place of its forward, with its
#: parameters; None for a module that is set to another formula, which rounds differently.
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
    """Add a module class (with its subclasses) or a function of a tensor to the activations that are found.

    The state that is counted is the sign of the input. A function is seen only where PyTorch dispatches its call: it must be
    one of PyTorch's, or call `torch.overrides.handle_torch_function`. Make a module of any other function, and of one whose
    calls are to be removed: `isolate` cannot make a module for a registered function.

    Args:
        activation: the class, or the function.
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
    if not name.isidentifier():
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
    """Return the name of a module's activation, or None where it is not known. A subclass counts as its nearest ancestor."""
    return next((_MODULES[name] for kind in type(module).__mro__ if (name := _full_name(kind)) in _MODULES), None)


def function_name(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's activation, or None where it is not known."""
    try:
        return _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None


def fused_activation(module: nn.Module, kind: type[nn.Module]) -> FusedActivation | None:
    """Return what the kernels compute in place of a module of exactly this type; None where they have no equal."""
    read = _FUSED.get(_full_name(kind))
    if read is None or (fused := read(module)) is None:
        return None
    return FusedActivation(*fused, inplace=bool(getattr(module, "inplace", False)))


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's activation modules by dotted path; a module with several paths has the first."""
    return {name: module for name, module in model.named_modules() if activation_name(module)}


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
