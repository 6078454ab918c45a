"""Measure inference while collecting, and the published procedure, against plain inference: time in turns, and peak memory.

python bench/record_collect.py [--rounds N] [--name NAME] [MODEL …]

The models are torchvision's, by default the four of collect_peers.py, in float32 with random weights, 224 x 224, batch 16.
With a name the record is kept as bench/results/collect-NAME.json. The profiler writes messages of its own to stderr.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from collect_peers import MODELS, PROCEDURES, collecting, load_model, plain, published
from records import save_record
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastentropy as fe
from fastentropy.isolation import copy_sharing_tensors


def main() -> None:
    """Print one line for each model, and write the file if it has a name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=24, help="2 at least; a multiple of 6 has all orders alike")
    parser.add_argument("--name")
    options = parser.parse_args()
    cases = []
    for name in options.models or MODELS:
        cases.append(measure(name, options.rounds))
        print(line(cases[-1]), flush=True)
    if options.name:
        save_record(f"collect-{options.name}", "cpu", rounds=options.rounds, cases=cases)


@torch.inference_mode()
def measure(name: str, rounds: int) -> dict[str, object]:
    """Return the milliseconds of every procedure, the ratios of paired repetitions, and the memory."""
    model, images = load_model(name), torch.randn(16, 3, 224, 224)
    with contextlib.ExitStack() as stack:
        runs = {procedure.__name__: stack.enter_context(procedure(copy_sharing_tensors(model))) for procedure in PROCEDURES}
        seconds = measure_pairs({key: partial(run, images) for key, run in runs.items()}, rounds)
    return {
        "model": name,
        "milliseconds": {key: 1e3 * statistics.median(values) for key, values in seconds.items()},
        "ratios_to_plain": {
            procedure.__name__: summarize_ratios(seconds[procedure.__name__], seconds[plain.__name__])
            for procedure in (collecting, published)
        },
        "memory_bytes": measure_memory(model, images),
    }


def measure_pairs(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each function in each repetition, which runs all of them once, in an order that changes."""
    for function in (*functions.values(), *functions.values()):
        function()
    seconds: dict[str, list[float]] = {key: [] for key in functions}
    for order in itertools.islice(itertools.cycle(itertools.permutations(functions)), rounds):
        for key in order:
            start = time.perf_counter()
            functions[key]()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def summarize_ratios(seconds: list[float], plain_seconds: list[float]) -> dict[str, float]:
    """Return the quartiles of the repetitions' own ratios: the second is the result, the others show the noise."""
    ratios = [one / other for one, other in zip(seconds, plain_seconds, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def measure_memory(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Return the peaks of one forward pass in bytes, what collecting adds to plain inference, and what it may add.

    `first_pass` is that of a collector's first pass, in which it finds the sites and makes the counters; in every later one the
    counters are there before the pass begins, so they are added to its peak.
    """
    bytes_of = {}
    for procedure in PROCEDURES:
        with procedure(copy_sharing_tensors(model)) as run:
            run(images)
            bytes_of[procedure.__name__] = peak_bytes(partial(run, images))
    collector = fe.collect(model)

    def first_pass() -> None:
        with collector:
            model(images)

    bytes_of["first_pass"] = peak_bytes(first_pass)
    sites = collector.compute().values()
    bytes_of["counters"] = sum(site.counts.nbytes for site in sites)
    bytes_of["largest_activation"] = images.element_size() * max(int(site.counts.sum()) + site.nan for site in sites)
    later_pass = bytes_of[collecting.__name__] + bytes_of["counters"]
    bytes_of["added_by_collecting"] = max(bytes_of["first_pass"], later_pass) - bytes_of[plain.__name__]
    bytes_of["may_be_added"] = bytes_of["counters"] + bytes_of["largest_activation"]
    return bytes_of


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most that PyTorch's CPU allocator held at a time of what it gave out during a call.

    Every allocation and every release is an event with its address in the profiler's trace. Releases of older blocks are left
    out. Memory that an operator takes from the system by itself is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    blocks: dict[int, int] = {}
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            blocks[address] = size
            held += size
            peak = max(peak, held)
        else:
            held -= blocks.pop(address, 0)
    return peak


def line(case: dict) -> str:
    """Show one model."""
    ratios = "   ".join(
        f"{name} / plain {ratio['median']:.3f} ({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"
        for name, ratio in case["ratios_to_plain"].items()
    )
    memory = {name: size / 1e6 for name, size in case["memory_bytes"].items()}
    return (
        f"{case['model']:12} plain {case['milliseconds']['plain']:.1f} ms   {ratios}   peak {memory['plain']:.2f} MB, "
        f"collecting {memory['added_by_collecting']:+.2f} MB (may be {memory['may_be_added']:+.2f}), "
        f"published {memory['published'] - memory['plain']:+.2f} MB"
    )


if __name__ == "__main__":
    main()
