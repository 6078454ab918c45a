"""Measure inference while collecting against plain inference on a GPU, in bfloat16: eagerly and as CUDA graphs, in turns.

python bench/record_collect_gpu.py [--rounds N] [--name NAME] [MODEL …]

The models are resnet18 (224 x 224, batch 256) and llama, a decoder of 1.1 billion parameters (batch 8 of 1,024 tokens), both
with random weights. Eagerly the published procedure is measured, too. With a name the record is kept as
bench/results/collect-NAME.json.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
import transformers
from collect_peers import PROCEDURES, collecting, load_model, plain
from record_collect import measure_pairs, summarize_ratios
from records import save_record
from torch import Tensor, nn

from fastentropy.isolation import copy_sharing_tensors


def resnet18() -> tuple[nn.Module, Tensor]:
    """Return torchvision's network and images."""
    return load_model("resnet18").to("cuda", torch.bfloat16), torch.randn(256, 3, 224, 224, device="cuda", dtype=torch.bfloat16)


def llama() -> tuple[nn.Module, Tensor]:
    """Return a Llama of 16 layers, the shape of Llama 3.2 1B but for its vocabulary, and tokens."""
    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        return model, torch.randint(0, config.vocab_size, (8, 1024))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"resnet18": resnet18, "llama": llama}


def main() -> None:
    """Print one line for each model, and write the file if it has a name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--name")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("Error: record_collect_gpu.py measures on a GPU, and PyTorch sees none here; record_collect.py is for the CPU")
    cases = []
    for name in options.models:
        cases.append(measure(name, options.rounds))
        print(line(cases[-1]), flush=True)
    if options.name:
        save_record(f"collect-{options.name}", "cuda", rounds=options.rounds, cases=cases)


@torch.inference_mode()
def measure(name: str, rounds: int) -> dict[str, object]:
    """Return the milliseconds of every way to run a network, and the ratios of paired repetitions to the plain one."""
    model, inputs = NETWORKS[name]()
    with contextlib.ExitStack() as stack:
        runs = dict(ways(model, inputs, stack))
        seconds = measure_pairs(runs, rounds)
        peaks = {key: peak_bytes(run) for key, run in runs.items() if "graph" not in key}
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "inputs": list(inputs.shape),
        "milliseconds": {key: 1e3 * statistics.median(values) for key, values in seconds.items()},
        "ratios_to_plain": {
            key: summarize_ratios(values, seconds["plain graph" if "graph" in key else "plain"])
            for key, values in seconds.items()
            if not key.startswith("plain")
        },
        "peak_bytes": peaks,
    }


def ways(model: nn.Module, inputs: Tensor, stack: contextlib.ExitStack) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each procedure, and the CUDA graphs of those that do not wait for the GPU themselves; each runs to its end."""
    for procedure in PROCEDURES:
        run = stack.enter_context(procedure(copy_sharing_tensors(model)))
        yield procedure.__name__, finished(partial(run, inputs))
        if procedure in (plain, collecting):
            for _ in range(3):
                run(inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run(inputs)
            yield f"{procedure.__name__} graph", finished(graph.replay)


def finished(run: Callable[[], object]) -> Callable[[], None]:
    """Make a function that returns when the GPU has done what it was asked for."""

    def run_to_its_end() -> None:
        run()
        torch.cuda.synchronize()

    return run_to_its_end


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that tensors took on the GPU during a call, those that were there before included."""
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()


def line(case: dict) -> str:
    """Show one model."""
    ratios = "\n".join(
        f"    {name:16} / plain {ratio['median']:.3f} ({ratio['lower_quartile']:.3f} to {ratio['upper_quartile']:.3f})"
        for name, ratio in case["ratios_to_plain"].items()
    )
    times = case["milliseconds"]
    return f"{case['model']}: plain {times['plain']:.2f} ms, as a CUDA graph {times['plain graph']:.2f} ms\n{ratios}"


if __name__ == "__main__":
    main()
