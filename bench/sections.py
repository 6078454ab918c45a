"""The sections of the results that are drawn from records, each a table."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastentropy.benchmarks.measurements import Measurement, Quartiles
from fastentropy.benchmarks.records import Record

ROOT = Path(__file__).parent.parent


RESULTS = ROOT / "bench" / "results"


MACHINES = ("epyc", "h100")


KERNEL_PEERS = ("PyTorch counting", "torch.compile", "published procedure", "histogram observer")


FUSED = ("mobilenet_v2 features.2,", "mobilenet_v2 features.12", "mobilenet_v2 all blocks", "mobilenet_v2 half", "vit_b_16 MLP")


COLLECT_PEERS = ("PyTorch hooks", "compiled hooks", "histogram observer", "published procedure")


def loaded(name: str) -> dict[str, Any]:
    """A record that is not one of `fastentropy bench`."""
    values: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return values


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def quartiles(values: Quartiles, digits: int = 2) -> str:
    """A median, and the quartiles in brackets."""
    return f"{values.median:.{digits}f} ({values.lower:.{digits}f} to {values.upper:.{digits}f})"


def inverse(values: Quartiles) -> Quartiles:
    """Times as fast, of times as long."""
    return Quartiles(1 / values.upper, 1 / values.median, 1 / values.lower)


def origin(name: str, machine: str, date: str, commit: str | None, command: str, results: str) -> str:
    """The line that says where figures come from."""
    at = f", commit {commit}" if commit else ""
    return f"{machine}, {date}{at}: [{name}.json]({results}/{name}.json), by `{command}`."


def of_record(name: str, record: Record, results: str) -> str:
    """The line that says where the figures of a record come from."""
    stopped = "" if record.complete else " It was stopped before it had all cases."
    return origin(name, record.machine, record.date, record.commit, record.command, results) + stopped


def for_each_machine(kind: str, head: Sequence[str], rows: Callable[[Record], Iterable[Sequence[str]]], results: str) -> str:
    """A table of the record of each machine, below the line that says where it comes from."""
    parts = []
    for name in (f"{kind}-{machine}" for machine in MACHINES):
        record = Record.load(RESULTS / f"{name}.json")
        parts.append(f"{of_record(name, record, results)}\n\n{table(head, rows(record))}")
    return "\n\n".join(parts)


def case_rows(row: Callable[[str, dict[str, Measurement]], Sequence[str]], record: Record) -> Iterator[Sequence[str]]:
    """A row for each case."""
    return (row(case, by_operation(measurements)) for case, measurements in record.cases().items())


def by_operation(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    """The measurements of one case that have figures."""
    return {each.operation: each for each in measurements if each.ratio}


def median(measurement: Measurement | None) -> str:
    """The ratio to the baseline, where there is one."""
    return f"{measurement.ratio.median:.2f}" if measurement and measurement.ratio else "–"


def kernels(results: str) -> str:
    """relu and its states at the largest size, as a multiple of relu alone."""
    head = ("", "`activation_states`", "as eager calls", "of a copy's bandwidth", *KERNEL_PEERS)
    return for_each_machine("kernels", head, kernel_rows, results)


def kernel_rows(record: Record) -> Iterator[Sequence[str]]:
    """A row for each layout, dtype and activation at its largest size. On a GPU peers are eager calls, ours is a CUDA graph."""
    for name, ours, eager in largest_cases(record):
        fused, peers = ours["activation_states"], [median(eager.get(peer)) for peer in KERNEL_PEERS]
        eagerly = "–" if eager is ours else median(eager["activation_states"])
        roof = max(case["copy"].gigabytes_per_second for case in (ours, eager))
        yield name, quartiles(fused.ratio), eagerly, f"{100 * fused.gigabytes_per_second / roof:.0f} %", *peers


def largest_cases(record: Record) -> Iterator[tuple[str, dict[str, Measurement], dict[str, Measurement]]]:
    """The cases of the largest size: what they are, the measurements to quote, and those of eager calls."""
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
    """Inference while collecting as a multiple of plain inference, and the memory that it adds."""
    head = ("", "collecting", *COLLECT_PEERS, "memory added", "published")
    return for_each_machine("collect", head, partial(case_rows, collect_row), results)


def collect_row(case: str, operations: dict[str, Measurement]) -> Sequence[str]:
    """One network."""
    peers = [median(operations.get(peer)) for peer in COLLECT_PEERS]
    memory = [added_megabytes(operations, name) for name in ("collecting", "published procedure")]
    return case, quartiles(operations["collecting"].ratio), *peers, *memory


def added_megabytes(operations: dict[str, Measurement], name: str) -> str:
    """What a procedure adds to the peak of plain inference."""
    peaks = [operations[each].facts.get("peak_bytes") for each in ("plain", name) if each in operations]
    return f"{(peaks[1] - peaks[0]) / 1e6:.2f} MB" if len(peaks) == 2 and None not in peaks else "–"


def fusing(results: str) -> str:
    """Linearised networks, as times as fast as with batch norm folded."""
    head = (
        "",
        "batch norm folded",
        "fused",
        "times as fast",
        "`torch.compile`, frozen",
        "times fewer multiplications",
        "error",
    )
    return for_each_machine("fuse", head, partial(case_rows, fuse_row), results)


def fuse_row(case: str, operations: dict[str, Measurement]) -> Sequence[str]:
    """One network."""
    folded, fused, frozen = operations["folded"], operations["fused"], operations.get("torch.compile, frozen")
    counts = fused.facts["multiplications_folded"], fused.facts["multiplications"]
    return (
        case,
        f"{folded.milliseconds.median:.3g} ms",
        f"{fused.milliseconds.median:.3g} ms",
        quartiles(inverse(fused.ratio)),
        f"{1 / frozen.ratio.median:.2f}" if frozen else "–",
        f"{counts[0] / counts[1]:.2f}" if counts[1] else "–",
        f"{fused.facts['relative_error']:.0e}",
    )


def peers(results: str) -> str:
    """What the README shows of all this: the kernels, whole models, fused networks; time beside what one would use instead."""
    rows = []
    for machine in MACHINES:
        kernel, collect, fuse = (Record.load(RESULTS / f"{each}-{machine}.json") for each in ("kernels", "collect", "fuse"))
        where = kernel.machine.removesuffix(" HBM3")
        for name, ours, eager in largest_cases(kernel):
            if name.startswith("relu"):
                beside = [median(eager.get(peer)) for peer in ("PyTorch counting", "torch.compile", "published procedure")]
                rows.append((where, f"{name}: relu and states / relu", quartiles(ours["activation_states"].ratio), *beside))
                if eager is not ours:
                    rows.append((where, "the same as eager calls", quartiles(eager["activation_states"].ratio), *beside))
        for case, operations in ((name, by_operation(each)) for name, each in collect.cases().items()):
            beside = [median(operations.get(peer)) for peer in ("PyTorch hooks", "compiled hooks", "published procedure")]
            rows.append((where, f"{case}: collecting / plain", quartiles(operations["collecting"].ratio), *beside))
        for name, operations in ((name, by_operation(each)) for name, each in fuse.cases().items()):
            if name.startswith(FUSED):
                frozen = operations.get("torch.compile, frozen")
                rows.append((where, f"{name}: fused / folded", quartiles(operations["fused"].ratio), "–", median(frozen), "–"))
    head = ("machine", "time of", "fastentropy", "plain PyTorch", "`torch.compile`", "published code")
    return f"{table(head, rows)}\n\n{missing(results)}"


def missing(results: str) -> str:
    """Which records were stopped before they had all cases."""
    names = [f"{kind}-{machine}" for kind in ("kernels", "collect", "fuse") for machine in MACHINES]
    stopped = [name for name in names if not Record.load(RESULTS / f"{name}.json").complete]
    links = ", ".join(f"[{name}.json]({results}/{name}.json)" for name in stopped)
    return f"Stopped before it had all cases: {links}." if stopped else "All records are complete."


def goals(results: str) -> str:
    """How many of the cases of each kind reach what DESIGN set, and the worst of them."""
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
        rows.append(goal(collect.machine, "collecting / plain", collecting, limits[1]))
        fused = [each for each in fuse.measurements if each.operation == "fused"]
        rows.append(goal(fuse.machine, "fused / folded", fused, 1.02))
        blocks = [each for each in fused if "features" in each.case]
        rows.append(goal(fuse.machine, "fused / folded, a block of mobilenet_v2", blocks, 1 / 1.5))
        rows.append(goal(fuse.machine, "fused / folded, the MLP", [each for each in fused if "MLP" in each.case], 1 / 5))
    return table(("machine", "ratio of times", "goal", "reach it", "worst"), rows)


def goal(machine: str, what: str, measurements: Sequence[Measurement], limit: float) -> Sequence[str]:
    """One goal: a ratio that no median should be above."""
    ratios = [each.ratio.median for each in measurements]
    reached = sum(ratio <= limit for ratio in ratios)
    return machine, what, f"≤ {limit:.2f}", f"{reached} of {len(ratios)}", f"{max(ratios):.3f}"


def digits(results: str) -> str:
    """The run of the main command that is recorded."""
    history = loaded("digits")
    dense, kept, times = history["steps"][0], history["steps"][history["kept_step"]], history["latency_ms"]
    removed = sum(len(step["removed"]) for step in history["steps"][: history["kept_step"] + 1])
    faster = [f"{times[name] / times['fused']:.2f}× as fast as {what}" for name, what in DIGITS.items()]
    machine = history["machine"]
    return (
        f"One run of it on {machine['device']}, {machine['date']}, seed {history['seed']}: {removed} of "
        f"{len(dense['layer_entropy'])} activations removed, test accuracy {100 * dense['test']:.2f} % before and "
        f"{100 * kept['test']:.2f} % after. A batch of 64 images takes the fused network {times['fused']:.2f} ms: {faster[0]}, "
        f"{faster[1]}, {faster[2]}. Outputs differ by {history['fusion']['max_relative_error']:.0e} (relative). "
        f"The record is [digits.json]({results}/digits.json)."
    )


DIGITS = {"dense": "the dense network", "dense_fused": "that with batch norm folded", "pruned": "the pruned one before fusing"}


def minilm(results: str) -> str:
    """The entropies of MiniLM on Python's own help."""
    record = loaded("minilm")
    machine, overhead = record["machine"], record["overhead"]
    rows = [(name, f"{bits:.3f}") for name, bits in record["layer_entropy"].items()]
    return (
        f"{machine['device']}, {machine['date']}: {record['tokens']:,} tokens in {record['documents']:,} documents, "
        f"{record['tokens_per_second']:.0f} tokens per second on {record['ranks']} process; time while collecting "
        f"{overhead['ratio']:.3f} of that without, median of {overhead['samples']} batches. "
        f"The record is [minilm.json]({results}/minilm.json).\n\n{table(('activation', 'entropy, bits'), rows)}"
    )


def calibrate(results: str) -> str:
    """Tokens per second with several processes."""
    record = loaded("calibrate-epyc")
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
    """What the criteria reach on the digits."""
    record = loaded("criteria-epyc")
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
        "times as fast as dense, fused too (least to most)",
    )
    line = origin("criteria-epyc", record["machine"], record["date"], record.get("commit"), record["command"], results)
    return f"Means over {len(seeds)} seeds, schedules of {record['epochs']} epochs. {line}\n\n{table(head, rows)}"


def cifar10(results: str) -> str:
    """The steps of the run on CIFAR-10."""
    history = loaded("cifar10-resnet8")
    machine, times = history["machine"], history["latency_ms"]
    rows = [
        (
            ", ".join(step["removed"]) or "dense",
            *(f"{100 * step[score]:.2f}" for score in ("validation", "test")),
            f"{step['latency_ms']['fused']:.2f} ms",
            "kept" if index == history["kept_step"] else "",
        )
        for index, step in enumerate(history["steps"])
    ]
    head = ("removed", "validation, %", "test, %", "fused, 64 images", "")
    line = origin("cifar10-resnet8", machine["device"], machine["date"], None, "fastentropy prune cifar10", results)
    return f"Dense {times['dense']:.2f} ms, in the end {times['fused']:.2f} ms. {line}\n\n{table(head, rows)}"


SECTIONS: dict[str, Callable[[str], str]] = {
    "kernels": kernels,
    "collect": collecting,
    "fuse": fusing,
    "goals": goals,
    "peers": peers,
    "digits": digits,
    "minilm": minilm,
    "calibrate": calibrate,
    "criteria": criteria,
    "cifar10": cifar10,
}
