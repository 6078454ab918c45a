"""Compare the criteria by which `prune` chooses activations, on the recipe digits: removals, accuracy and latency.

python bench/record_criteria.py [--seeds 5] [--epochs 15] [--name criteria-MACHINE]

For each seed, all criteria start from the same trained network. This network is trained for two schedules of the given number
of epochs, because otherwise the first fine-tuning would raise the accuracy merely by training longer. Each criterion runs once,
with the largest limit on the loss of validation accuracy. The result for a smaller limit is read from the steps of that run.
The networks that are kept are fused and timed side by side.
"""

import argparse
import copy
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from records import save_record
from torch import nn

import fastentropy as fe
from fastentropy._utils.timing import measure_times
from fastentropy.fusion import fuse
from fastentropy.recipes.digits import Digits

CRITERIA = ("entropy", "entropy-per-latency", "random")
LIMITS = (0.005, 0.01)


def main() -> None:
    """Run all seeds, print a line for each limit and criterion, and write the record if --name is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=Digits.epochs)
    parser.add_argument("--name", help="keep the record as bench/results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run for seed in range(arguments.seeds) for run in runs_of_seed(seed, arguments.epochs)]
    summary = {str(limit): {criterion: summarize(runs, criterion, limit) for criterion in CRITERIA} for limit in LIMITS}
    for limit, rows in summary.items():
        for criterion, row in rows.items():
            print(f"limit {float(limit):.1%} {criterion:20}", {name: round(value, 4) for name, value in row.items()})
    if arguments.name:
        save_record(arguments.name, "cpu", epochs=arguments.epochs, summary=summary, runs=runs)


def runs_of_seed(seed: int, epochs: int) -> list[dict[str, Any]]:
    """Train a dense network, and prune it once with each criterion.

    Args:
        seed: the random seed.
        epochs: the number of epochs of a fine-tuning.

    Returns:
        A run per criterion: its steps, and the fused latency of the network that it keeps for each limit.
    """
    recipe = Digits(torch.device("cpu"))
    torch.manual_seed(seed)
    dense = recipe.build_model()
    for _ in range(2):
        consume(recipe.train(dense.train(), epochs))
    runs, kept = [], {("dense", 0): dense.eval()}
    for criterion in CRITERIA:
        torch.manual_seed(seed)
        models: list[nn.Module] = []
        steps = prune_to_the_widest_limit(dense, recipe, criterion, epochs, models)
        runs.append({"seed": seed, "criterion": criterion, "steps": steps, "kept": {}})
        for limit in LIMITS:
            step = kept_step(steps, limit)
            kept[criterion, step] = models[step]
        print(seed, criterion, [round(step["validation"], 4) for step in steps], flush=True)
    times = fused_times(kept, recipe)
    for run in runs:
        for limit in LIMITS:
            step = kept_step(run["steps"], limit)
            milliseconds = times[run["criterion"], step]
            run["kept"][str(limit)] = {"step": step, "milliseconds": milliseconds, "speedup": times["dense", 0] / milliseconds}
    return runs


def prune_to_the_widest_limit(
    dense: nn.Module, recipe: Digits, criterion: Any, epochs: int, models: list[nn.Module]
) -> list[dict[str, Any]]:
    """Prune a network until its validation accuracy falls by more than the largest of `LIMITS`, or no activation is left.

    Args:
        dense: the trained network.
        recipe: the data, and how to train and evaluate on it.
        criterion: the criterion by which activations are chosen.
        epochs: the number of epochs of each fine-tuning.
        models: a list to which a copy of the network after each step is appended, first the dense network.

    Returns:
        For each step, the removed activations, and the validation and test accuracy.
    """

    def measure(model: nn.Module) -> dict[str, float]:
        models.append(copy.deepcopy(model))
        return {"test": recipe.evaluate(model, "test")}

    result = fe.prune(
        dense,
        train=lambda model: consume(recipe.train(model, epochs)),
        evaluate=lambda model: recipe.evaluate(model, "validation"),
        calibrate=lambda model: consume(recipe.calibrate(model)),
        example_inputs=recipe.example_inputs(),
        max_drop=max(LIMITS),
        criterion=criterion,
        measure=measure,
    )
    return [{"removed": step.removed, "validation": step.score, "test": step.metrics["test"]} for step in result.steps]


def kept_step(steps: Sequence[dict[str, Any]], limit: float) -> int:
    """Return the index of the step that a run with this limit would keep.

    It is the last step before the first one whose validation accuracy is below that of the dense network by more than `limit`.
    """
    falls = [steps[0]["validation"] - step["validation"] > limit + 1e-9 for step in steps]
    return falls.index(True) - 1 if True in falls else len(steps) - 1


def fused_times(models: dict[tuple[str, int], nn.Module], recipe: Digits) -> dict[tuple[str, int], float]:
    """Fuse the networks, and return the milliseconds of one call of each, measured in alternation, by the same keys."""
    inputs = recipe.example_inputs()
    fused = {key: fuse(model, inputs) for key, model in models.items()}
    with torch.inference_mode():
        return measure_times({key: functools.partial(model, *inputs) for key, model in fused.items()}, rounds=101)


def summarize(runs: Sequence[dict[str, Any]], criterion: str, limit: float) -> dict[str, float]:
    """Return the means over the seeds for the networks that a criterion keeps for a limit, and the range of the speedups."""
    own = [run for run in runs if run["criterion"] == criterion]
    kept = [run["kept"][str(limit)] for run in own]
    last = [run["steps"][each["step"]] for run, each in zip(own, kept, strict=True)]
    return {
        "removed": statistics.mean(
            sum(len(step["removed"]) for step in run["steps"][: each["step"] + 1]) for run, each in zip(own, kept, strict=True)
        ),
        "test_change": statistics.mean(step["test"] - run["steps"][0]["test"] for run, step in zip(own, last, strict=True)),
        "speedup": statistics.geometric_mean(each["speedup"] for each in kept),
        "least_speedup": min(each["speedup"] for each in kept),
        "most_speedup": max(each["speedup"] for each in kept),
    }


def consume(values: Any) -> None:
    """Iterate over the values, and discard them."""
    for _ in values:
        pass


if __name__ == "__main__":
    main()
