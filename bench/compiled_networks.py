"""Collect on compiled networks and in eager mode, and compare: names, counts, compilations and graph breaks.

    python bench/compiled_networks.py [--backend aot_eager] [network …]

A line for each network: its sites, states that differ (floating-point rounding may move a value across 0), compilations at the
first and at the second attachment, and graph breaks besides those of the plain network. The exit status is 1 if any of them is
not as expected.
"""

import argparse
import copy
import sys
import warnings
from typing import Any

import torch
import torchvision
import transformers
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters as dynamo_counters

import fastentropy as fe

VISION = (
    "alexnet",
    "vgg11_bn",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mnasnet0_5",
    "resnet18",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "regnet_y_400mf",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "convnext_tiny",
    "vit_b_32",
    "swin_t",
    "maxvit_t",
)
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
TEXT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Gemma", "Phi", "StableLm", "Olmo", "Cohere", "GPTNeoX"), DECODER),
    **dict.fromkeys(("Bert", "Roberta", "Electra"), SMALL),
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "use_cache": False},
    "OPT": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16},
    "DistilBert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
}


def make(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return a network in eval mode with random weights, and the arguments of a call."""
    torch.manual_seed(0)
    if name in VISION:
        side = {"inception_v3": 96, "swin_t": 224, "maxvit_t": 224, "vit_b_32": 224}.get(name, 64)
        return getattr(torchvision.models, name)(weights=None).eval(), (torch.randn(2, 3, side, side),), {}
    config = getattr(transformers, f"{name}Config")(vocab_size=50, pad_token_id=0, **TEXT[name])
    model = getattr(transformers, f"{name}Model")(config).eval()
    return model, (), {"input_ids": torch.randint(1, 50, (2, 9))}


def compare(name: str, backend: str) -> bool:
    """Collect on a network in both ways, print a line, and return whether all is as expected."""
    torch.compiler.reset()
    model, args, kwargs = make(name)
    plain, graphs = copy.deepcopy(model), []

    def noting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    def run(network: nn.Module, times: int = 4) -> None:
        for _ in range(times):
            network(*args, **kwargs)

    with torch.no_grad():
        with fe.collect(plain) as expected:
            run(plain)
        compiled = torch.compile(model, backend=noting)
        dynamo_counters.clear()
        run(compiled, 1)
        breaks, usual = sum(dynamo_counters["graph_break"].values()), len(graphs)
        found, compilations = [], []
        for _ in range(2):
            graphs.clear()
            dynamo_counters.clear()
            with fe.collect(compiled) as collector:
                run(compiled)
            found.append(collector.compute())
            compilations.append(len(graphs))
            breaks = max(0, sum(dynamo_counters["graph_break"].values()) - breaks)
        graphs.clear()
        run(compiled, 1)
        compilations.append(len(graphs))
    sites = expected.compute()
    same = all(list(each) == list(sites) for each in found)
    moved = sum(int((found[0][each].counts - sites[each].counts).abs().sum()) // 2 for each in sites) if same else -1
    total = sum(int(site.counts.sum()) for site in sites.values())
    good = same and moved * 100_000 <= total and compilations == [usual, 0, 0] and not breaks and not found[0].notes
    print(f"{'ok   ' if good else 'WRONG'} {name}: {len(sites)} sites, {moved} of {total} states differ, {usual} graphs, "
          f"compilations {compilations}, further graph breaks {breaks} {'; '.join(found[0].notes)}", flush=True)  # fmt: skip
    return good


def main() -> None:
    """Compare all networks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*VISION, *TEXT])
    parser.add_argument("--backend", default="aot_eager")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    good = True
    for name in options.networks:
        try:
            good &= compare(name, options.backend)
        except Exception as error:
            good = False
            print(f"WRONG {name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
