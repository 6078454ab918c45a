"""The cases of `fastentropy bench fuse`.

Each case times a network side by side: as it is, with batch norm folded, fused, in torch.compile with frozen weights (as it is
and fused), and on a CPU in ONNX Runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fastentropy._utils.timing import measure_times
from fastentropy.benchmarks.measurements import Case, name_case
from fastentropy.benchmarks.networks import (
    Network,
    frozen,
    in_onnx_runtime,
    infer,
    inside_blocks,
    linearised,
    mobilenet_blocks,
    moved,
    random_half,
    randomize_batch_norm,
    vision,
    vit_mlp,
)
from fastentropy.fusion.api import fuse
from fastentropy.fusion.forms import make_forms
from fastentropy.fusion.fused_model import FusedModel
from fastentropy.fusion.inputs import Inputs
from fastentropy.fusion.tracing import export, prepared_module

BATCH = 4
#: Networks in which a random half of the activations is linearised, which means replaced by the identity.
HALF = ("resnet18", "mobilenet_v2", "efficientnet_b0")
#: What needs a compiler or a further package.
BASELINES = frozenset({"fused, torch.compile", "torch.compile, frozen", "ONNX Runtime"})
FORMS = ("folded", "fused", "original", *sorted(BASELINES))


def fuse_cases(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sequence[int]) -> Iterator[Case]:
    """Yield a case for each network, dtype and batch size.

    Args:
        device: the device to run on.
        dtypes: the dtypes of the weights and inputs.
        sizes: the batch sizes; if empty, `BATCH`.
    """
    for dtype in dtypes:
        for batch in sizes or [BATCH]:
            torch.manual_seed(0)
            for name, network in _networks(batch):
                yield fuse_case(name, moved(network, device, dtype))


def _networks(batch: int) -> Iterator[tuple[str, Network]]:
    """Yield the networks by name.

    They are the MLP of ViT-B without its activation, whole networks with some linearised activations, and the blocks of
    mobilenet_v2 without their activations.
    """
    yield "vit_b_16 MLP", vit_mlp(batch)
    yield "mobilenet_v2 all blocks", linearised(randomize_batch_norm(vision("mobilenet_v2", batch)), inside_blocks)
    for name in HALF:
        yield f"{name} half", linearised(randomize_batch_norm(vision(name, batch)), random_half)
    yield from mobilenet_blocks(batch).items()


def fuse_case(name: str, network: Network) -> Case:
    """Return a case with all `FORMS` of one network. On a GPU they run as CUDA graphs, and there is no ONNX Runtime.

    Args:
        name: the name of the network.
        network: the model and its inputs.
    """
    model, inputs = network
    start = time.perf_counter()
    fused = fuse(model, inputs)
    facts = {"fused": {**_facts(fused), "seconds_to_fuse": time.perf_counter() - start}}
    gpu = inputs[0].device if inputs[0].is_cuda else None
    made, _ = make_forms(model, prepared_module(export(model, Inputs(inputs))), Inputs(inputs))
    in_each_format = {memory_format: form for (kind, memory_format), form in made.items() if kind == "folded"}
    format_of_folded, folded = _fastest(in_each_format, inputs, gpu)
    facts["folded"] = {"memory_format": format_of_folded}
    forms: dict[str, Callable[..., object]] = {"folded": folded, "fused": fused, "original": model}
    forms |= {"torch.compile, frozen": frozen(model), "fused, torch.compile": frozen(fused.network)}
    if gpu is None:
        forms["ONNX Runtime"] = in_onnx_runtime(model, inputs)
    title = name_case(name, inputs[0].shape, inputs[0].dtype)
    return Case(
        title if gpu is None else f"{title}, CUDA graphs",
        {form: partial(infer, run, inputs) for form, run in forms.items()},
        denominator="folded",
        facts=facts,
        graphs_on=gpu,
        baselines=BASELINES,
    )


def _fastest(forms: dict[str, nn.Module], inputs: tuple[Any, ...], gpu: torch.device | None) -> tuple[str, nn.Module]:
    times = measure_times({name: partial(infer, form, inputs) for name, form in forms.items()}, graphs_on=gpu)
    best = min(times, key=times.__getitem__)
    return best, forms[best]


def _facts(fused: FusedModel) -> dict[str, Any]:
    report = fused.report
    chosen = [(chain.candidates["keep"], chain.candidates[chain.choice]) for chain in report.chains if chain.candidates]
    return {
        "choice": report.choice,
        "relative_error": report.max_relative_error,
        "multiplications": sum(choice.multiplications for _, choice in chosen),
        "multiplications_folded": sum(keep.multiplications for keep, _ in chosen),
    }
