"""Whole networks as their users call them: the model, what `fuse` returns for it, and torch.compile with frozen weights.

A network is measured dense, with a random half of its activations linearised (replaced by the identity), or with those of all
its blocks or MLPs linearised.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fastentropy.benchmarks.measurements import Case, name_case
from fastentropy.benchmarks.networks import (
    Network,
    bert,
    frozen,
    gpt2,
    hugging_face_vit,
    in_onnx_runtime,
    infer,
    inside_blocks,
    linearised,
    moved,
    random_half,
    randomize_batch_norm,
    timm_network,
    vision,
)
from fastentropy.fusion.api import fuse
from fastentropy.fusion.backends import Backend
from fastentropy.fusion.fused_model import FusedModel

TORCHVISION = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "vgg16_bn", "swin_t",
    "vit_b_16",
)  # fmt: skip
TIMM = ("fastvit_t8", "repvgg_a0", "mobileone_s0", "poolformer_s12", "mixer_s16_224", "levit_128s")
HUGGING_FACE = {
    "hugging face vit": partial(hugging_face_vit, 224, layers=12),
    "bert": partial(bert, 128, layers=12),
    "gpt2": partial(gpt2, 128, layers=12),
}
NETWORKS = (*TORCHVISION, *TIMM, *HUGGING_FACE)

#: The batch size, and that of networks that take a second per image, or would take too much memory.
BATCH = 4
BATCHES = dict.fromkeys(("vgg16_bn", "convnext_tiny", "swin_t", "mixer_s16_224", *HUGGING_FACE), 1)

#: The operations that run what `fuse` returns, with the backend.
BACKENDS: dict[str, Backend] = {"fused": "eager", "fused, auto": "auto"}

#: Which activations are linearised, by the name of the variant. In "all", those of the MLPs or blocks are, if the network has
#: them, and otherwise all.
VARIANTS: dict[str, Callable[[Sequence[str]], Sequence[str]]] = {
    "dense": lambda names: [],
    "half": random_half,
    "all": lambda names: inside_blocks(names) or inside_mlps(names) or names,
}


def inside_mlps(names: Sequence[str]) -> Sequence[str]:
    """Return the names of the activations that are inside the MLPs of a transformer."""
    return [name for name in names if "mlp" in name or "intermediate" in name]


def whole_network(name: str) -> Network:
    """Return a network of `NETWORKS` with random weights, and its inputs."""
    batch = BATCHES.get(name, BATCH)
    if name in TORCHVISION:
        return randomize_batch_norm(vision(name, batch))
    return randomize_batch_norm(timm_network(name, batch) if name in TIMM else HUGGING_FACE[name](batch=batch))


def whole_network_case(name: str, variant: str, device: torch.device) -> Case:
    """Return the case of one network with random weights, as `network_case` does.

    Args:
        name: one of `NETWORKS`.
        variant: one of `VARIANTS`.
        device: the device to run on.
    """
    torch.manual_seed(0)
    dense = moved(whole_network(name), device, torch.float32)
    return network_case(f"{name} {variant}", dense[0], linearised(dense, VARIANTS[variant]))


def network_case(name: str, dense: nn.Module, network: Network) -> Case:
    """Return the case of one network: the model, what `fuse` returns in each backend, and what its user would run instead.

    The operations are "model" (as its user calls it), "fused" (backend="eager"), "fused, auto" (backend="auto"),
    "torch.compile" of the model, "torch.compile, dense" of the network before activations were linearised (both with frozen
    weights, and as CUDA graphs on a GPU), and on a CPU "ONNX Runtime" where it is installed.

    Args:
        name: the name of the network.
        dense: the network before activations were linearised.
        network: the model and its inputs.
    """
    model, inputs = network
    operations: dict[str, Callable[..., object]] = {"model": model}
    facts: dict[str, dict[str, Any]] = {}
    for operation, backend in BACKENDS.items():
        operations[operation], facts[operation] = _fused(model, inputs, backend)
    operations |= {"torch.compile": frozen(model), "torch.compile, dense": frozen(dense)}
    if inputs[0].device.type == "cpu":
        operations["ONNX Runtime"] = in_onnx_runtime(model, inputs)
    return Case(
        name_case(name, inputs[0].shape, next(model.parameters()).dtype),
        {operation: partial(infer, run, inputs) for operation, run in operations.items()},
        denominator="model",
        facts=facts,
        baselines=frozenset({"torch.compile", "torch.compile, dense", "ONNX Runtime"}),
    )


def _fused(model: nn.Module, inputs: tuple[Any, ...], backend: Backend) -> tuple[FusedModel, dict[str, Any]]:
    """Fuse a model, and return the result with what it cost: seconds, and the peak memory in bytes before and after."""
    device = inputs[0].device
    before, start = _peak_bytes(device), time.perf_counter()
    fused = fuse(model, inputs, backend=backend)
    report = fused.report
    return fused, {
        "seconds_to_fuse": time.perf_counter() - start,
        "peak_bytes_before": before,
        "peak_bytes": _peak_bytes(device),
        "weight_bytes": sum(value.nbytes for value in model.state_dict().values()),
        "choice": report.choice,
        "backend": report.backend,
        "times": report.times,
        "relative_error": report.max_relative_error,
        "notes": list(report.notes),
    }


def _peak_bytes(device: torch.device) -> int:
    """Return the largest memory that the process has had so far: that of its tensors on a GPU, all of it on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
