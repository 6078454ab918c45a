"""The sections with measured figures of README.md and docs/results.md, as Markdown.

A record is a JSON file in bench/results. Most sections are tables of one record. In a record of `fastentropy bench`, a case is
a group of operations that were timed side by side, and the ratio of an operation is its time relative to that of a reference
operation of its case. The argument `results` of the functions is the path from the page to bench/results, for links.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from markdown_tables import (
    MACHINES,
    RESULTS,
    by_operation,
    case_rows,
    for_each_machine,
    inverse,
    load_json,
    median,
    origin,
    quartiles,
    table,
)
from network_sections import networks, pretrained, pretrained_lead, whole_networks

from fastentropy._utils.text import format_percent, plural
from fastentropy.benchmarks.measurements import Measurement, Quartiles
from fastentropy.benchmarks.records import Record

#: The baselines that the tables of the kernels and of collecting show, in the order of their columns.
KERNEL_BASELINES = ("PyTorch counting", "torch.compile", "published procedure", "histogram observer")
COLLECT_BASELINES = ("PyTorch hooks", "compiled hooks", "histogram observer", "published procedure")
#: The beginnings of the names of the cases of fusing that the README shows.
FUSED = ("mobilenet_v2 features.2,", "mobilenet_v2 features.12", "mobilenet_v2 all blocks", "mobilenet_v2 half", "vit_b_16 MLP")
#: The networks with which the fused network of a pruning run is compared: key of its time in the history → text.
DIGITS = {"dense": "the dense network", "dense_fused": "that with batch norm folded", "pruned": "the pruned one before fusing"}


def kernels(results: str) -> str:
    """Return the table of the kernels: the time at the largest size, relative to that of the activation alone.

    The kernels compute an activation and count the states (off, zero or on) of its input.
    """
    head = ("", "`activation_states`", "as eager calls", "of a copy's bandwidth", *KERNEL_BASELINES)
    return for_each_machine("kernels", head, kernel_rows, results)


def kernel_rows(record: Record) -> Iterator[Sequence[str]]:
    """Yield a row for each layout, dtype and activation.

    On a GPU, `activation_states` is measured as a CUDA graph and as eager calls, and the baselines as eager calls.
    """
    for title, ours, eager in largest_cases(record):
        fused, baselines = ours["activation_states"], [median(eager.get(name)) for name in KERNEL_BASELINES]
        eagerly = "–" if eager is ours else median(eager["activation_states"])
        roof = max(case["copy"].gigabytes_per_second for case in (ours, eager))
        yield title, quartiles(fused.ratio), eagerly, f"{100 * fused.gigabytes_per_second / roof:.0f} %", *baselines


def largest_cases(record: Record) -> Iterator[tuple[str, dict[str, Measurement], dict[str, Measurement]]]:
    """Yield the measurements at the largest size, for each activation, layout and dtype.

    Yields:
        A title, the measurements of fastentropy's operations, and the measurements of eager calls, both by operation. The
        former are CUDA graphs if there are any. Otherwise the two are the same object.
    """
    cases = [by_operation(each) for each in record.cases().values()]
    groups: dict[tuple[str, ...], list[dict[str, Measurement]]] = {}
    for case in cases:
        facts = case["activation_states"].facts
        groups.setdefault((facts["activation"], facts["layout"], facts["dtype"]), []).append(case)
    for (activation, layout, dtype), group in groups.items():
        values = max(case["activation_states"].facts["values"] for case in group)
        largest = [case for case in group if case["activation_states"].facts["values"] == values]
        ours = max(largest, key=lambda case: case["activation_states"].facts["cuda_graph"])
        eager = min(largest, key=lambda case: case["activation_states"].facts["cuda_graph"])
        yield f"{activation}, {layout}, {dtype}, {values / 2**20:.0f} M", ours, eager


def collecting(results: str) -> str:
    """Return the table of collecting: the time of inference relative to that without collecting, and the added memory."""
    head = ("", "collecting", "collecting, eager", *COLLECT_BASELINES, "memory added", "published")
    return for_each_machine("collect", head, partial(case_rows, collect_row), results)


def collect_row(case: str, operations: dict[str, Measurement]) -> Sequence[str]:
    """Return the row of one network in the table of collecting."""
    baselines = [median(operations.get(name)) for name in ("collecting, eager", *COLLECT_BASELINES)]
    memory = [added_megabytes(operations, name) for name in ("collecting", "published procedure")]
    return case, quartiles(operations["collecting"].ratio), *baselines, *memory


def added_megabytes(operations: dict[str, Measurement], name: str) -> str:
    """Return, as text, by how much the peak memory of a procedure exceeds that of plain inference, or a dash if unknown."""
    peaks = [operations[each].facts.get("peak_bytes") for each in ("plain", name) if each in operations]
    return f"{(peaks[1] - peaks[0]) / 1e6:.2f} MB" if len(peaks) == 2 and None not in peaks else "–"


def fusing(results: str) -> str:
    """Return the table of fusing, for networks with activations replaced by the identity.

    Times are relative to those of the same network with batch norm folded.
    """
    head = (
        "",
        "batch norm folded",
        "fused",
        "times as fast",
        "`torch.compile`, frozen",
        "fused in `torch.compile`",
        "ONNX Runtime",
        "times fewer multiplications",
        "error",
    )
    return for_each_machine("fuse", head, partial(case_rows, fuse_row), results)


def fuse_row(case: str, operations: dict[str, Measurement]) -> Sequence[str]:
    """Return the row of one network in the table of fusing."""
    folded, fused = operations["folded"], operations["fused"]
    others = [operations.get(name) for name in ("torch.compile, frozen", "fused, torch.compile", "ONNX Runtime")]
    counts = fused.facts["multiplications_folded"], fused.facts["multiplications"]
    return (
        case,
        f"{folded.milliseconds.median:.3g} ms",
        f"{fused.milliseconds.median:.3g} ms",
        quartiles(inverse(fused.ratio)),
        *(f"{1 / other.ratio.median:.2f}" if other else "–" for other in others),
        f"{counts[0] / counts[1]:.2f}" if counts[1] else "–",
        f"{fused.facts['relative_error']:.0e}",
    )


def baselines(results: str) -> str:
    """Return the table of the README, with the ratios of kernels, whole models and fused networks, and of their baselines."""
    rows = []
    for machine in MACHINES:
        kernel, collect, fuse = (Record.load(RESULTS / f"{each}-{machine}.json") for each in ("kernels", "collect", "fuse"))
        where, collected, fused_on = (record.machine.removesuffix(" HBM3") for record in (kernel, collect, fuse))
        for name, ours, eager in largest_cases(kernel):
            if name.startswith("relu"):
                others = [median(eager.get(each)) for each in ("PyTorch counting", "torch.compile", "published procedure")]
                rows.append((where, f"{name}: relu and states / relu", quartiles(ours["activation_states"].ratio), *others))
                if eager is not ours:
                    rows.append((where, "the same as eager calls", quartiles(eager["activation_states"].ratio), *others))
        for case, operations in ((name, by_operation(each)) for name, each in collect.cases().items()):
            others = [median(operations.get(each)) for each in ("PyTorch hooks", "compiled hooks", "published procedure")]
            rows.append((collected, f"{case}: collecting / plain", quartiles(operations["collecting"].ratio), *others))
        for name, operations in ((name, by_operation(each)) for name, each in fuse.cases().items()):
            if name.startswith(FUSED):
                frozen = operations.get("torch.compile, frozen")
                rows.append(
                    (fused_on, f"{name}: fused / folded", quartiles(operations["fused"].ratio), "–", median(frozen), "–")
                )
    head = ("machine", "time of", "fastentropy", "plain PyTorch", "`torch.compile`", "published code")
    return f"{table(head, rows)}\n\n{missing(results)}"


def missing(results: str) -> str:
    """Return a line with links to the records of incomplete runs."""
    names = [f"{kind}-{machine}" for kind in ("kernels", "collect", "fuse") for machine in MACHINES]
    stopped = [name for name in names if not Record.load(RESULTS / f"{name}.json").complete]
    links = ", ".join(f"[{name}.json]({results}/{name}.json)" for name in stopped)
    return f"Incomplete {'run' if len(stopped) == 1 else 'runs'}: {links}." if stopped else "All runs are complete."


def goals(results: str) -> str:
    """Return the table of the performance goals: how many cases of each kind reach the goal, and the worst ratio."""
    rows = []
    for machine in MACHINES:
        kernel, collect, fuse = (Record.load(RESULTS / f"{each}-{machine}.json") for each in ("kernels", "collect", "fuse"))
        of_gpu = machine == "h100"
        large = [
            each
            for each in kernel.measurements
            if each.operation == "activation_states"
            and each.ratio
            and each.facts["cuda_graph"] == of_gpu
            and (each.bytes >= 2**27 if of_gpu else each.facts["values"] >= 4e6)
        ]
        limits = (1.03, 1.01) if of_gpu else (1.10, 1.02)
        rows.append(goal(kernel.machine, "activation_states / activation", large, limits[0]))
        collecting = [each for each in collect.measurements if each.operation == "collecting"]
        compiled = [each for each in collecting if each.case.endswith(", compiled")]
        rows.append(
            goal(collect.machine, "collecting / plain", [each for each in collecting if each not in compiled], limits[1])
        )
        if compiled:
            rows.append(goal(collect.machine, "collecting / plain, both compiled", compiled, 1.05))
        fused = [each for each in fuse.measurements if each.operation == "fused"]
        rows.append(goal(fuse.machine, "fused / folded", fused, 1.02))
        blocks = [each for each in fused if "features" in each.case]
        rows.append(goal(fuse.machine, "fused / folded, a block of mobilenet_v2", blocks, 1 / 1.5))
        rows.append(goal(fuse.machine, "fused / folded, the MLP", [each for each in fused if "MLP" in each.case], 1 / 5))
    return table(("machine", "ratio of times", "goal", "reach it", "worst"), rows)


def goal(machine: str, what: str, measurements: Sequence[Measurement], limit: float) -> Sequence[str]:
    """Return the row of one goal.

    Args:
        machine: the name of the machine.
        what: the operations whose times are compared, such as "fused / folded".
        measurements: the measurements to which the goal applies.
        limit: the ratio that no median should exceed.
    """
    ratios = [each.ratio.median for each in measurements]
    reached = sum(ratio <= limit for ratio in ratios)
    return machine, what, f"≤ {limit:.2f}", f"{reached} of {len(ratios)}", f"{max(ratios):.3f}"


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
    "baselines": baselines,
    "digits": digits,
    "minilm": minilm,
    "calibrate": calibrate,
    "criteria": criteria,
    "cifar10": cifar10,
    "pretrained": pretrained,
    "pretrained-lead": pretrained_lead,
}
