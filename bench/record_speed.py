"""Measure the networks of a finished pruning run, dense and pruned, next to what their user could run without fastentropy.

python bench/record_speed.py RUN [--step N] [--batches 1 16] [--name NAME]

Each network is measured as given, fused and compiled, in one thread. What belongs to a case is measured side by side. With
--name, the record is kept as bench/results/NAME.json. A run with approximated convolutions (--collapse) cannot be measured.
"""

import argparse
import copy
from dataclasses import replace
from pathlib import Path

import torch
from record_networks import described
from records import RESULTS
from safetensors.torch import load_file
from torch import nn

from fastentropy.benchmarks.measurements import measure
from fastentropy.benchmarks.records import Record
from fastentropy.benchmarks.whole_networks import network_case
from fastentropy.recipes import Recipe, load_recipe
from fastentropy.recipes.run import open_run
from fastentropy.recipes.settings import read_history
from fastentropy.surgery.linearization import linearize


def main() -> None:
    """Measure the two networks at each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run of `fastentropy prune`")
    parser.add_argument("--step", type=int, help="take the network of this step for the pruned one (default: the step kept)")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--name", help="keep the record as bench/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models, (images,) = networks_of(arguments.run, arguments.step)
    step = "" if arguments.step is None else f" --step {arguments.step}"
    record = Record.begin("networks", "cpu", f"python bench/record_speed.py RUN{step} --name {arguments.name}")
    for batch in arguments.batches:
        for name, model in models.items():
            inputs = (images[:batch].clone(memory_format=torch.preserve_format),)
            measurements = measure(network_case(name, models["dense"], (model, inputs)), rounds=31, budget_seconds=40)
            print(described(measurements), flush=True)
            record = record.with_more(measurements)
    if arguments.name:
        replace(record, complete=True).save(RESULTS / f"{arguments.name}.json")


def networks_of(folder: Path, step: int | None) -> tuple[dict[str, nn.Module], tuple[torch.Tensor, ...]]:
    """Return the dense and the pruned network of a run, and the inputs for which it measured latency.

    Args:
        folder: the folder of the run.
        step: the step whose network is the pruned one, kept or not; None for the step kept.
    """
    dense, recipe = dense_network(folder)
    history, pruned = read_history(folder / "history.json"), copy.deepcopy(dense)
    last = history["kept_step"] if step is None else step
    for each in history["steps"][: last + 1]:
        linearize(pruned, each["removed"])
    pruned.load_state_dict(load_file(folder / "steps" / f"{last:02}" / "model.safetensors"))
    return {"dense": dense, "pruned": pruned.eval()}, recipe.example_inputs()


def dense_network(folder: Path) -> tuple[nn.Module, Recipe]:
    """Return the dense network of a run, in eval mode, and the recipe that trained it."""
    settings = open_run(folder).settings
    recipe = load_recipe(settings.recipe, torch.device("cpu"), **settings.recipe_options)
    dense = recipe.build_model()
    dense.load_state_dict(load_file(folder / "dense.safetensors"))
    return dense.eval(), recipe


if __name__ == "__main__":
    main()
