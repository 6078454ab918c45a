"""The sections with measured figures of README.md and docs/results.md, as Markdown, by name.

A record is a JSON file in bench/results. Most sections are tables of one record. The argument `results` of the functions is the
path from the page to bench/results, for links.
"""

from collections.abc import Callable

from benchmark_sections import collecting, fusing, goals, kernels, speedups
from markdown_tables import load_json, origin, quartiles, table
from network_sections import idle_neurons, monitor, networks, pretrained, pretrained_criteria, pretrained_lead, whole_networks

from fastentropy._utils.text import format_percent, plural
from fastentropy.benchmarks.measurements import Quartiles

#: The networks with which the fused network of a pruning run is compared: key of its time in the history → text.
DIGITS = {"dense": "the dense network", "dense_fused": "that with batch norm folded", "pruned": "the pruned one before fusing"}


def digits(results: str) -> str:
    """Return a paragraph on the recorded run of `fastentropy prune digits`."""
    history = load_json("digits")
    dense, kept, times = history["steps"][0], history["steps"][history["kept_step"]], history["latency_ms"]
    removed = sum(len(step["removed"]) for step in history["steps"][: history["kept_step"] + 1])
    faster = [f"{times[name] / times['fused']:.2f}× as fast as {what}" for name, what in DIGITS.items()]
    machine = history["machine"]
    processor, _, threads = machine["device"].partition(", ")
    return (
        f"One run on an {processor} ({threads}), {machine['date']}, seed {history['seed']}: {removed} of "
        f"{plural(len(dense['layer_entropy']), 'activation')} removed, "
        f"test accuracy {format_percent(dense['test'])} % before and "
        f"{format_percent(kept['test'])} % after. A batch of 64 images takes the fused network {times['fused']:.2f} ms: "
        f"{faster[0]}, {faster[1]}, {faster[2]}. The relative error of its outputs is at most "
        f"{history['fusion']['max_relative_error']:.0e}. The record is [digits.json]({results}/digits.json)."
    )


def minilm(results: str) -> str:
    """Return a sentence on each recorded calibration of MiniLM, eager and compiled, and a table of its entropies."""
    eager, compiled = load_json("minilm"), load_json("minilm-compiled")
    machine = eager["machine"]
    begin = f"{machine['device']}, {machine['date']}: {eager['tokens']:,} tokens in {eager['documents']:,} documents."
    sentences = [_calibration_speed(eager, "Eagerly", "minilm", results)]
    sentences.append(_calibration_speed(compiled, "With `--compile`", "minilm-compiled", results))
    bits = eager["layer_entropy"]
    rows = [(name, f"{bits[name]:.3f}", f"{compiled['layer_entropy'][name]:.3f}") for name in bits]
    return f"{begin} {' '.join(sentences)}\n\n{table(('activation', 'entropy, bits', 'with `--compile`'), rows)}"


def _calibration_speed(record: dict, title: str, name: str, results: str) -> str:
    """Return a sentence on the speed of a recorded calibration."""
    overhead = record["overhead"]
    return (
        f"{title}, inference while collecting takes {overhead['ratio']:.3f} of the time without, median of "
        f"{plural(overhead['samples'], 'batch', 'batches')}, at {record['tokens_per_second']:.0f} tokens per second "
        f"([{name}.json]({results}/{name}.json))."
    )


def calibrate(results: str) -> str:
    """Return the table of `record_calibrate.py`: tokens per second and the time of a sum over ranks, by number of processes."""
    record = load_json("calibrate-epyc")
    rows = [
        (
            f"{case['processes']}",
            *(f"{case['tokens_per_second'][key]:.0f}" for key in ("plain", "collecting")),
            quartiles(Quartiles(**case["collecting_over_plain"]), 3),
            f"{case['sync_milliseconds']:.1f} ms",
            f"{case['large_sync_milliseconds']:.1f} ms",
        )
        for case in record["cases"]
    ]
    head = ("processes", "tokens per second", "while collecting", "time", "sum over ranks", "sum, 7 B")
    line = origin("calibrate-epyc", record["machine"], record["date"], record["commit"], record["command"], results)
    return f"{line}\n\n{table(head, rows)}"


def criteria(results: str) -> str:
    """Return the table of `record_criteria.py`, with a row for each limit and criterion."""
    record = load_json("criteria-epyc")
    seeds = {run["seed"] for run in record["runs"]}
    rows = [
        (
            f"{100 * float(limit):.1f}",
            criterion,
            f"{row['removed']:.1f}",
            f"{100 * row['test_change']:+.2f}",
            f"{row['speedup']:.2f} ({row['least_speedup']:.2f} to {row['most_speedup']:.2f})",
        )
        for limit, of_limit in record["summary"].items()
        for criterion, row in of_limit.items()
    ]
    head = (
        "validation may lose, points",
        "criterion",
        "removed, of 8",
        "test accuracy, points",
        "times as fast as dense, both fused (least to most)",
    )
    line = origin("criteria-epyc", record["machine"], record["date"], record.get("commit"), record["command"], results)
    means = f"Means over {plural(len(seeds), 'seed')}, schedules of {plural(record['epochs'], 'epoch')}."
    return f"{means} {line}\n\n{table(head, rows)}"


def cifar10(results: str) -> str:
    """Return the table of the steps of the recorded run of `fastentropy prune cifar10`."""
    history = load_json("cifar10-resnet8")
    machine, times = history["machine"], history["latency_ms"]
    rows = [
        (
            ", ".join(step["removed"]) or "dense",
            *(format_percent(step[score]) for score in ("validation", "test")),
            f"{step['latency_ms']['fused']:.2f} ms",
            "kept" if index == history["kept_step"] else "",
        )
        for index, step in enumerate(history["steps"])
    ]
    head = ("removed", "validation, %", "test, %", "fused, 64 images", "")
    line = origin("cifar10-resnet8", machine["device"], machine["date"], None, "fastentropy prune cifar10", results)
    latency = f"The dense network takes {times['dense']:.2f} ms, the final one {times['fused']:.2f} ms."
    return f"{latency} {line}\n\n{table(head, rows)}"


SECTIONS: dict[str, Callable[[str], str]] = {
    "kernels": kernels,
    "collect": collecting,
    "fuse": fusing,
    "networks": networks,
    "whole-networks": whole_networks,
    "goals": goals,
    "speedups": speedups,
    "digits": digits,
    "minilm": minilm,
    "calibrate": calibrate,
    "monitor": monitor,
    "criteria": criteria,
    "cifar10": cifar10,
    "pretrained": pretrained,
    "idle-neurons": idle_neurons,
    "pretrained-criteria": pretrained_criteria,
    "pretrained-lead": pretrained_lead,
}
