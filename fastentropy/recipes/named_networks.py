"""Networks by their names: those of torchvision and timm, and those that a function of the user's returns."""

import importlib
import importlib.util
import inspect
import operator
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fastentropy._utils.errors import nearest_names, one_line
from fastentropy._utils.optional import install_command

#: Mean and standard deviation of red, green and blue.
Pixels = tuple[tuple[float, ...], tuple[float, ...]]


def library_network(name: str, others: Sequence[str] = ()) -> tuple[nn.Module, Pixels | None]:
    """Create a network of torchvision or timm with random weights.

    Args:
        name: its name.
        others: further names that the user could have meant, for the error message.

    Returns:
        The network, and the mean and the standard deviation of the pixels that it expects, if timm tells them.

    Raises:
        ValueError: there is no such network.
    """
    known = list(others)
    if importlib.util.find_spec("torchvision"):
        from torchvision import models  # not needed by the others

        known += models.list_models(module=models)
        if name in known and name not in others:
            return models.get_model(name, weights=None), None
    if importlib.util.find_spec("timm"):
        import timm

        if timm.is_model(name):
            model = timm.create_model(name, pretrained=False)
            return model, (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        known += timm.list_models()
    if not known:
        raise ValueError(f"{name!r} needs torchvision: {install_command('images')}; or name a package.module:factory")
    raise ValueError(f"unknown model {name!r}; the nearest are {nearest_names(name, known)}; or name a package.module:factory")


def call_factory(name: str, **offered: Any) -> nn.Module:
    """Return the network of the user's own function. It is imported as `python -m` would, with the working directory first.

    Args:
        name: "package.module:factory".
        **offered: arguments that are passed on as far as the function has parameters of these names.

    Returns:
        The network.

    Raises:
        ValueError: the function cannot be imported, fails, or returns something else.
    """
    module, _, attribute = name.partition(":")
    path = sys.path
    sys.path = [os.getcwd(), *path]
    try:
        factory = operator.attrgetter(attribute)(importlib.import_module(module))
        taken = inspect.signature(factory).parameters
        model = factory(**{argument: value for argument, value in offered.items() if argument in taken})
    except (Exception, SystemExit) as error:
        raise ValueError(f"the factory {name} fails: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path = path
    if not isinstance(model, nn.Module):
        raise ValueError(f"the factory {name} returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from a file of torch.save without running what is pickled in it.

    Args:
        path: the file.

    Returns:
        The tensors by name.

    Raises:
        ValueError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        state: Any = (
            load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {one_line(error)}") from error
    for key in ("state_dict", "model"):  # checkpoints of common training programs
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; expected tensors by name, as in torch.save(model.state_dict(), path)")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def load_state(model: nn.Module, name: str, state: Mapping[str, Tensor], path: Path) -> None:
    """Load a state dict into a network.

    Args:
        model: the network, which is changed.
        name: its name.
        state: the state dict.
        path: the file that held it.

    Raises:
        ValueError: the state dict is of another network.
    """
    expected = model.state_dict()
    missing = sorted(key for key in expected.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    unexpected = sorted(state.keys() - expected.keys())
    others = [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    wrong = {"missing": missing, "unknown": unexpected, "of another shape": sorted(others)}
    if told := [f"{len(keys)} {what}, such as {keys[0]}" for what, keys in wrong.items() if keys]:
        raise ValueError(f"{path} does not fit {name}: {'; '.join(told)}")
    model.load_state_dict(state)
