"""The sections on whole networks, of one record: a table for docs/results.md and a paragraph for README.md."""

from collections.abc import Sequence
from statistics import median

from markdown_tables import RESULTS, by_operation, case_rows, of_record, table

from fastentropy.benchmarks.measurements import Measurement
from fastentropy.benchmarks.records import Record

#: The operations that the table of whole networks shows, in the order of their columns, and the names of the backends there.
NETWORK_OPERATIONS = ("fused", "fused, auto", "torch.compile", "ONNX Runtime", "torch.compile, dense")
BACKENDS = {"eager": "eager", "inductor": "torch.compile", "onnxruntime": "ONNX Runtime"}


def networks(results: str) -> str:
    """Return the table of `record_networks.py`: how many times as fast as the model whole networks run, and what fusing costs.

    The model is the network as its user calls it, in eager PyTorch.
    """
    record = Record.load(RESULTS / "networks-epyc.json")
    head = ("", "model", *NETWORK_OPERATIONS, "fused in", "memory (weights)")
    return f"{of_record('networks-epyc', record, results)}\n\n{table(head, sorted(case_rows(network_row, record)))}"


def network_row(case: str, operations: dict[str, Measurement]) -> Sequence[str]:
    """Return the row of one network in the table of whole networks."""
    speeds = [f"{1 / operations[name].ratio.median:.2f}" if name in operations else "–" for name in NETWORK_OPERATIONS]
    facts, automatic = operations["fused"].facts, operations["fused, auto"].facts
    speeds[1] += f" ({BACKENDS[automatic['backend']]})"
    memory = f"{(facts['peak_bytes'] - facts['peak_bytes_before']) / 1e6:.0f} MB ({facts['weight_bytes'] / 1e6:.0f} MB)"
    seconds = f"{facts['seconds_to_fuse']:.0f} s"
    return case, f"{operations['model'].milliseconds.median:.3g} ms", *speeds, seconds, memory


def whole_networks(results: str) -> str:
    """Return a paragraph of the README on the worst and the usual cases of the table of whole networks."""
    record = Record.load(RESULTS / "networks-epyc.json")
    cases = {name: by_operation(each) for name, each in record.cases().items()}
    times = {
        name: {operation: each.ratio.median for operation, each in case.items() if each.ratio} for name, case in cases.items()
    }
    slowest = max(max(case["fused"], case["fused, auto"]) for case in times.values())
    against = max(case["fused, auto"] / case["torch.compile"] for case in times.values())
    gains = [case["torch.compile, dense"] / case["fused, auto"] for name, case in times.items() if " all, " in name]
    networks = len({name.split(", ")[0].rsplit(" ", 1)[0] for name in times})
    return (
        f"{networks} whole networks were measured ({record.machine}): dense, with a random half of their activations "
        f"linearised, and with those of all blocks or MLPs. What `fuse` returns takes at most {slowest:.2f} of the time of the "
        f'model as given. With `backend="auto"` it takes at most {against:.2f} of that of `torch.compile` with frozen weights, '
        f"and the linearised networks are {min(gains):.2f} to {max(gains):.2f} times as fast as `torch.compile` runs the dense "
        f"ones (median {median(gains):.2f}). The record is [networks-epyc.json]({results}/networks-epyc.json)."
    )
