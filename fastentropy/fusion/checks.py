"""Check the arguments of `fuse`, and say in one line what is wrong with the model or its inputs, and what mends it."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from fastentropy._compat import uncompiled
from fastentropy._utils.errors import one_line
from fastentropy._utils.text import plural
from fastentropy.fusion.backends import Backend
from fastentropy.fusion.chains.merging import Borders
from fastentropy.fusion.inputs import Inputs, outputs_of
from fastentropy.fusion.verification import TOLERANCE, largest_error
from fastentropy.sites.inputs import is_exported, misfit

#: The beginning of the message about modules that compute something else than in eval mode.
_PARTLY_TRAINING = "the model is in eval mode, but these of its modules are in training mode"

#: How many modules an error message names.
_MOST_NAMES = 3


def check_options(tolerance: float | None, borders: Borders, backend: Backend, measure: bool) -> None:
    """Raise ValueError if an argument of `fuse` is invalid, or two do not go together."""
    if tolerance is not None and not (isinstance(tolerance, int | float) and tolerance >= 0):
        raise ValueError(f"tolerance must be a relative error of 0 or more, not {tolerance!r}")
    if borders not in get_args(Borders):
        raise ValueError(f"borders must be 'exact' or 'train', not {borders!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be 'eager', 'inductor', 'auto' or 'onnxruntime', not {backend!r}")
    if backend == "auto" and not measure:
        raise ValueError("backend='auto' chooses by measured times, but measure is False; name the backend")
    if backend != "eager" and borders == "train":
        raise ValueError(f"borders='train' makes a network to be trained, which backend={backend!r} cannot; use 'eager'")


def copy_that_runs(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """Return a copy of the model after it has run on the example inputs once, and these inputs with the batch of its outputs.

    Raises ValueError if the model is in training mode, under autocast or compiled by TorchScript, cannot be copied or does not
    run, or if the inputs hold no sample.
    """
    if reason := _refusal(model, inputs):
        raise ValueError(reason)
    try:
        original = copy.deepcopy(uncompiled(model), _copied_values(model))
    except Exception as error:
        reason = f"{type(model).__name__} cannot be copied by copy.deepcopy: {one_line(error)}{_uncopied(model)}"
        raise ValueError(reason) from error
    try:
        outputs = outputs_of(original, inputs)
    except Exception as error:
        reason = misfit(original, inputs.args, inputs.kwargs, error) or one_line(error)
        raise ValueError(f"the model does not run on example_inputs: {reason}") from error
    if (names := _modules_set_to_eval(original)) and largest_error(outputs_of(original, inputs), outputs) > 0:
        raise ValueError(f"{_PARTLY_TRAINING}: {names}; call model.eval() first")
    inputs = inputs.with_batch_of(outputs)
    if inputs.batch == 0:
        raise ValueError("example_inputs hold a batch of no samples; give at least one")
    return original, inputs


def default_tolerance(model: nn.Module) -> float:
    """Return the default tolerance for the dtype that most weights of the model have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    dtype = max(sizes, key=lambda each: sizes[each], default=torch.float32)
    return TOLERANCE.get(dtype, TOLERANCE[torch.float32])


def _listed_modules(model: nn.Module, holds: Callable[[nn.Module], bool]) -> str:
    """Return the paths and classes of the submodules of a model for which `holds` returns True; "" if there are none.

    Only the first few are named.
    """
    names = [f"{name} ({type(module).__name__})" for name, module in model.named_modules() if name and holds(module)]
    more = f" and {plural(len(names) - _MOST_NAMES, 'more module')}" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _refusal(model: nn.Module, inputs: Inputs) -> str:
    """Return the reason why a model in its present state is not fused, or "" if it may be."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "the model is compiled by TorchScript; fuse the model before torch.jit"
    if isinstance(model, DataParallel | DistributedDataParallel):
        return f"{type(model).__name__} runs the model on several devices; fuse the model in it: model.module"
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        return "the model has lazy modules without weights; call it once before it is fused"
    if model.training and not is_exported(model):
        return "the model is in training mode, where batch norm and dropout are not linear; call model.eval() first"
    if names := _listed_modules(model, _differs_in_training):
        return f"{_PARTLY_TRAINING}: {names}; call model.eval() first"
    for device, dtype in _autocasts([*model.parameters(), *model.buffers(), *inputs.leaves]):
        return (
            f"torch.autocast is active for {device} ({dtype}), and the model computes something else under it; fuse outside of "
            f"it, after model.to({dtype}) for a result in this precision"
        )
    return ""


def _differs_in_training(module: nn.Module) -> bool:
    """Return whether a module is in training mode, and its forward asks for the mode. A dropout of nothing does not count."""
    code = getattr(type(module).forward, "__code__", None)
    asks = code is not None and "training" in code.co_names
    return module.training and asks and getattr(module, "p", None) != 0 and not is_exported(module)


def _modules_set_to_eval(model: nn.Module) -> str:
    """Set all modules of a model to eval mode, and return the names of those that were in training mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False  # an exported module has no eval()
    return "" if is_exported(model) else _listed_modules(model, lambda module: module in training)


def _autocasts(values: Iterable[Any]) -> list[tuple[str, torch.dtype]]:
    """Return the kinds of devices of the tensors among some values for which autocast is active, and its dtype."""
    kinds = sorted({value.device.type for value in values if isinstance(value, Tensor)})
    available = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
    return [(kind, torch.get_autocast_dtype(kind)) for kind in available if torch.is_autocast_enabled(kind)]


def _copied_values(model: nn.Module) -> dict[int, Any]:
    """Return copies of the tensors that modules compute from their parameters, by id, as the memo of a deep copy.

    A module with a pruning mask or under the older weight norm keeps its weight as such a tensor, which PyTorch does not copy.
    """
    values = [value for module in model.modules() for value in vars(module).values()]
    return {id(each): each.detach().clone() for each in values if isinstance(each, Tensor) and not each.is_leaf}


def _uncopied(model: nn.Module) -> str:
    """Return which attribute of a model cannot be copied, as the end of an error message; "" if it is not found."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, _copied_values(model) | {id(each): each for each in model.modules()})
            except Exception:  # whatever an attribute raises
                owner = f"model.{path}" if path else "model"
                return f"; it is {owner}.{name}: take it away, or give its class a __deepcopy__"
    return ""
