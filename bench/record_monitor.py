"""Measure what an `EntropyMonitor` costs a training.

python bench/record_monitor.py [--rounds N] [--network NAME …] [--name NAME]

A step is a forward pass, a backward pass and an update by AdamW. Each round trains one step that is measured and one without a
monitor, in turns, and their times are compared in pairs. A measured step attaches the collector, counts, computes the figures,
and writes them to TensorBoard and JSON lines. One step in fifty is measured, so the overhead is a fiftieth of what a measured
step takes longer, and the time that the monitor takes in each of the other steps. With --name the record is written to
bench/results/monitor-NAME.json.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
import transformers
from records import save_record
from torch import Tensor, nn

import fastentropy as fe
from fastentropy._utils.timing import measure_seconds
from fastentropy.benchmarks.measurements import Quartiles
from fastentropy.recipes.digits import BATCH_SIZE, DigitsNet

EVERY = 50
#: The repetitions by which the time of a step that is not measured is averaged.
IDLE_STEPS = 10_000


def main() -> None:
    """Measure the networks, print a line for each, and write the record if --name is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--name")
    options = parser.parse_args()
    cases = []
    for name in options.network:
        title, model, loss = NETWORKS[name]()
        cases.append({"case": title, **measure(model, loss, options.rounds)})
        print(line(cases[-1]), flush=True)
    if options.name:
        threads = torch.get_num_threads()
        save_record(f"monitor-{options.name}", "cpu", rounds=options.rounds, threads=threads, every=EVERY, cases=cases)


def measure(model: nn.Module, loss: Callable[[], Tensor], rounds: int) -> dict[str, object]:
    """Train a network in rounds, and return the figures for the record.

    Args:
        model: the network.
        loss: a function that runs the network on a batch and returns the loss.
        rounds: how many steps of each kind are timed.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        writers = [fe.tensorboard_writer(f"{folder}/events"), fe.json_lines_writer(f"{folder}/lines")]
        monitor = fe.EntropyMonitor(model, every=EVERY, writers=writers)

        def measured_step() -> None:
            with monitor.step(0):
                step()

        step()
        first, seconds = measure_seconds(measured_step), {"plain": [], "measured": []}
        measured_step()
        for index in range(rounds):
            kinds = {"plain": step, "measured": measured_step}
            for kind in sorted(kinds, reverse=index % 2 == 1):
                seconds[kind].append(measure_seconds(kinds[kind]))
        idle = measure_seconds(functools.partial(idle_step, monitor), IDLE_STEPS)
    plain = Quartiles.of(seconds["plain"]).median
    ratio = Quartiles.of([one / other for one, other in zip(seconds["measured"], seconds["plain"], strict=True)])
    overheads = [(share - 1) / EVERY + idle * (EVERY - 1) / EVERY / plain for share in ratio]
    return {
        "sites": len(monitor.latest),
        "step_milliseconds": 1e3 * plain,
        "measured_over_plain": ratio._asdict(),
        "first_step_extra_milliseconds": 1e3 * (first - plain),
        "idle_step_microseconds": 1e6 * idle,
        "overhead": dict(zip(Quartiles._fields, overheads, strict=True)),
    }


def idle_step(monitor: fe.EntropyMonitor) -> None:
    """Run a step that is not measured, and that does nothing."""
    with monitor.step(1):
        pass


def digits() -> tuple[str, nn.Module, Callable[[], Tensor]]:
    """Return the name of a case, the network of the recipe digits, and its loss. As it is small, a monitor weighs most here."""
    model = DigitsNet()
    return f"DigitsNet, {BATCH_SIZE} × 1 × 8 × 8", model, classification(model, torch.randn(BATCH_SIZE, 1, 8, 8), 10)


def resnet18() -> tuple[str, nn.Module, Callable[[], Tensor]]:
    """Return the name of a case, a ResNet-18, and its loss on small images."""
    model = torchvision.models.resnet18()
    return "resnet18, 16 × 3 × 64 × 64", model, classification(model, torch.randn(16, 3, 64, 64), 1000)


def mobilenet_v2() -> tuple[str, nn.Module, Callable[[], Tensor]]:
    """Return the name of a case, a MobileNetV2, and its loss on small images."""
    model = torchvision.models.mobilenet_v2()
    return "mobilenet_v2, 16 × 3 × 64 × 64", model, classification(model, torch.randn(16, 3, 64, 64), 1000)


def bert() -> tuple[str, nn.Module, Callable[[], Tensor]]:
    """Return the name of a case, a BERT of six layers, and its loss on padded text."""
    config = transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    model = transformers.BertForSequenceClassification(config)
    tokens, labels = torch.randint(1000, (16, 64)), torch.randint(2, (16,))
    mask = (torch.arange(64) < torch.randint(32, 65, (16, 1))).long()
    return "BERT with 6 layers, 16 × 64 tokens", model, lambda: model(input_ids=tokens, attention_mask=mask, labels=labels).loss


def classification(model: nn.Module, images: Tensor, classes: int) -> Callable[[], Tensor]:
    """Return a function that returns the loss of a classifier on images with random labels."""
    labels = torch.randint(classes, (len(images),))
    return lambda: F.cross_entropy(model(images), labels)


NETWORKS = {"digits": digits, "resnet18": resnet18, "mobilenet_v2": mobilenet_v2, "bert": bert}


def line(case: dict) -> str:
    """Return the figures of a network as a line of text."""
    ratio, overhead = case["measured_over_plain"], case["overhead"]
    return (
        f"{case['case']}: step {case['step_milliseconds']:.1f} ms, measured {ratio['median']:.3f} times as long "
        f"({ratio['lower']:.3f} to {ratio['upper']:.3f}), overhead {100 * overhead['median']:.2f} % "
        f"({100 * overhead['lower']:.2f} to {100 * overhead['upper']:.2f}); others {case['idle_step_microseconds']:.1f} µs; "
        f"first {case['first_step_extra_milliseconds']:.0f} ms more"
    )


if __name__ == "__main__":
    main()
