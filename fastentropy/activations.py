"""The table of activations: which modules are rectifiers whose state can be read from the sign of their input."""

from torch import nn

#: Module type -> the activation's name. A subclass counts as its nearest ancestor in the table.
ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.CELU: "celu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Softplus: "softplus",
    nn.Hardswish: "hardswish",
    nn.Hardtanh: "hardtanh",
}


def activation_name(module: nn.Module) -> str | None:
    """The name of a module's activation, or None where the module is not a known one."""
    return next((ACTIVATIONS[kind] for kind in type(module).__mro__ if kind in ACTIVATIONS), None)


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's activation modules by dotted path; a module with several paths has the first.

    Raises ValueError where there is none.
    """
    modules = {name: module for name, module in model.named_modules() if activation_name(module)}
    if not modules:
        known = ", ".join(sorted(kind.__name__ for kind in ACTIVATIONS))
        raise ValueError(
            f"{type(model).__name__} has no known activation module; write its activations as modules of torch.nn ({known})"
        )
    return modules
