"""The network that a command is given: by the name of a network, by a function that returns it, or by the folder of a run."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastentropy.pruning.options import Options
from fastentropy.pruning.steps import StepFolder
from fastentropy.recipes import load_recipe
from fastentropy.recipes.images_models import create_network
from fastentropy.recipes.named_networks import call_factory, library_network, load_state, read_state
from fastentropy.recipes.run import open_run

#: The sizes of the input of a network of torchvision or timm.
_IMAGES = (16, 3, 224, 224)


class GivenNetwork(NamedTuple):
    """A network in eval mode, and inputs for it, both on one device."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    notes: tuple[str, ...]  # sentences for the user about how the network was made


def given_network(name: str, shapes: Sequence[Sequence[int]], weights: Path | None, device: torch.device) -> GivenNetwork:
    """Make the network that the user names.

    Args:
        name: the name of a network of torchvision or timm, "package.module:factory" for a function that returns a network, or
            the folder of a finished run of `fastentropy prune`, whose kept network is meant.
        shapes: the sizes of each input. If empty, those that a run measured, or 16 images of 224×224 pixels for a network of
            torchvision or timm.
        weights: a safetensors file, or a file with a state dict of PyTorch. None keeps those that a run or a factory set.
        device: where the network and the inputs are placed.

    Returns:
        The network with random inputs, which repeat.

    Raises:
        ValueError: the network is unknown, fails or needs shapes, the run is unfinished or damaged, or the weights do not fit.
    """
    if Path(name).is_dir():
        if weights:
            raise ValueError(f"{name} is a run, which has weights of its own; leave out --weights")
        model, inputs = _network_of_run(Path(name), device)
        notes: tuple[str, ...] = ()
    else:
        model, inputs, notes = _named(name, weights, shapes[0][-1] if shapes else _IMAGES[-1])
    if shapes:
        inputs = tuple(map(_random, shapes))
    if not inputs:
        raise ValueError(f"the sizes of the inputs of {name} are not known; name them, such as --shape 16,3,224,224")
    return GivenNetwork(model.to(device).eval(), tuple(each.to(device) for each in inputs), notes)


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the sizes in a text such as "16,3,224,224". Raise ValueError if it has another form."""
    if not re.fullmatch(r"[1-9]\d*([,x][1-9]\d*)*", text):
        raise ValueError(f"--shape {text}: expected the sizes of an input, such as 16,3,224,224")
    return tuple(map(int, re.split("[,x]", text)))


def _named(name: str, weights: Path | None, size: int) -> tuple[nn.Module, tuple[Tensor, ...], tuple[str, ...]]:
    """Return a network that is no run, inputs for it if they are known, and notes. `size` is the last one of its input."""
    if name == "efficientnet_lite0":  # its paddings depend on the size of the images
        network = create_network(name, weights, size)
        return network.model, (_random((16, 3, size, size)),), network.notes
    if ":" in name:
        model, inputs, note = call_factory(name), tuple[Tensor, ...](), f"{name} has the weights that its factory sets"
    else:
        model, _ = library_network(name)
        inputs = (_random(_IMAGES),)
        note = f"{name} has random weights (--weights FILE loads others)"
    if weights:
        load_state(model, name, read_state(weights), weights)
        note = f"{name} has the weights of {weights}"
    return model, inputs, (note,)


def _network_of_run(folder: Path, device: torch.device) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the kept network of a run, and the inputs for which the run measured latency."""
    run = open_run(folder)
    if not run.outcome:
        raise ValueError(f"{folder} is not finished; continue with: fastentropy prune --resume {folder}")
    recipe = load_recipe(run.settings.recipe, device, **run.settings.recipe_options)
    steps = StepFolder(folder / "steps", Options(**run.settings.pruning_options).to_dict())
    kept = steps.load()[: run.outcome["kept_step"] + 1]
    if len(kept) <= run.outcome["kept_step"]:
        raise ValueError(f"{folder}/steps lacks the step {run.outcome['kept_step']}, which the run has kept")
    return steps.restore(recipe.build_model(), kept), recipe.example_inputs()


def _random(shape: Sequence[int]) -> Tensor:
    """Return random values of this shape, always the same."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
