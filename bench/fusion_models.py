"""The networks that fusing is measured on: random weights, odd batch-norm statistics, chosen activations linearised."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torchvision
import transformers
from torch import Tensor, nn

import fastentropy as fe

Case = tuple[nn.Module, tuple[Any, ...]]

VISION = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16")


def vision(name: str, size: int, batch: int) -> Case:
    """Return a model of torchvision and images."""
    options = {"image_size": size} if name.startswith("vit") else {}
    return odd(torchvision.models.get_model(name, weights=None, **options)), (torch.randn(batch, 3, size, size),)


def gpt2(tokens: int, batch: int, layers: int = 12) -> Case:
    """Return GPT-2 and random tokens."""
    config = transformers.GPT2Config(use_cache=False, n_layer=layers)
    return odd(transformers.GPT2LMHeadModel(config)), (torch.randint(0, config.vocab_size, (batch, tokens)),)


def hugging_face_vit(size: int, batch: int, layers: int = 12) -> Case:
    """Return Hugging Face's ViT-B and images."""
    config = transformers.ViTConfig(image_size=size, num_hidden_layers=layers, num_labels=1000)
    return odd(transformers.ViTForImageClassification(config)), (torch.randn(batch, 3, size, size),)


def odd(model: nn.Module) -> nn.Module:
    """Give batch norm statistics as after a training, and weights to layers that begin at zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model.eval()


def linearised(case: Case, pick: Callable[[list[str]], list[str]]) -> Case:
    """Return the case with the picked ones of its activations taken out."""
    model, inputs = case
    model = fe.isolate(model, inputs)
    fe.linearize(model, pick([site.name for site in fe.find_sites(model, inputs)]))
    return model, inputs


def random_half(seed: int) -> Callable[[list[str]], list[str]]:
    """Pick half of the names."""
    return lambda names: random.Random(seed).sample(names, len(names) // 2)


def inside_blocks(names: list[str]) -> list[str]:
    """Pick the activations inside of the blocks of mobilenet_v2."""
    return [name for name in names if ".conv." in name]


def mobilenet_blocks(batch: int) -> dict[str, Case]:
    """Return each block of mobilenet_v2 that has an expansion, both of its activations linearised, and its input at 224²."""
    model, (images,) = vision("mobilenet_v2", 224, batch)
    x: Tensor = images
    blocks: dict[str, Case] = {}
    for index, module in enumerate(model.features):  # type: ignore[arg-type]
        if len(getattr(module, "conv", ())) == 4:
            blocks[f"features.{index}"] = linearised((module, (x,)), lambda names: names)
        with torch.no_grad():
            x = module(x)
    return blocks


def vit_mlp(batch: int) -> Case:
    """Return the MLP of a ViT-B layer, its GELU linearised, and its tokens."""
    mlp = vision("vit_b_16", 224, 1)[0].encoder.layers[0].mlp  # type: ignore[index, union-attr]
    return linearised((mlp, (torch.randn(batch, 197, 768),)), lambda names: names)
