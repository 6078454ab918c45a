"""Replace the activation of idle neurons in the dense network of a pruning run, and measure what that saves without training.

python bench/record_neurons.py RUN [--limits 0 0.01 0.1] [--name NAME]

The neurons are counted on the training images of the run. For each limit of the entropy, neurons that are mostly off become 0
and are cut out, and neurons that are mostly on become linear. The accuracy is that of the test images. Times are measured in
one thread, side by side with the dense network, fused too. With --name, the record is kept as bench/results/NAME.json.
"""

import argparse
import copy
import functools
from pathlib import Path
from typing import Any

import torch
from record_speed import dense_network
from records import save_record
from torch import nn

import fastentropy as fe
from fastentropy._utils.timing import measure_times
from fastentropy.recipes import Recipe


def main() -> None:
    """Measure the networks of all limits, print a line for each, and write the record if --name is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of `fastentropy prune`")
    parser.add_argument("--limits", nargs="*", type=float, default=[0.0, 0.01, 0.1])
    parser.add_argument("--name", help="keep the record as bench/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense, recipe = dense_network(arguments.run)
    statistics = counted(dense, recipe)
    idle = fe.find_idle_neurons(statistics)
    accuracy = recipe.evaluate(dense, "test")
    cases = [of_limit(dense, recipe, statistics, limit) for limit in arguments.limits]
    for case in cases:
        print(case, flush=True)
    if arguments.name:
        neurons = {
            "all": sum(site.neurons for site in statistics.values()),
            "never_on": sum(len(each.never_on) for each in idle.values()),
            "never_off": sum(len(each.never_off) for each in idle.values()),
        }
        command = f"python bench/record_neurons.py RUN --name {arguments.name}"
        save_record(arguments.name, "cpu", command=command, neurons=neurons, test=accuracy, cases=cases)


def counted(model: nn.Module, recipe: Recipe) -> fe.Statistics:
    """Return the statistics of a model on the training images of its recipe."""
    with torch.no_grad(), fe.collect(model) as collector:
        for _ in recipe.calibrate(model):
            pass
    return collector.compute()


def of_limit(dense: nn.Module, recipe: Recipe, statistics: fe.Statistics, limit: float) -> dict[str, Any]:
    """Return the states of the neurons, the accuracy, the multiplications and the times for one limit of the entropy."""
    model, inputs = copy.deepcopy(dense), recipe.example_inputs()
    states = fe.linearize_neurons(model, statistics, max_entropy=limit)
    fused, plain = fe.fuse(model, inputs), fe.fuse(dense, inputs)
    with torch.inference_mode():
        calls = {"dense": dense, "dense, fused": plain, "fused": fused}
        times = measure_times({name: functools.partial(each, *inputs) for name, each in calls.items()}, rounds=51)
    return {
        "max_entropy": limit,
        "linear": sum(site.linear for site in states.values()),
        "constant": sum(site.constant for site in states.values()),
        "test": recipe.evaluate(model, "test"),
        "multiplications": fused.report.multiplications,
        "milliseconds": times,
    }


if __name__ == "__main__":
    main()
