"""The networks of whole-model measurements: real architectures with random weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastentropy.sites.finding import find_sites
from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize

#: A model in eval mode and its inputs.
Network = tuple[nn.Module, tuple[Tensor, ...]]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
VISION = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16")


def vision(name: str, batch: int, size: int = 224) -> Network:
    """Return a model of torchvision and square images."""
    import torchvision

    options = {"image_size": size} if name.startswith("vit") else {}
    return _ready(torchvision.models.get_model(name, weights=None, **options)), (torch.randn(batch, 3, size, size),)


def gpt2(tokens: int, batch: int, layers: int) -> Network:
    """Return GPT-2 and random tokens."""
    import transformers

    config = transformers.GPT2Config(use_cache=False, n_layer=layers)
    return _ready(transformers.GPT2LMHeadModel(config)), (torch.randint(0, config.vocab_size, (batch, tokens)),)


def hugging_face_vit(size: int, batch: int, layers: int) -> Network:
    """Return Hugging Face's ViT-B and images."""
    import transformers

    config = transformers.ViTConfig(image_size=size, num_hidden_layers=layers)
    return _ready(transformers.ViTForImageClassification(config)), (torch.randn(batch, 3, size, size),)


def llama(batch: int) -> Network:
    """Return a Llama of 1.1 billion parameters, shaped as Llama 3.2 1B but for its vocabulary, and 1,024 tokens per row."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    return _ready(transformers.LlamaForCausalLM(config)), (torch.randint(0, config.vocab_size, (batch, 1024)),)


def mobilenet_blocks(batch: int) -> dict[str, Network]:
    """Return each block of mobilenet_v2 that has an expansion, with both activations linearised, and its input at 224²."""
    model, (x,) = randomize_batch_norm(vision("mobilenet_v2", batch))
    blocks: dict[str, Network] = {}
    for index, module in enumerate(model.features):  # type: ignore[arg-type]
        if len(getattr(module, "conv", ())) == 4:
            blocks[f"mobilenet_v2 features.{index}"] = linearised((module, (x,)), lambda names: names)
        with torch.no_grad():
            x = module(x)
    return blocks


def vit_mlp(batch: int) -> Network:
    """Return the MLP of a ViT-B layer, with its GELU linearised, and tokens."""
    mlp = vision("vit_b_16", 1)[0].encoder.layers[0].mlp  # type: ignore[index, union-attr]
    return linearised((mlp, (torch.randn(batch, 197, 768),)), lambda names: names)


def _ready(model: nn.Module) -> nn.Module:
    return model.eval()


def randomize_batch_norm(network: Network) -> Network:
    """Give batch norm random statistics as if trained, and random weights to linear layers that are initialised to zero."""
    for module in network[0].modules():
        if isinstance(module, BATCH_NORMS):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return network


def linearised(network: Network, pick: Callable[[Sequence[str]], Sequence[str]]) -> Network:
    """Return a copy of the network with the activations that `pick` selects from their names linearised."""
    model, inputs = network
    model = isolate(model, inputs)
    linearize(model, pick([site.name for site in find_sites(model, inputs)]))
    return model, inputs


def random_half(names: Sequence[str]) -> Sequence[str]:
    """Return a random half of the names, the same in every run."""
    return random.Random(0).sample(names, len(names) // 2)


def inside_blocks(names: Sequence[str]) -> Sequence[str]:
    """Return the activations inside the blocks of mobilenet_v2."""
    return [name for name in names if ".conv." in name]


def moved(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """Move the network to a device; floating-point weights and inputs also to a dtype."""
    model, inputs = network
    return model.to(device, dtype), tuple(value.to(device, dtype if value.is_floating_point() else None) for value in inputs)


@torch.inference_mode()
def infer(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> object:
    """Run a network, or a function that replaces it, on its inputs."""
    return run(*inputs)
