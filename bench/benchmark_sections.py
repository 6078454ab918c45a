"""The sections on the records of `fastentropy bench`, as Markdown.

A case is a group of operations that were timed side by side, and the ratio of an operation is its time relative to that of a
reference operation of its case. The argument `results` of the functions is the path from the page to bench/results, for links.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from markdown_tables import MACHINES, RESULTS, by_operation, case_rows, for_each_machine, inverse, median, quartiles, table

from fastentropy.benchmarks.measurements import Measurement, Quartiles
from fastentropy.benchmarks.records import Record

#: The baselines that the tables of the kernels and of collecting show, in the order of their columns.
KERNEL_BASELINES = ("PyTorch counting", "torch.compile", "published procedure", "histogram observer")
COLLECT_BASELINES = ("PyTorch hooks", "compiled hooks", "histogram observer", "published procedure")
#: What the table of the README compares with, in the order of its columns.
ALTERNATIVES = ("plain PyTorch", "torch.compile", "ONNX Runtime", "published code")


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


def speedups(results: str) -> str:
    """Return the table of the README: how many times as fast as others fastentropy is, in the best and in the worst cases."""
    head = ("machine", "what", "time of plain inference", "plain PyTorch", "`torch.compile`", "ONNX Runtime", "published code")
    rows = []
    for machine in MACHINES:
        for kind, cases in (("kernels", 1), ("collect", 2), ("fuse", 2)):
            record = Record.load(RESULTS / f"{kind}-{machine}.json")
            found = sorted(COMPARED[kind](record), key=lambda case: min(case[2].values()))
            where = record.machine.removesuffix(" HBM3")
            rows += [speedup_row(where, *case) for case in (found[0], found[-1])[:cases]]
    return f"{table(head, rows)}\n\n{missing(results)}"


def speedup_row(machine: str, what: str, ratio: Quartiles | None, speedups: dict[str, float]) -> Sequence[str]:
    """Return the row of one case.

    Args:
        machine: the name of the machine.
        what: the case.
        ratio: its time, relative to the same without counting; None where nothing is counted.
        speedups: how many times as fast as each of `ALTERNATIVES` it is.
    """
    others = [f"{speedups[name]:.2f}" if name in speedups else "–" for name in ALTERNATIVES]
    return machine, what, quartiles(ratio) if ratio else "–", *others


def compared_kernels(record: Record) -> Iterator[tuple[str, Quartiles, dict[str, float]]]:
    """Yield each kernel with baselines, at the largest size: a title, its time, and how many times as fast as others it is.

    All of them are eager calls, as the baselines are.
    """
    for name, _, eager in largest_cases(record):
        if "PyTorch counting" in eager:
            fused, names = eager["activation_states"], ("PyTorch counting", "torch.compile", None, "published procedure")
            yield f"counting in {name}", fused.ratio, times_as_fast(fused, eager, names)


def compared_collecting(record: Record) -> Iterator[tuple[str, Quartiles, dict[str, float]]]:
    """Yield each network, as `compared_kernels` does, if its baselines were measured."""
    for name, operations in case_rows(lambda *case: case, record):
        ours, names = operations["collecting"], ("PyTorch hooks", "compiled hooks", None, "published procedure")
        if speedups := times_as_fast(ours, operations, names):
            yield f"collecting in {name}", ours.ratio, speedups


def compared_fusing(record: Record) -> Iterator[tuple[str, None, dict[str, float]]]:
    """Yield each network, as `compared_kernels` does. Plain PyTorch has batch norm folded."""
    for name, operations in case_rows(lambda *case: case, record):
        names = ("folded", "torch.compile, frozen", "ONNX Runtime", None)
        yield f"fused {name}", None, times_as_fast(operations["fused"], operations, names)


def times_as_fast(ours: Measurement, others: dict[str, Measurement], names: Sequence[str | None]) -> dict[str, float]:
    """Return how many times as fast as the others a measurement is, by the names in `ALTERNATIVES`.

    Args:
        ours: the measurement.
        others: the other measurements of its case, by operation.
        names: the operation of each of `ALTERNATIVES`; None where there is none.
    """
    found = {title: others[name] for title, name in zip(ALTERNATIVES, names, strict=True) if name in others}
    return {title: other.ratio.median / ours.ratio.median for title, other in found.items()}


#: For each benchmark, the function that compares what was measured with its alternatives.
COMPARED = {"kernels": compared_kernels, "collect": compared_collecting, "fuse": compared_fusing}


def missing(results: str) -> str:
    """Return a line with links to the records of incomplete runs."""
    names = [f"{kind}-{machine}" for kind in COMPARED for machine in MACHINES]
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
