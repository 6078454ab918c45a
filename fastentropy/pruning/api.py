"""The EASIER loop (arXiv 2404.18949): linearise the activation of lowest entropy, fine-tune, validate, repeat."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from torch import nn

from fastentropy._utils.errors import nearest_names
from fastentropy.collector.statistics import Statistics
from fastentropy.pruning.criteria import Criterion
from fastentropy.pruning.loop import Functions, PruningLoop, latency_table
from fastentropy.pruning.options import Options
from fastentropy.pruning.steps import Step, StepFolder
from fastentropy.sites.activations import activation_modules
from fastentropy.sites.finding import find_sites


@dataclass(frozen=True)
class PruningResult:
    """The last network whose score held, and all steps.

    Attributes:
        model: that network, in eval mode.
        removed: the names of the sites that are linearised in it, in the order of their removal.
        steps: all of them, the dense network first.
        kept_step: the index of the step that the model is of. A step after it fell too far.
    """

    model: nn.Module
    removed: tuple[str, ...]
    steps: tuple[Step, ...]
    kept_step: int


def prune(
    model: nn.Module,
    *,
    train: Callable[..., object],
    evaluate: Callable[[nn.Module], float],
    calibrate: Callable[[nn.Module], object] | None,
    example_inputs: tuple[Any, ...],
    max_drop: float = 0.01,
    max_removed: int | None = None,
    per_step: int = 1,
    criterion: Criterion = "entropy",
    zeros_together: bool = False,
    protect: Iterable[str] = (),
    target_speedup: float | None = None,
    max_latency_ms: float | None = None,
    collapse: Literal["project"] | None = None,
    statistics: Statistics | None = None,
    checkpoint_dir: str | PathLike[str] | None = None,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_step: Callable[[Sequence[Step]], object] | None = None,
) -> PruningResult:
    """Linearise the activations of lowest entropy, step after step, as long as the score holds.

    The trained model is not changed: the loop works on a copy, and evaluates it before it removes anything.

    Args:
        model: the trained model.
        train: train(model) is one fine-tuning schedule, in place, after each removal; called in training mode.
        evaluate: evaluate(model) -> float: higher is better; called once per step, in eval mode and without gradients.
        calibrate: calibrate(model) makes forward passes over the training data, in eval mode and without gradients; they are
            what is measured. None measures the passes of train itself: it is called as train(model, collector), and the
            collector (`collect`) has reset() to begin anew, as with the last epoch, and paused(). That needs the `statistics`
            of the dense model.
        example_inputs: the positional inputs of one call, of the size and on the device that latency is measured for.
        max_drop: stop where the score is more than this below the dense model's, in the units of `evaluate`.
        max_removed: remove at most so many sites.
        per_step: how many of them in one step; equal to max_removed, one step does all.
        criterion: "entropy" removes the lowest layer entropy first, and of equal ones the first in call order.
            "entropy-per-latency" removes the set of sites that loses least entropy for each millisecond that is saved without
            it, by the activations themselves and by what `fuse` makes of the rest, measured on the device; per_step counts
            such sets. "random" and "uniform" are controls. A function (model, statistics) -> {site: score} has the lowest
            scores removed first; with checkpoint_dir it is known by its name.
        zeros_together: remove all sites with an entropy of exactly 0 together, in addition, as the published code does.
        protect: names of sites that stay.
        target_speedup: with "entropy-per-latency", stop where one call is predicted to be so many times as fast as that of the
            given model, and on the way there remove only what belongs to the sites of least entropy that reach it: the optimum
            for the entropies of each step. max_drop and max_removed may end the run before.
        max_latency_ms: the same for the milliseconds that one call may take; one of the two.
        collapse: "project" approximates a linearised series of convolutions by a single one, fitted to it by least squares on
            the calibration data, where the exact operator would be slower; the fine-tuning follows.
        statistics: of the dense model, where they were gathered already, so that no calibration is needed for them.
        checkpoint_dir: write every finished step there, and go on from the steps that are there already, if they are of a run
            with the same options. The end is the same as without the interruption where `train` draws from torch's default
            generators.
        measure: measure(model) -> dict: further figures to keep with each step.
        on_step: on_step(steps so far) is called after each step.

    Raises:
        ValueError: the model has no known activation, or one that is no module of its own (see `isolate`); an option is out of
            range; a latency cannot be reached; calibrate makes no forward pass; train exchanges modules; a score is not a
            finite number; checkpoint_dir is damaged, of another model or of a run with other options.
    """
    if isinstance(protect, str):
        raise ValueError(f"protect must be a list of site names, not the string {protect!r}: [{protect!r}]")
    options = Options(
        max_drop, max_removed, per_step, criterion, zeros_together, tuple(protect), target_speedup, max_latency_ms, collapse
    )
    sites = [site.name for site in find_sites(model, example_inputs)]
    _check_own_modules(model, sites)
    check_names(options.protect, sites, "protect")
    _check_statistics(calibrate, statistics, sites, collapse)
    folder = None if checkpoint_dir is None else StepFolder(checkpoint_dir, options.to_dict())
    functions = Functions(train, evaluate, calibrate, measure, on_step)
    dense = copy.deepcopy(model).eval()
    loop = PruningLoop(dense, sites, functions, options, folder, latency_table(dense, example_inputs, sites, options, folder))
    loop.resume()
    if not loop.steps:
        loop.run_step((), statistics)
    kept = None
    while loop.within_max_drop():
        kept = copy.deepcopy(loop.model)
        if not (names := loop.next_sites()):
            break
        loop.run_step(names)
    kept_step = len(loop.steps) - (1 if loop.within_max_drop() else 2)
    removed = tuple(name for step in loop.steps[: kept_step + 1] for name in step.removed)
    if kept is None:
        kept = loop.restore(copy.deepcopy(model), kept_step)
    return PruningResult(kept.eval(), removed, tuple(loop.steps), kept_step)


def check_names(names: Sequence[str], sites: Sequence[str], option: str) -> None:
    """Raise ValueError where an option names what is no site of the model."""
    for name in names:
        if name not in sites:
            nearest = nearest_names(name, sites)
            raise ValueError(f"{option} names {name!r}, which is no site of the model; the nearest are {nearest}")


def _check_statistics(calibrate: object, statistics: Statistics | None, sites: Sequence[str], collapse: object) -> None:
    if calibrate is None and (statistics is None or collapse):
        lacking = "collapse needs calibrate" if collapse else "without calibrate, the dense model's statistics= are needed"
        raise ValueError(f"{lacking}; collect them in its last epoch with fe.collect, or give a function calibrate(model)")
    if statistics is not None and set(statistics) != set(sites):
        named = ", ".join(sorted(set(statistics) ^ set(sites)))
        raise ValueError(f"statistics are of another model than the given one: they differ in the sites {named}")


def _check_own_modules(model: nn.Module, sites: Sequence[str]) -> None:
    modules = activation_modules(model)
    if others := [name for name in sites if name not in modules]:
        raise ValueError(
            f"{', '.join(others)}: activations that are called as functions, or by one module several times in a forward pass, "
            "cannot be linearised one by one; prune the model that fe.isolate(model, example_inputs) returns"
        )
