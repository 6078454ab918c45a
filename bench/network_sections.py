"""The sections on whole networks: the records of many, of training with a monitor, and of pruning a pretrained one."""

from collections.abc import Iterator, Sequence
from statistics import median

from markdown_tables import RESULTS, by_operation, case_rows, load_json, of_record, origin, quartiles, table

from fastentropy._utils.text import format_percent
from fastentropy.benchmarks.measurements import Measurement, Quartiles
from fastentropy.benchmarks.records import Record
from fastentropy.cli.options import option_of
from fastentropy.reporting.history import RunHistory

#: The operations that the table of whole networks shows, in the order of their columns, and the names of the backends there.
NETWORK_OPERATIONS = ("fused", "fused, auto", "torch.compile", "ONNX Runtime", "torch.compile, dense")
BACKENDS = {"eager": "eager", "inductor": "torch.compile", "onnxruntime": "ONNX Runtime"}
#: The records of the runs that pruned EfficientNet-Lite0 by two criteria, by their titles.
CRITERIA_RUNS = {
    f"{criterion}, seed {seed}": f"efficientnet-lite0-{criterion}-{seed}"
    for criterion in ("entropy", "random")
    for seed in (0, 1)
}
#: The operations that the table of a pruned network shows.
PRUNED_OPERATIONS = ("model", "fused", "fused, auto", "torch.compile", "ONNX Runtime")


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
    times = {name: _times(by_operation(each)) for name, each in record.cases().items()}
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


def pretrained(results: str) -> str:
    """Return a paragraph on the recorded run that pruned EfficientNet-Lite0, and a table of the speed of its last network."""
    history, speed = load_json("efficientnet-lite0"), Record.load(RESULTS / "efficientnet-lite0-speed.json")
    run, machine = RunHistory(history), history["machine"]
    entropies, last = run.dense["layer_entropy"].values(), run.steps[-1]
    names = ", ".join(f"`{name}`" for step in run.steps for name in step["removed"])
    return (
        f"The layer entropies of the dense network range from {min(entropies):.2f} to {max(entropies):.2f} bits. Without "
        f"{run.depths[-1]} of its {len(run.sites)} activations ({names}) the network classifies "
        f"{format_percent(last['test'])} % of the test images correctly, in place of {format_percent(run.dense['test'])} %. "
        f"{origin('efficientnet-lite0', machine['device'], machine['date'], None, _command(run), results)}\n\n"
        f"How many times as fast as `torch.compile` with frozen weights runs the dense network: "
        f"{of_record('efficientnet-lite0-speed', speed, results)}\n\n"
        f"{table(('', 'as given', *PRUNED_OPERATIONS[1:]), case_rows(pruned_row, speed))}"
    )


def pretrained_lead(results: str) -> str:
    """Return a paragraph of the README on the run that pruned EfficientNet-Lite0, for a batch of 16 images."""
    history, speed = load_json("efficientnet-lite0"), Record.load(RESULTS / "efficientnet-lite0-speed.json")
    run = RunHistory(history)
    times = {name.partition(" × ")[0]: _times(by_operation(each)) for name, each in speed.cases().items()}
    dense, pruned = times["dense, 16"], times["pruned, 16"]
    fused = pruned["fused, auto"] / pruned["torch.compile, dense"]
    best = dense["ONNX Runtime"] / dense["torch.compile, dense"]
    points = 100 * (run.dense["test"] - run.steps[-1]["test"])
    return (
        f"In EfficientNet-Lite0 with ImageNet weights, fine-tuned on CIFAR-10 at 64 × 64 pixels, the entropies spread. Without "
        f"{run.depths[-1]} of its {len(run.sites)} activations it classifies {points:.1f} points fewer of the test images "
        f"correctly, and a batch of 16 runs {1 / fused:.2f}× as fast as the dense network in `torch.compile` with frozen "
        f"weights, and {best / fused:.2f}× as fast as that in ONNX Runtime ([results](docs/results.md#pruning))."
    )


def pretrained_criteria(results: str) -> str:
    """Return the table of the runs that pruned EfficientNet-Lite0 by entropy and at random, from the same dense network."""
    runs = {title: RunHistory(load_json(name)) for title, name in CRITERIA_RUNS.items()}
    name, first = next(iter(CRITERIA_RUNS.values())), next(iter(runs.values()))
    machine = first.history["machine"]
    line = origin(name, machine["device"], machine["date"], None, _command(first), results)
    return f"The first run: {line}\n\n{table(('removed, of 33', *runs), accuracy_rows(list(runs.values())))}"


def idle_neurons(results: str) -> str:
    """Return the table of `record_neurons.py`, with a row for each limit of the entropy."""
    record = load_json("efficientnet-lite0-neurons")
    neurons = record["neurons"]
    rows = [
        (
            f"{case['max_entropy']}",
            f"{case['linear']}",
            f"{case['constant']}",
            f"{format_percent(case['test'])} %",
            f"{case['multiplications']['after'] / case['multiplications']['before']:.3f}",
            f"{case['milliseconds']['dense, fused'] / case['milliseconds']['fused']:.3f}",
        )
        for case in record["cases"]
    ]
    head = ("entropy at most, bits", "linear", "constant", "test accuracy", "multiplications left", "times as fast, both fused")
    line = origin("efficientnet-lite0-neurons", record["machine"], record["date"], record["commit"], record["command"], results)
    return (
        f"Of {neurons['all']} neurons, {neurons['never_on']} were never on and {neurons['never_off']} never off. The dense "
        f"network classifies {format_percent(record['test'])} % of the test images correctly. {line}\n\n{table(head, rows)}"
    )


def accuracy_rows(runs: Sequence[RunHistory]) -> Iterator[Sequence[str]]:
    """Yield a row for each number of removed activations: the number, and the test accuracy of each run in percent."""
    accuracies = [dict(zip(run.depths, (step["test"] for step in run.steps), strict=True)) for run in runs]
    for removed in sorted(set().union(*accuracies)):
        yield str(removed), *(f"{format_percent(each[removed])} %" if removed in each else "–" for each in accuracies)


def pruned_row(case: str, operations: dict[str, Measurement]) -> Sequence[str]:
    """Return the row of one network in the table of the speed of a pruned network."""
    times = _times(operations)
    return case, *(f"{times['torch.compile, dense'] / times[name]:.2f}" if name in times else "–" for name in PRUNED_OPERATIONS)


def _times(operations: dict[str, Measurement]) -> dict[str, float]:
    """Return the times of the operations of a case, relative to that of the model as given."""
    return {name: each.ratio.median for name, each in operations.items()}


def _command(run: RunHistory) -> str:
    """Return the command of a run, but for the paths of its data and its weights."""
    options = (f"{option_of(name)}{'' if value is True else f' {value}'}" for name, value in run.options.items())
    return " ".join(["fastentropy prune images", *options])


def monitor(results: str) -> str:
    """Return the table of `record_monitor.py`: what an `EntropyMonitor` costs the training of some networks."""
    record = load_json("monitor-epyc")
    rows = [
        (
            case["case"],
            f"{case['sites']}",
            f"{case['step_milliseconds']:.0f} ms",
            quartiles(Quartiles(**case["measured_over_plain"])),
            f"{case['idle_step_microseconds']:.1f} µs",
            f"{100 * case['overhead']['median']:.2f} %",
            f"{100 * case['overhead']['upper']:.2f} %",
        )
        for case in record["cases"]
    ]
    head = ("", "sites", "step", "measured step", "each other step", "overhead", "upper quartile")
    line = origin("monitor-epyc", record["machine"], record["date"], record["commit"], record["command"], results)
    return f"{line}\n\n{table(head, rows)}"
