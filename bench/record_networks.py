"""Measure whole networks: what `fuse` returns, next to the model as given and to torch.compile with frozen weights.

python bench/record_networks.py [--networks mobilenet_v2 vit_b_16] [--variants half all] [--name networks-MACHINE]

Each case runs in a process of its own, so that its peak memory is known. A line is printed for each case, and the record
bench/results/NAME.json grows by it. Cases that are in the record already are left out, so a run that was stopped goes on, and
the networks can be measured in any order. All of them take some hours.
"""

import argparse
import multiprocessing
from dataclasses import replace

import torch
from records import RESULTS

from fastentropy.benchmarks.measurements import Measurement, measure
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.whole_networks import NETWORKS, VARIANTS, whole_network_case


def main() -> None:
    """Measure the cases that are named, and keep the record if --name is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--variants", nargs="*", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", help="keep the record as bench/results/NAME.json, or at an absolute path")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [default: cpu]")
    arguments = parser.parse_args()
    path = RESULTS / f"{arguments.name}.json"
    command = f"python bench/record_networks.py --name {arguments.name}"
    record = Record.load(path) if arguments.name and path.exists() else Record.begin("networks", arguments.device, command)
    context = multiprocessing.get_context("spawn")
    for name, variant in ((name, variant) for name in arguments.networks for variant in arguments.variants):
        if (name, variant) in known_cases(record):
            continue
        with context.Pool(1) as pool:
            measurements = pool.apply(measured, (name, variant, arguments.rounds, arguments.device))
        print(described(measurements), flush=True)
        record = record.with_more(measurements)
        if arguments.name:
            replace(record, complete=len(known_cases(record)) == len(NETWORKS) * len(VARIANTS)).save(path)


def known_cases(record: Record) -> set[tuple[str, ...]]:
    """Return the network and the variant of each case of a record."""
    return {tuple(case.split(", ")[0].rsplit(" ", 1)) for case in record.cases()}


def measured(name: str, variant: str, rounds: int, device: str) -> list[Measurement]:
    """Return the measurements of one case, in one thread."""
    torch.set_num_threads(1)
    return measure(whole_network_case(name, variant, torch.device(device)), rounds=rounds, budget_seconds=40)


def described(measurements: list[Measurement]) -> str:
    """Return a line with the time of each operation of a case relative to that of the model, and what fusing cost."""
    ratios = [f"{each.operation} {each.ratio.median:.2f}" for each in measurements if each.ratio and each.operation != "model"]
    (fused,) = (each for each in measurements if each.operation == "fused")
    facts = fused.facts
    megabytes = (facts["peak_bytes"] - facts["peak_bytes_before"]) / 1e6
    costs = f"fused in {facts['seconds_to_fuse']:.0f} s, {megabytes:.0f} MB for {facts['weight_bytes'] / 1e6:.0f} MB of weights"
    return f"{fused.case}: {', '.join(ratios)}; {costs}, kept {facts['choice']}"


if __name__ == "__main__":
    main()
