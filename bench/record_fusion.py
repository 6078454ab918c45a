"""Measure fused networks against the originals with batch norm folded, each in its fastest memory format, in turns.

python bench/record_fusion.py [--rounds N] [--name NAME] [--batch N] [CASE …]

Cases: blocks (each of mobilenet_v2 by itself), mobilenet (all blocks at once), mlp (of ViT-B), half (half of the activations of
ten models, picked at random); all by default. With a name the record is kept as bench/results/fusion-NAME.json.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from fusion_models import VISION, Case, gpt2, hugging_face_vit, inside_blocks, linearised, mobilenet_blocks, random_half, vision
from fusion_models import vit_mlp as mlp
from record_collect import measure_pairs
from records import save_record
from torch import nn

import fastentropy as fe
from fastentropy.fusion.chains import find_chains
from fastentropy.fusion.elements import operators
from fastentropy.fusion.inputs import clone
from fastentropy.fusion.tracing import export, in_channels_last, inference_module, rewrite, values_of


def main() -> None:
    """Print one line for each network, and write the file if it has a name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=["blocks", "mlp", "mobilenet", "half"])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="on cuda both sides are CUDA graphs")
    parser.add_argument("--name")
    options = parser.parse_args()
    cases = []
    for name, case in networks(options.cases, options.batch):
        case = case[0].to(options.device), tuple(value.to(options.device) for value in case[1])
        cases.append({"name": name, "batch": options.batch, **measure(case, options.rounds)})
        print(line(cases[-1]), flush=True)
        if options.name:  # what is measured stays, if it ends before all is
            save_record(f"fusion-{options.name}", options.device, rounds=options.rounds, cases=cases)


def networks(kinds: list[str], batch: int) -> Iterator[tuple[str, Case]]:
    """Yield each case by name; weights and inputs are the same in every run."""
    torch.manual_seed(0)
    if "blocks" in kinds:
        for name, case in mobilenet_blocks(batch).items():
            yield f"mobilenet_v2 {name}", case
    if "mlp" in kinds:
        yield "vit_b_16 MLP", mlp(batch)
    if "mobilenet" in kinds:
        yield "mobilenet_v2 all blocks", linearised(vision("mobilenet_v2", 224, batch), inside_blocks)
    if "half" in kinds:
        for name in VISION:
            yield f"{name} half", linearised(vision(name, 224, batch), random_half(0))
        yield "Hugging Face GPT-2 half", linearised(gpt2(128, batch), random_half(0))
        yield "Hugging Face ViT half", linearised(hugging_face_vit(224, batch), random_half(0))


@torch.inference_mode()
def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Return the times of the folded and of the fused network, the ratio of paired repetitions, and what both multiply."""
    model, inputs = case
    start = time.perf_counter()
    with torch.inference_mode(False):
        fused = fe.fuse(model, inputs)
        seconds_to_fuse = time.perf_counter() - start
        folded = folded_forms(model, inputs)
    seconds = measure_pairs({name: runnable(form, inputs) for name, form in {**folded, "fused": fused}.items()}, rounds)
    best = min(folded, key=lambda name: statistics.median(seconds[name]))
    ratios = [one / other for one, other in zip(seconds[best], seconds["fused"], strict=True)]
    lower, median, upper = statistics.quantiles(ratios, method="inclusive")
    chosen = [(chain.candidates["keep"], chain.candidates[chain.choice]) for chain in fused.report.chains if chain.candidates]
    return {
        "milliseconds": {"folded": 1e3 * statistics.median(seconds[best]), "fused": 1e3 * statistics.median(seconds["fused"])},
        "memory_format_of_folded": best,
        "folded_over_fused": {"median": median, "lower_quartile": lower, "upper_quartile": upper},
        "choice": fused.report.choice,
        "relative_error": fused.report.max_relative_error,
        "multiplications_in_chains": {
            "folded": sum(keep.multiplications for keep, _ in chosen),
            "fused": sum(choice.multiplications for _, choice in chosen),
        },
        "seconds_to_fuse": seconds_to_fuse,
    }


def runnable(form: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """Return a call of a network, on a GPU the replay of its CUDA graph, to its end."""
    if not inputs[0].is_cuda:
        return partial(form, *inputs)
    for _ in range(3):
        form(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form(*inputs)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def folded_forms(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, nn.Module]:
    """Return the network with batch norm folded and nothing else changed, in each memory format that it runs in."""
    traced = inference_module(export(model, inputs))
    chains = [chain for chain in find_chains(traced) if len(operators(chain.elements)) > 1]
    forms: dict[str, nn.Module] = {}
    for name, graph in {"contiguous": traced, "channels_last": in_channels_last(traced)}.items():
        if graph is not None:
            sources = values_of(graph, [chain.source for chain in chains], clone(inputs))
            forms[name] = rewrite(graph, chains, [chain.folded for chain in chains], sources)
    return forms


def line(case: dict[str, Any]) -> str:
    """Show one network."""
    ratio, counts = case["folded_over_fused"], case["multiplications_in_chains"]
    fewer = counts["folded"] / counts["fused"] if counts["fused"] else math.nan
    return (
        f"{case['name']:24} folded {case['milliseconds']['folded']:.2f} ms, fused {case['milliseconds']['fused']:.2f} ms: "
        f"{ratio['median']:.2f} times as fast ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f}), "
        f"{fewer:.2f} times fewer multiplications in chains, error {case['relative_error']:.0e}, "
        f"kept {case['choice']}, in {case['seconds_to_fuse']:.0f} s"
    )


if __name__ == "__main__":
    main()
