"""The networks on which whole models are measured: real architectures with random weights."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastentropy._compat import with_frozen_weights
from fastentropy.fusion.backends.onnx_runtime import run_session, session_of
from fastentropy.sites.finding import find_sites
from fastentropy.surgery.isolation import isolate
from fastentropy.surgery.linearization import linearize

#: A model in eval mode, and the positional inputs of one call.
Network = tuple[nn.Module, tuple[Tensor, ...]]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
VISION = ("resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_16")


def vision(name: str, batch: int, size: int = 224) -> Network:
    """Return the torchvision model with this name, and random images `[batch, 3, size, size]`."""
    import torchvision

    options = {"image_size": size} if name.startswith("vit") else {}
    return _ready(torchvision.models.get_model(name, weights=None, **options)), (
        torch.randn(batch, 3, size, size, device="cpu"),
    )


def timm_network(name: str, batch: int) -> Network:
    """Return the timm model with this name, and random images of its size."""
    import timm

    model = timm.create_model(name, pretrained=False)
    return _ready(model), (torch.randn(batch, *model.pretrained_cfg["input_size"], device="cpu"),)


def gpt2(tokens: int, batch: int, layers: int) -> Network:
    """Return GPT-2 with this number of layers, and random tokens `[batch, tokens]`."""
    import transformers

    config = transformers.GPT2Config(use_cache=False, n_layer=layers)
    return _ready(transformers.GPT2LMHeadModel(config)), (torch.randint(0, config.vocab_size, (batch, tokens), device="cpu"),)


def bert(tokens: int, batch: int, layers: int) -> Network:
    """Return BERT with this number of layers, and random tokens `[batch, tokens]`."""
    import transformers

    config = transformers.BertConfig(num_hidden_layers=layers)
    return _ready(transformers.BertModel(config)), (torch.randint(0, config.vocab_size, (batch, tokens), device="cpu"),)


def hugging_face_vit(size: int, batch: int, layers: int) -> Network:
    """Return Hugging Face's ViT-B with this number of layers, and random images `[batch, 3, size, size]`."""
    import transformers

    config = transformers.ViTConfig(image_size=size, num_hidden_layers=layers)
    return _ready(transformers.ViTForImageClassification(config)), (torch.randn(batch, 3, size, size, device="cpu"),)


def llama(batch: int) -> Network:
    """Return a Llama of 1.1 billion parameters, and random tokens `[batch, 1024]`.

    The model has the shape of Llama 3.2 1B, except for its vocabulary.
    """
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    return _llama(batch, 1024, num_key_value_heads=8, **sizes)


def small_llama(batch: int) -> Network:
    """Return a Llama of 16 million parameters with the proportions of Llama 3.2 1B, and random tokens `[batch, 128]`."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    return _llama(batch, 128, num_key_value_heads=2, vocab_size=1000, **sizes)


def _llama(batch: int, tokens: int, **sizes: Any) -> Network:
    """Return a Llama of some sizes, and random tokens `[batch, tokens]`."""
    import transformers

    config = transformers.LlamaConfig(use_cache=False, **sizes)
    return _ready(transformers.LlamaForCausalLM(config)), (torch.randint(0, config.vocab_size, (batch, tokens), device="cpu"),)


def mobilenet_blocks(batch: int) -> dict[str, Network]:
    """Return the blocks of mobilenet_v2 that have an expansion, without their activations.

    Both activations of a block are linearised, which means replaced by the identity. The inputs of a block are those that it
    gets in the whole network for random images `[batch, 3, 224, 224]`.

    Args:
        batch: the number of images.

    Returns:
        The blocks and their inputs, by names such as "mobilenet_v2 features.2".
    """
    model, (x,) = randomize_batch_norm(vision("mobilenet_v2", batch))
    blocks: dict[str, Network] = {}
    for index, module in enumerate(model.features):  # type: ignore[arg-type]
        if len(getattr(module, "conv", ())) == 4:
            blocks[f"mobilenet_v2 features.{index}"] = linearised((module, (x,)), lambda names: names)
        with torch.no_grad():
            x = module(x)
    return blocks


def vit_mlp(batch: int) -> Network:
    """Return the MLP of a ViT-B layer, with its GELU replaced by the identity, and random inputs `[batch, 197, 768]`."""
    mlp = vision("vit_b_16", 1)[0].encoder.layers[0].mlp  # type: ignore[index, union-attr]
    return linearised((mlp, (torch.randn(batch, 197, 768, device="cpu"),)), lambda names: names)


def _ready(model: nn.Module) -> nn.Module:
    return model.eval()


def randomize_batch_norm(network: Network) -> Network:
    """Give random values to weights and statistics that are constant in an untrained network. Return the network.

    Batch norm gets random statistics, weights and biases, as after a training. Linear layers whose weights are all zero get
    random weights.
    """
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
    """Return a copy of a network in which some activations are linearised, which means replaced by the identity.

    Args:
        network: the model and its inputs.
        pick: a function from the names of all activations, in call order, to the names of those to linearise.
    """
    model, inputs = network
    model = isolate(model, inputs)
    linearize(model, pick([site.name for site in find_sites(model, inputs)]))
    return model, inputs


def random_half(names: Sequence[str]) -> Sequence[str]:
    """Return a random half of the names, the same in every run."""
    return random.Random(0).sample(names, len(names) // 2)


def inside_blocks(names: Sequence[str]) -> Sequence[str]:
    """Return the names of the activations that are inside the blocks of mobilenet_v2."""
    return [name for name in names if ".conv." in name]


def moved(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """Move a network to a device, and convert its floating-point weights and inputs to a dtype. The model changes in place."""
    model, inputs = network
    return model.to(device, dtype), tuple(value.to(device, dtype if value.is_floating_point() else None) for value in inputs)


@torch.inference_mode()
def infer(run: Callable[..., object], inputs: tuple[Tensor, ...]) -> object:
    """Call a model, or a function that runs it, on its inputs in inference mode."""
    return run(*inputs)


def frozen(model: nn.Module) -> Callable[..., object]:
    """Return the model compiled by torch.compile with its weights as constants, and as a CUDA graph on a GPU.

    With constant weights, PyTorch folds batch norm and lays out the weights for the machine. Freezing must be switched on while
    the first call compiles. As an option of torch.compile it has no effect, because the weights have become inputs by then. The
    model is compiled as a single graph, so a model that cannot be compiled raises instead of running in eager mode.
    """
    on_gpu = any(value.is_cuda for value in model.state_dict().values())
    program, is_compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead" if on_gpu else None), False

    def run(*inputs: Any) -> object:
        nonlocal is_compiled
        if not is_compiled:
            with with_frozen_weights():
                program(*inputs)
            is_compiled = True
        return program(*inputs)

    return run


def in_onnx_runtime(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., object]:
    """Return a model as a session of ONNX Runtime, which the first call exports and starts."""

    @functools.cache
    def session() -> Any:
        return session_of(torch.export.export(model, inputs))

    return lambda *given: run_session(session(), list(given))
