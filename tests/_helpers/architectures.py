"""Architectures as they are published, with random weights and small inputs, for tests that hold on every network.

Architectures that are not here, each with its reason. None of them is known to fail.

- retinanet, fcos, ssd, mask and keypoint R-CNN: faster_rcnn stands for them.
- mvit: needs 16 frames of 224² pixels, seconds per pass; swin3d_t stands for transformers on videos.
- torchvision's quantized models: converting them folds their activations into quantized operators.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests._helpers.oracle import Call, recorded_calls

Inputs = tuple[Any, ...] | dict[str, Any]
Mode = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Architecture:
    """A model with random weights, inputs for a batch of some size, and how many rectifiers the published code calls.

    widths: the neurons of calls that do not take all channels which the last module made, see `oracle.recorded_calls`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    calls: int
    widths: Mapping[str, int] = field(default_factory=dict)


def images(*size: int) -> Callable[[int], Inputs]:
    """Random images of height and width, or videos of frames, height and width."""
    return lambda batch: (torch.randn(batch, 3, *size),)


def tokens(*names: str) -> Callable[[int], Inputs]:
    """Seven random tokens for each of some keyword arguments."""
    return lambda batch: {name: torch.randint(3, 50, (batch, 7)) for name in names or ("input_ids",)}


def torchvision_model(name: str, calls: int, *size: int, **options: Any) -> Architecture:
    """A model of torchvision's registry; 72 pixels become 36, 18, 9, 5 and 3, which no model has as its number of channels."""
    options = {"weights": None, "num_classes": 10} | options
    return Architecture(name, lambda: torchvision.models.get_model(name, **options), images(*(size or (72, 72))), calls=calls)


def hugging_face_model(
    kind: str,
    calls: int,
    inputs: Callable[[int], Inputs],
    head: str = "",
    widths: Mapping[str, int] | None = None,
    **sizes: Any,
) -> Architecture:
    """A model type of transformers by its configuration's name; head is the model class, if not the one of AutoModel."""

    def build() -> nn.Module:
        config = transformers.AutoConfig.for_model(kind, **sizes)
        return getattr(transformers, head)(config) if head else transformers.AutoModel.from_config(config)

    return Architecture(f"hf_{kind}_{head}".rstrip("_"), build, inputs, calls, widths or {})


def timm_model(name: str, calls: int, size: int = 72, **options: Any) -> Architecture:
    """A model of timm, skipped where timm is not installed."""
    return Architecture(
        f"timm_{name}",
        lambda: pytest.importorskip("timm").create_model(name, num_classes=10, **options),
        images(size, size),
        calls,
    )


TORCHVISION = [
    torchvision_model("alexnet", 7),
    torchvision_model("convnext_tiny", 18),
    torchvision_model("deeplabv3_mobilenet_v3_large", 46, weights_backbone=None),
    torchvision_model("densenet121", 121),
    torchvision_model("efficientnet_b0", 49),
    torchvision_model("efficientnet_v2_s", 102),
    torchvision_model("googlenet", 57, init_weights=False),
    torchvision_model("inception_v3", 94, 139, 139, init_weights=False),
    torchvision_model("lraspp_mobilenet_v3_large", 40, weights_backbone=None),
    torchvision_model("mnasnet1_0", 35),
    torchvision_model("mobilenet_v2", 35),
    torchvision_model("mobilenet_v3_large", 40),
    torchvision_model("mobilenet_v3_small", 33),
    torchvision_model("r3d_18", 17, 4, 40, 40),
    torchvision_model("regnet_x_400mf", 67),
    torchvision_model("regnet_y_400mf", 65),
    torchvision_model("resnet18", 17),
    torchvision_model("resnet50", 49),
    torchvision_model("resnext50_32x4d", 49),
    torchvision_model("shufflenet_v2_x1_0", 37),
    torchvision_model("squeezenet1_1", 26),
    torchvision_model("swin3d_t", 12, 4, 64, 64),
    torchvision_model("swin_t", 12),
    torchvision_model("swin_v2_t", 24),  # the 12 of the MLPs, and one in each block's position bias, where there is no batch
    torchvision_model("vgg16_bn", 15, init_weights=False),
    Architecture(
        "faster_rcnn",
        lambda: torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=96
        ),
        lambda batch: ([torch.rand(3, 90, 70) for _ in range(batch)],),
        calls=44,
    ),
    Architecture(
        "maxvit_t",  # with partitions of 3 by 3 instead of 7 by 7, for images of 96 pixels instead of 224
        lambda: torchvision.models.MaxVit(
            input_size=(96, 96),
            stem_channels=64,
            partition_size=3,
            block_channels=[64, 128, 256, 512],
            block_layers=[2, 2, 5, 2],
            head_dim=32,
            stochastic_depth_prob=0.2,
        ),
        images(96, 96),
        calls=56,
    ),
    Architecture(
        "raft_small",
        lambda: torchvision.models.optical_flow.raft_small(weights=None),
        lambda batch: (*torch.randn(2, batch, 3, 136, 152), 2),  # two images, two refinements
        calls=61,
        widths={"relu": 64},  # F.relu takes 64 of the 160 channels of the context encoder; all others are modules
    ),
    Architecture(
        "vit_b_16",  # an eighth as wide
        lambda: torchvision.models.VisionTransformer(
            image_size=64, patch_size=16, num_layers=12, num_heads=12, hidden_dim=96, mlp_dim=384
        ),
        images(64, 64),
        calls=12,
    ),
]

# No two axes of a model are of the same size: batches of 2 and 3, 7 tokens, 24 channels, 40 neurons.
TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 1, "head_dim": 12}
IMAGE = TEXT | {"image_size": 32, "patch_size": 8}
# The experts of a mixture are no modules: the last module before them is the router.
MIXTURE = GROUPED | {"num_local_experts": 3, "widths": {"*.act_fn*": 40}}
SEQ2SEQ: dict[str, Any] = {"vocab_size": 50, "d_model": 24, "d_ff": 40, "d_kv": 12, "num_layers": 2, "num_heads": 2}
STACKS: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "decoder_start_token_id": 1,
}
SPEECH = STACKS | {"num_mel_bins": 10, "max_source_positions": 15, "max_target_positions": 20}

HUGGING_FACE = [
    hugging_face_model("albert", 2, tokens(), **TEXT, embedding_size=12),
    hugging_face_model("bart", 4, tokens("input_ids", "decoder_input_ids"), **TEXT | STACKS),
    hugging_face_model("bert", 2, tokens(), **TEXT),
    hugging_face_model("bert", 3, tokens(), "BertForMaskedLM", **TEXT),
    hugging_face_model(
        "clip",
        4,
        lambda batch: tokens()(batch) | {"pixel_values": torch.randn(batch, 3, 32, 32)},
        text_config=TEXT,
        vision_config=IMAGE,
    ),
    hugging_face_model("convnext", 8, images(64, 64), hidden_sizes=[24, 32, 40, 48], depths=[2, 2, 2, 2]),
    hugging_face_model("deit", 2, images(32, 32), **IMAGE),
    hugging_face_model("distilbert", 2, tokens(), vocab_size=50, dim=24, hidden_dim=40, n_layers=2, n_heads=2),
    hugging_face_model("electra", 3, tokens(), "ElectraForMaskedLM", **TEXT, embedding_size=12),
    hugging_face_model("falcon", 2, tokens(), **TEXT, ffn_hidden_size=40),
    hugging_face_model("gemma2", 2, tokens(), **GROUPED),
    hugging_face_model("gemma3_text", 2, tokens(), **GROUPED),
    hugging_face_model("gpt2", 2, tokens(), **TEXT, n_inner=40),
    hugging_face_model("gpt_neox", 2, tokens(), **TEXT),
    hugging_face_model("llama", 2, tokens(), **GROUPED),
    hugging_face_model("llama", 2, tokens(), "LlamaForCausalLM", **GROUPED),
    hugging_face_model("mistral", 2, tokens(), **GROUPED),
    hugging_face_model("mixtral", 2, tokens(), **MIXTURE, num_experts_per_tok=2),
    replace(  # one call for each expert, where the default has one call for all of them
        hugging_face_model("mixtral", 6, tokens(), **MIXTURE, num_experts_per_tok=3, experts_implementation="eager"),
        name="hf_mixtral_eager",
    ),
    hugging_face_model("mobilenet_v2", 35, images(72, 72)),
    hugging_face_model("opt", 2, tokens(), **TEXT, ffn_dim=40, word_embed_proj_dim=24),
    hugging_face_model("phi", 2, tokens(), **TEXT),
    hugging_face_model("phi3", 2, tokens(), **TEXT),
    hugging_face_model("qwen2", 2, tokens(), **GROUPED),
    hugging_face_model("resnet", 25, images(72, 72), embedding_size=24, hidden_sizes=[24, 32, 40, 48], depths=[2, 2, 2, 2]),
    hugging_face_model("roberta", 2, tokens(), **TEXT),
    hugging_face_model("roberta", 3, tokens(), "RobertaForMaskedLM", **TEXT),
    hugging_face_model(
        "swin", 4, images(64, 64), image_size=64, window_size=4, embed_dim=24, depths=[1, 1, 2], num_heads=[2, 2, 2]
    ),
    hugging_face_model("t5", 4, tokens("input_ids", "decoder_input_ids"), **SEQ2SEQ),
    replace(
        hugging_face_model("t5", 4, tokens("input_ids", "decoder_input_ids"), **SEQ2SEQ, feed_forward_proj="gated-gelu"),
        name="hf_t5_gated",
    ),
    hugging_face_model("vit", 2, images(32, 32), **IMAGE),
    hugging_face_model(
        "wav2vec2",
        5,  # of two convolutions of the waves, one of positions, and two feed-forward layers
        lambda batch: {"input_values": torch.randn(batch, 500)},
        **TEXT,
        conv_dim=(20, 32),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=2,
    ),
    hugging_face_model(
        "whisper",
        6,  # two of them functional, on the convolutions' [batch, channels, frames]
        lambda batch: {"input_features": torch.randn(batch, 10, 30)} | tokens("decoder_input_ids")(batch),
        **TEXT | SPEECH,
    ),
]

TIMM = [
    timm_model("convnext_atto", 12),
    timm_model("mobilenetv3_small_050", 33),
    timm_model("resnet10t", 11),
    timm_model("vit_tiny_patch16_224", 12, 64, img_size=64),
]

ARCHITECTURES = {architecture.name: architecture for architecture in (*TORCHVISION, *HUGGING_FACE, *TIMM)}
#: One with convolutions and a residual, and one with a gate.
QUICK = ("resnet18", "hf_llama")


def with_speed(value: Any, name: str):
    """Mark what is done with an architecture as slow, but for the quick ones."""
    return pytest.param(value, id=name, marks=[] if name in QUICK else pytest.mark.slow)


@dataclass(frozen=True, repr=False)
class Subject:
    """An architecture's model, batches of two sizes, and what it does with them when nobody collects."""

    architecture: Architecture
    model: nn.Module
    batches: list[Inputs]
    outputs: list[list[Tensor]]
    calls: list[Call]


def prepare(architecture: Architecture, mode: Mode) -> Subject:
    torch.manual_seed(0)
    model = architecture.build()
    as_trained(model, architecture.inputs(4))
    batches = [architecture.inputs(batch) for batch in (2, 3)]
    with mode():
        outputs = [outputs_of(model, inputs) for inputs in batches]
        first, second = (
            recorded_calls(model, functools.partial(outputs_of, model, inputs), architecture.widths) for inputs in batches
        )
    return Subject(architecture, model, batches, outputs, [one + other for one, other in zip(first, second, strict=True)])


@torch.no_grad()
def as_trained(model: nn.Module, inputs: Inputs) -> None:
    """As after some training: neurons that differ from each other, batch norms that know their inputs; in eval mode."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.03 * torch.randn_like(parameter)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
            module.train()
    outputs_of(model, inputs)
    model.eval()


def outputs_of(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors in what the model returns for positional or keyword inputs."""
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
