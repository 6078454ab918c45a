"""The table of activations: modules and functions with a state per neuron (off, zero, on), which is the sign of their input."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastentropy_kernels.activations import checked_parameters

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
    "fastentropy.surgery.neuronwise.NeuronwiseActivation": "neuronwise",
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

#: Overload of an ATen operator that a function calls -> name of the activation.
OPERATORS: dict[Any, str] = {
    getattr(torch.ops.aten, operator).default: name
    for name in (
        *("relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
        *("hardtanh", "hardswish", "prelu"),
    )
    for operator in (name, f"{name}_")
    if hasattr(torch.ops.aten, operator)
}

#: Those that read one tensor, and compute each entry from the one at the same place.
ELEMENTWISE = frozenset(operator for operator, name in OPERATORS.items() if name not in ("prelu", "rrelu"))

#: Function that the user has registered -> name of the activation.
_REGISTERED_FUNCTIONS: dict[Callable[..., Any], str] = {}


class FusedActivation(NamedTuple):
    """The arguments with which `fastentropy_kernels.activation_states` computes the same output as an activation module.

    Also what these arguments were read from, because they hold only as long as it stays the same.
    """

    activation: str  # the name of the activation
    parameters: dict[str, float]  # its parameters by name, such as negative_slope
    inplace: bool  # whether the output is written over the input
    kind: type[nn.Module]  # the class of the module
    forward: Callable[..., Any]  # the forward of this class
    function: str  # the name of the function of torch.nn.functional that the forward calls
    attributes: tuple[tuple[str, object], ...]  # the attributes that the forward reads: name and value

    def is_of(self, module: nn.Module) -> bool:
        """Return whether the arguments still hold for a module: whether they would be read from it again."""
        state = module.__dict__
        if type(module) is not self.kind or self.kind.forward is not self.forward or "forward" in state:
            return False
        for name, value in self.attributes:
            if state.get(name) is not value:  # `==` would take 0.0 for -0.0
                return False
        return getattr(F, self.function) is _FUNCTIONALS[self.function]


#: Full name of a module class with a kernel -> the function of torch.nn.functional that its forward calls, and the attributes
#: that the forward reads.
_FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch.nn.modules.activation.ReLU": ("relu", ("inplace",)),
    "torch.nn.modules.activation.ReLU6": ("hardtanh", ("min_val", "max_val", "inplace")),
    "torch.nn.modules.activation.LeakyReLU": ("leaky_relu", ("negative_slope", "inplace")),
    "torch.nn.modules.activation.ELU": ("elu", ("alpha", "inplace")),
    "torch.nn.modules.activation.SELU": ("selu", ("inplace",)),
    "torch.nn.modules.activation.CELU": ("celu", ("alpha", "inplace")),
    "torch.nn.modules.activation.GELU": ("gelu", ("approximate",)),
    "torch.nn.modules.activation.SiLU": ("silu", ("inplace",)),
    "torch.nn.modules.activation.Mish": ("mish", ("inplace",)),
    "torch.nn.modules.activation.Softplus": ("softplus", ("beta", "threshold")),
    "torch.nn.modules.activation.Hardswish": ("hardswish", ("inplace",)),
    "torch.nn.modules.activation.Hardtanh": ("hardtanh", ("min_val", "max_val", "inplace")),
    "transformers.activations.GELUActivation": ("gelu", ("act",)),
    "transformers.activations.SiLUActivation": ("silu", ()),
}

#: The attributes in `_FUSED` that are no parameters of an activation, with values that have no effect.
_OTHERS: dict[str, Any] = {"inplace": False, "approximate": "none", "act": F.gelu}

#: The functions of `_FUSED` as they are in PyTorch. A user may put others in their place.
_FUNCTIONALS: dict[str, Callable[..., Any]] = {function: getattr(F, function) for function, _ in _FUSED.values()}


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
        _REGISTERED_FUNCTIONS[activation] = name
    else:
        raise TypeError(
            f"activation: got an object of {type(activation).__name__}, expected a subclass of torch.nn.Module or a function"
        )


def activation_name(module: nn.Module) -> str | None:
    """Return the name of a module's activation, or None if the module is not a known activation.

    A module of an unknown class has the name of the nearest known ancestor of its class.
    """
    return class_activation(type(module))


def class_activation(kind: type) -> str | None:
    """Return the name of the activation of a class of modules, or of its nearest known ancestor; None if there is none."""
    return next((_MODULES[name] for each in kind.__mro__ if (name := _full_name(each)) in _MODULES), None)


def function_name(function: Callable[..., Any]) -> str | None:
    """Return the name of a function's activation, or None if the function is not a known activation."""
    try:
        return _REGISTERED_FUNCTIONS.get(function) or _FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None


def function_names() -> set[str]:
    """Return the names of all functions that are known activations, without underscores at their ends."""
    return {getattr(function, "__name__", "").strip("_") for function in (*_FUNCTIONS, *_REGISTERED_FUNCTIONS)}


def called_name(function: Callable[..., Any]) -> str | None:
    """Return the name of the activation that an operator or a registered function computes; None for anything else.

    The functions of PyTorch have no name here, because they are seen where they call their operators.
    """
    try:
        return OPERATORS.get(function) or _REGISTERED_FUNCTIONS.get(function)
    except TypeError:  # not hashable
        return None


def kernel_of(kind: type[nn.Module]) -> str | None:
    """Return an activation that has a kernel wherever modules of a class have one, or None if they never have one."""
    function, _ = _FUSED.get(_full_name(kind), (None, ()))
    return "relu6" if function == "hardtanh" else function  # relu6 is a hardtanh from 0 to 6


def has_registered_functions() -> bool:
    """Return whether the user has registered a function."""
    return bool(_REGISTERED_FUNCTIONS)


def registrations() -> tuple[int, int]:
    """Return how many classes and functions are known activations."""
    return len(_MODULES), len(_REGISTERED_FUNCTIONS)


def registered_in_python() -> list[str]:
    """Return the names of the functions that the user has registered and that are written in Python.

    A graph of torch.compile shows what they call.
    """
    functions = [each for each in _REGISTERED_FUNCTIONS if isinstance(each, FunctionType)]
    return [each.__qualname__ for each in functions if each.__module__.partition(".")[0] != "torch"]


def fused_activation(module: nn.Module) -> FusedActivation | None:
    """Return the arguments with which a kernel computes the same as an activation module, or None if no kernel does.

    Subclasses of a class with a kernel may compute something else, so they have no kernel. Neither has a class whose forward
    was replaced.
    """
    kind = type(module)
    function, names = _FUSED.get(_full_name(kind), ("", ()))
    if not function or not _is_original(kind):
        return None
    attributes = {name: vars(module).get(name) for name in names}
    arguments = _kernel_arguments(function, attributes)
    if arguments is None:
        return None
    fused = FusedActivation(*arguments, kind, kind.forward, function, tuple(attributes.items()))
    return fused if fused.is_of(module) else None


def _is_original(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class of a library is the library's own, and was not replaced by another function."""
    code = getattr(kind.forward, "__code__", None)
    return code is not None and code.co_filename == sys.modules[kind.__module__].__file__


def _kernel_arguments(function: str, attributes: Mapping[str, Any]) -> tuple[str, dict[str, float], bool] | None:
    """Return the name and the parameters of the activation that a kernel computes, and whether it is in place.

    The result is None if a module with these attributes computes something else, or rounds differently from the kernel.

    Args:
        function: the function that the forward of the module calls, as in `_FUSED`.
        attributes: the values of the attributes that the forward reads, by name; None for one that is missing.
    """
    parameters = dict(attributes)
    inplace, approximate, act = (parameters.pop(name, default) for name, default in _OTHERS.items())
    if type(inplace) is not bool or approximate not in ("none", "tanh") or act is not F.gelu:
        return None
    if any(type(value) not in (int, float) for value in parameters.values()):  # a tensor, for example, may change its value
        return None
    activation = "gelu_tanh" if approximate == "tanh" else function
    if function == "hardtanh" and tuple(parameters.values()) == (0, 6):
        activation, parameters = "relu6", {}
    try:
        checked_parameters(activation, parameters)
    except ValueError:
        return None
    return activation, parameters, inplace


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the activation modules of a model by dotted path. A module with several paths is listed under the first.

    Modules inside of an activation module are not listed, because they are a part of it.
    """
    modules: dict[str, nn.Module] = {}
    inside = None  # how the paths of the modules inside of the last activation module begin, which follow it
    for name, module in model.named_modules():
        if activation_name(module) and (inside is None or not name.startswith(inside)):
            modules[name] = module
            inside = f"{name}." if name else ""
    return modules


def own_modules(model: nn.Module, sites: Sequence[str]) -> list[str]:
    """Return those of a model's sites that are modules called once per forward pass, so that each can be removed by itself."""
    modules = activation_modules(model)
    return [name for name in sites if name in modules and f"{name}:1" not in sites]


def _full_name(kind: type) -> str:
    """Return the name of a class with its module, such as "torch.nn.modules.activation.ReLU"."""
    return f"{kind.__module__}.{kind.__qualname__}"
