"""What is measured side by side on whole models: inference alone, while collecting, and with the published procedure."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torchvision
from state_peers import published_entropy
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import fastentropy as fe
from fastentropy.activations import activation_modules

MODELS = ("resnet18", "mobilenet_v2", "vgg16_bn", "swin_t")
Inference = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[Inference]:
    """Inference alone, with the model's own in-place activations."""
    yield model


@contextlib.contextmanager
def collecting(model: nn.Module) -> Iterator[Inference]:
    """Inference while the states are counted."""
    with fe.collect(model):
        yield model


@contextlib.contextmanager
def published(model: nn.Module) -> Iterator[Inference]:
    """Inference as in EASIER's code (VGCQ/EASIER, main.py, train.py and utils.py), which changes the model.

    It makes the activations out-of-place, so that their inputs are still there after them; a forward hook on each keeps the
    input of every call until the whole batch has passed; then comes one entropy per call.
    """
    inputs: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0])

    def run(images: Tensor) -> Tensor:
        y = model(images)
        for x in inputs:
            published_entropy(x, neurons_last=x.ndim == 3 or isinstance(model, SwinTransformer))
        inputs.clear()
        return y

    for module in activation_modules(model).values():
        module.inplace = False
        module.register_forward_hook(keep_input)
    yield run


PROCEDURES: tuple[Callable[[nn.Module], AbstractContextManager[Inference]], ...] = (plain, collecting, published)
"""Each is a context in which its model runs; the model that it is given should be its own."""


def load_model(name: str) -> nn.Module:
    """One of torchvision's models with random weights, in eval mode."""
    return torchvision.models.get_model(name).eval()
