"""Measure how collecting statistics scales to 1, 2 and 4 processes on a CPU.

python bench/record_calibrate.py [--rounds N] [--name NAME]

Two things are measured: the tokens per second with and without collecting, and the time to sum the counters over all processes
(ranks). The model is a Llama of 32 million random parameters. Each process runs it on 8 rows of 256 tokens, with one thread.
The sum is measured twice: for the counters of this model, and for as many counters as a decoder of seven billion parameters
has. With --name the record is written to bench/results/calibrate-NAME.json.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from records import save_record
from torch import nn

import fastentropy as fe
from fastentropy._utils.text import plural
from fastentropy._utils.timing import measure_seconds
from fastentropy.benchmarks.measurements import Quartiles
from fastentropy.collector.distributed import sum_over_ranks
from fastentropy.sites.sharding import RankShare

PROCESSES = (1, 2, 4)
ROWS, TOKENS = 8, 256
SYNCS = 21
#: The number of layers of Llama 7B, and of neurons per layer.
LARGE = (32, 11008)


def main() -> None:
    """Measure every number of processes, print a line for each, and write the record if --name is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for processes in PROCESSES:
        cases.append(measure(processes, options.rounds))
        print(line(cases[-1]), flush=True)
    if options.name:
        save_record(f"calibrate-{options.name}", "cpu", rounds=options.rounds, rows=ROWS, tokens=TOKENS, cases=cases)


def measure(processes: int, rounds: int) -> dict[str, object]:
    """Start this number of processes, and return what they measured in this number of rounds, for the record."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (processes, rounds, folder), nprocs=processes)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    passes = {
        key: [max(of_ranks) for of_ranks in zip(*(rank[key] for rank in ranks), strict=True)] for key in ("plain", "collecting")
    }
    ratios = [one / other for one, other in zip(passes["collecting"], passes["plain"], strict=True)]
    first = ranks[0]
    return {
        "processes": processes,
        "tokens_per_second": {key: processes * ROWS * TOKENS / statistics.median(seconds) for key, seconds in passes.items()},
        "collecting_over_plain": Quartiles.of(ratios)._asdict(),
        "counter_bytes": first["counter_bytes"],
        "sync_milliseconds": 1e3 * statistics.median(first["sync"]),
        "large_counter_bytes": 24 * LARGE[0] * LARGE[1],
        "large_sync_milliseconds": 1e3 * statistics.median(first["large sync"]),
    }


def work(rank: int, processes: int, rounds: int, folder: str) -> None:
    """Measure in one process, and save the seconds to a file.

    The same batch is run with and without collecting, in alternation. Then counters are summed over all processes.

    Args:
        rank: the number of this process, from 0.
        processes: the number of processes.
        rounds: the number of passes of each kind that are measured.
        folder: the folder of the file, which is named after the rank.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    model, inputs = llama(rank)
    collector = fe.collect(model)
    seconds: dict[str, list[float]] = {"plain": [], "collecting": []}
    with torch.inference_mode():
        for index in range(rounds + 3):  # the first three rounds compile
            for key in sorted(seconds, reverse=index % 2 == 1):
                if key == "collecting":
                    collector.attach()
                dist.barrier()
                taken = measure_seconds(partial(model, **inputs))
                collector.detach()
                if index >= 3:
                    seconds[key].append(taken)
    layers, neurons = LARGE
    large = fe.Statistics(
        {str(layer): fe.SiteStatistics("silu", torch.ones(neurons, 3, dtype=torch.int64)) for layer in range(layers)}
    )
    shares = dict.fromkeys(large, RankShare(0, neurons))
    seconds["sync"] = [measure_seconds(collector.sync) for _ in range(SYNCS)]
    seconds["large sync"] = [measure_seconds(partial(sum_over_ranks, large, shares, {})) for _ in range(SYNCS)]
    counter_bytes = sum(site.counts.nbytes for site in collector.compute().values())
    torch.save({**seconds, "counter_bytes": counter_bytes}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def llama(rank: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the model, which is the same in all processes, and the arguments of a call, which differ between processes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(rank))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "logits_to_keep": 1}


def line(case: dict) -> str:
    """Return the figures of one number of processes as a line of text."""
    speed, ratio = case["tokens_per_second"], case["collecting_over_plain"]
    return (
        f"{plural(case['processes'], 'process', 'processes')}: {speed['plain']:.0f} tokens per second, "
        f"collecting {speed['collecting']:.0f}; time "
        f"{ratio['median']:.3f} ({ratio['lower']:.3f} to {ratio['upper']:.3f}); sum over ranks of "
        f"{case['counter_bytes'] / 1e6:.2f} MB {case['sync_milliseconds']:.1f} ms, of "
        f"{case['large_counter_bytes'] / 1e6:.2f} MB {case['large_sync_milliseconds']:.1f} ms"
    )


if __name__ == "__main__":
    main()
